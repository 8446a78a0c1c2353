"""report.html as text: what is in it, what never is, and how large it gets."""

import base64
import dataclasses
import html
import html.parser
import io
import json
import pathlib
import re
import urllib.parse
from typing import Any

import numpy as np
import pytest
from PIL import Image

from padim_jax.config import defaults
from padim_jax.config.settings import Config, validate
from padim_jax.core.calibration import Calibration
from padim_jax.data.records import Record
from padim_jax.output import figures, results, sweep_table
from padim_jax.output import html as report
from padim_jax.output.html import charts, document, pictures
from padim_jax.output.results import Scored

SIZE = (24, 32)
HOSTILE = (
    "<img src=x onerror=\"window.hacked='img'\">.png",
    "'\"><script>window.hacked='script'</script>.png",
    "</script><script>window.hacked='end'</script>.png",
    "</title></style><svg onload=window.hacked='svg'>.png",
    "<!--.png",
    "--><b>&lt;&amp;.png",
    "not utf-8 \udcff\udc80.png",
    "\u202egnp.exe",
    "line\nbreak\x01\x1b[31m.png",
)


def make_config(**settings: Any) -> Config:
    values = defaults.get_config()
    values.update_from_flattened_dict(settings)
    return validate(values)


CONFIG = make_config()


def make_scored(
    normal: int = 12,
    defects: dict[str, int] | None = None,
    names: tuple[str, ...] = (),
    masked: bool = True,
    size: tuple[int, int] = SIZE,
) -> Scored:
    """Scores of both classes that overlap; each image's defect is its map's maximum."""
    rng = np.random.default_rng(0)
    kinds = ["good"] * normal
    for kind, count in ({"crack": 9, "hole": 6} if defects is None else defects).items():
        kinds += [kind] * count
    records, masks, maps = [], [], []
    for number, kind in enumerate(kinds):
        name = names[number] if number < len(names) else f"{number:03}.png"
        path = f"part/test/{kind}/{name}"
        label = int(kind != "good")
        records.append(Record("test", pathlib.Path("image"), None, label, kind, path))
        mask = np.zeros(size, bool)
        if label:
            mask[4:10, 5 : 9 + number % 7] = True
        masks.append(mask if masked or not label else None)
        maps.append(rng.uniform(0, 5, size) + mask * rng.uniform(0, 4))
    stacked = np.stack(maps).astype(np.float32)
    scores = (stacked.max(axis=(1, 2)) + rng.normal(0, 0.3, len(kinds))).astype(np.float32)
    return Scored(records, masks, stacked, scores)


CALIBRATION = Calibration(
    origin="held_out",
    images=40,
    image_rate=0.01,
    image_promised_rate=0.025,
    image_threshold=5.5,
    pixel_rate=0.001,
    pixel_threshold=5.0,
    typical_pixel=2.0,
    quantiles=(4.0, 5.0),
    levels=(0.1, 0.9),
    tail_images=4,
    tail_excess=0.1,
)


def make_page(scored: Scored, calibration: Calibration | None = None, **settings: Any) -> str:
    scored = results.with_pixels(scored)
    measured = results.measure(scored, calibration)
    scale = figures.color_scale(scored.maps, scored.labels.astype(int))
    measured |= {"color_scale": [scale.low, scale.high], "leaks": []}
    scored = results.locate(scored, measured, (1.0, 1.0))
    image = np.full((*scored.maps.shape[1:], 3), 90, np.uint8)
    return report.run_page(make_config(**settings), scored, measured, lambda _: image)


class Elements(html.parser.HTMLParser):
    """Start tags with their attributes, and the text, as a browser takes them."""

    def __init__(self, page: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text.append(data)

    def having(self, tag: str, **attributes: str) -> list[dict[str, str | None]]:
        return [
            found
            for name, found in self.tags
            if name == tag and attributes.items() <= found.items()
        ]


def page_data(page: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page)
    assert found
    return json.loads(found[1])


def sweep_table_of(
    name: str = "bottle", failed: dict[str, str] | None = None, repeats: int = 1
) -> dict[str, Any]:
    measured = dict.fromkeys(results.measure(make_scored())) | {
        "image_auroc": 0.9,
        "pixel_auroc": 0.984,
        "train_images": 209,
        "test_images": 83,
    }
    finished = {(name, i): measured | {"image_auroc": 0.9 + 0.02 * i} for i in range(repeats)}
    config = make_config(category="all", repeats=repeats)
    return sweep_table.build(config, finished, failed or {}, [name, *(failed or {})])


# Everything in one file, and nothing of a stranger's in it.


def sweep_page() -> str:
    scale, image = figures.ColorScale(0.0, 5.0), np.zeros((*SIZE, 3), np.uint8)
    shown = report.thumbnails(make_scored(), scale, lambda _: image)
    links = {"bottle": "bottle/report.html"}
    return report.sweep_page(sweep_table_of(), links, {"bottle": shown})


@pytest.fixture(scope="module", params=["run", "calibrated", "sweep"])
def page(request) -> str:
    if request.param == "sweep":
        return sweep_page()
    return make_page(make_scored(), CALIBRATION if request.param == "calibrated" else None)


def test_nothing_is_loaded_from_elsewhere(page):
    elements = Elements(page)
    for tag, attributes in elements.tags:
        for name in ("src", "srcset", "data", "poster", "action", "xlink:href"):
            assert (attributes.get(name) or "data:").startswith("data:"), (tag, attributes)
        if "href" in attributes and tag != "a":  # a link is followed by a click only
            assert attributes["href"] == "data:,", tag
    assert not elements.having("iframe")
    assert "@import" not in page
    assert not re.search(r"url\(", page)


def test_the_policy_allows_this_script_and_style_and_no_network(page):
    elements = Elements(page)
    (policy,) = elements.having("meta", **{"http-equiv": "Content-Security-Policy"})
    assert str(policy["content"]).startswith("default-src 'none'; img-src data:; style-src")
    assert "unsafe" not in str(policy["content"])
    # Which those two would not be: tests in a browser see to the digests.
    assert not [a for _, a in elements.tags if "style" in a or any(k[:2] == "on" for k in a)]


def hostile_page() -> str:
    # Types come from folders, which cannot have a slash in their names.
    kind = HOSTILE[0].replace("/", "")
    scored = make_scored(3, {kind: len(HOSTILE), "</select><b>": 2}, 3 * ("a",) + HOSTILE)
    return make_page(scored, category="<i>bottle<i>")


def hostile_sweep() -> str:
    name = HOSTILE[0].replace("/", "")
    table = sweep_table_of(name, {f"{i}": text for i, text in enumerate(HOSTILE)})
    table["title"] = HOSTILE[1]
    table["published"] = [
        {
            "source": HOSTILE[0],
            "reference": HOSTILE[1],
            "url": "javascript:alert(1)",
            "same_settings": False,
            "values": {"image_auroc": {name: 0.5}},
            "differences": {"image_auroc": {name: 0.4}},
            "out_of_tolerance": {"image_auroc": [name]},
        }
    ]
    shown = [{"caption": text, "url": "data:image/jpeg;base64,"} for text in HOSTILE]
    return report.sweep_page(table, {name: f"{name}/report.html"}, {name: shown})


@pytest.mark.parametrize("which", ["run", "sweep"])
def test_names_make_no_elements_and_no_attributes(which):
    if which == "run":
        hostile, harmless = hostile_page(), make_page(make_scored(3))
    else:
        hostile, harmless = hostile_sweep(), sweep_page()
    hostile.encode()  # lone surrogates would fail
    shape = {(tag, *sorted(a)) for tag, a in Elements(hostile).tags}
    known = {(tag, *sorted(a)) for tag, a in Elements(harmless).tags}
    # What comes and goes with notes, marks and failures; hostile are i, b, img and script.
    allowed = {
        *(("section", "aria-label", "class"), ("small", "class"), ("small",), ("p",)),
        *(("ul",), ("ul", "class"), ("td", "class"), ("td", "title"), ("span", "aria-label")),
        *(("span", "class"), ("a", "href"), ("tr", "class")),
    }
    assert shape - known - allowed == set()
    assert hostile.count("<script") == harmless.count("<script")
    links = [str(found["href"]) for found in Elements(hostile).having("a")]
    assert not [link for link in links if link.startswith("javascript:")]
    seen = "".join(Elements(hostile).text)
    assert "<img src=x onerror=\"window.hacked='img'\">.png" in seen


@pytest.mark.parametrize(
    "category",
    ["part#1", "a?b", "50%25", "https:x", "javascript:alert(1)", "ü", "bad\udcff"],
)
def test_links_lead_to_the_categorys_folder(category: str):
    table = sweep_table_of()
    table["categories"] = [category]
    page = report.sweep_page(table, {category: f"{category}/report.html"})
    links = [str(found["href"]) for found in Elements(page).having("a")]
    (link,) = {link for link in links if link.endswith("report.html")}
    url = urllib.parse.urlsplit(urllib.parse.urljoin("file:///sweep/report.html", link))
    assert (url.scheme, url.query, url.fragment) == ("file", "", "")
    path = urllib.parse.unquote(url.path, errors="surrogateescape")
    assert path == f"/sweep/{category}/report.html"


def test_data_do_not_end_their_script():
    page = document.page("t", "", {"x": "</script><!--<script>"})
    assert page.count("</script>") == 2
    assert page_data(page) == {"x": "</script><!--<script>"}


def test_local_folders_are_not_shown():
    settings: dict[str, Any] = {
        "dataset.root": "/home/someone/parts",
        "model.weights": "/home/someone/w.npz",
        "cache.dir": "/home/someone/cache",
    }
    page = make_page(make_scored(), **settings)
    assert "someone" not in page
    assert "w.npz" in page
    table = sweep_table_of()
    table["settings"]["weights"] = "/home/someone/w.npz"
    assert "someone" not in report.sweep_page(table)


# Numbers.


def test_scores_reach_the_script_to_the_last_bit():
    scored = make_scored()
    data = page_data(make_page(scored))
    kinds = np.array([record.defect_type for record in scored.records])
    for kind, text in zip(("good", "crack", "hole"), data["groups"], strict=True):
        found = np.frombuffer(base64.b64decode(text), "<f4")
        np.testing.assert_array_equal(found, np.sort(scored.scores[kinds == kind]))
    assert data["low"] < scored.scores.min()
    assert data["high"] > scored.scores.max()


def test_a_warning_about_normal_images():
    warned = dataclasses.replace(CALIBRATION, warning="near copies <b>")
    scored = make_scored()
    assert "Warning: near copies &lt;b&gt;" in make_page(scored, warned)
    assert "Warning: near" not in make_page(scored, CALIBRATION)


@pytest.mark.parametrize("calibration", [None, CALIBRATION])
def test_counts_without_the_script_are_those_of_the_first_threshold(calibration):
    scored = make_scored()
    page = make_page(scored, calibration)
    threshold = results.measure(scored)["image_f1_threshold"] if calibration is None else 5.5
    called = scored.scores >= threshold
    for name, chosen in (
        ("found", scored.labels & called),
        ("missed", scored.labels & ~called),
        ("false-alarm", ~scored.labels & called),
        ("passed", ~scored.labels & ~called),
    ):
        assert outcomes(page)[f"count-{name}"] == str(chosen.sum())
        verdict = name.replace("-", " ")
        cards = Elements(page).having("li", **{"data-verdict": verdict})
        assert len(cards) == chosen.sum()
    scores = [
        float(str(a["data-score"])) for a in Elements(page).having("li", **{"class": "card"})
    ]
    assert scores == sorted(scored.scores.astype(float), reverse=True)


def outcomes(page: str) -> dict[str, str]:
    """What is shown for each count and rate of the threshold that the page opens with."""
    found = re.findall(r'id="((?:count|rate)-[\w-]+)"[^>]*>(.*?)</(?:b|dd)>', page)
    return {name: html.unescape(re.sub("<.*?>", "", shown)) for name, shown in found}


def test_nothing_is_counted_where_there_is_nothing_to_count():
    dash = "\N{EN DASH}"
    shown = outcomes(make_page(make_scored(5, {}), CALIBRATION))
    assert shown["count-found"] == shown["count-missed"] == shown["rate-recall"] == dash
    assert shown["count-passed"] == "5"
    shown = outcomes(make_page(make_scored(0, {"crack": 4}), CALIBRATION))
    assert shown["count-false-alarm"] == shown["count-passed"] == shown["rate-alarms"] == dash
    assert shown["rate-recall"] == "4 of 4 (40 to 100 %)"
    page = make_page(make_scored(5, {}))  # without a threshold there is no verdict at all
    assert set(outcomes(page).values()) == {dash}
    verdicts = {
        card["data-verdict"] for card in Elements(page).having("li", **{"class": "card"})
    }
    assert verdicts == {""}


def test_a_zero_is_not_marked_as_an_error():
    """Red is for missed defects and false alarms, of which these normal images have none."""
    page = make_page(make_scored(), dataclasses.replace(CALIBRATION, image_threshold=6.0))
    assert '<b id="count-false-alarm" class="nothing">0</b>' in page
    assert re.search(r'<b id="count-missed">[1-9]', page)


def test_the_recommended_threshold_comes_with_what_it_costs():
    text = " ".join("".join(Elements(make_page(make_scored(), CALIBRATION)).text).split())
    # Of the test images: 2 of 12 normal ones, and 14 of 15 defects, lie above 5.5.
    assert (
        "recommended: 5.5 from 40 normal images (held out), 1 % false alarms asked for, 2.5 % "
        "promised by so few On the test images: false alarms 2 of 12 (2 to 48 %), defects "
        "found 14 of 15 (68 to 100 %)"
    ) in text
    assert "No threshold is recommended" not in text


@pytest.mark.parametrize("reason", ["no thresholds", "near copies", "unlike"])
def test_no_threshold_is_recommended_against_the_evidence(reason):
    scored, calibration = make_scored(), None
    if reason == "near copies":
        calibration = dataclasses.replace(CALIBRATION, warning=reason)
    if reason == "unlike":
        calibration = dataclasses.replace(CALIBRATION, scores=tuple(np.linspace(1, 2, 40)))
        assert results.measure(scored, calibration)["transfer"]["unlike"]
    text = " ".join("".join(Elements(make_page(scored, calibration)).text).split())
    assert "No threshold is recommended" in text
    assert not re.search(r"recommended: \d", text)


def test_defects_found_elsewhere_are_told():
    """The first crack's map is highest far from its mask."""
    scored = make_scored()
    scored.maps[12] = np.roll(scored.maps[12], 12, axis=0)
    page = make_page(scored, CALIBRATION)
    cards = Elements(page).having("li", **{"class": "card", "data-in-place": "0"})
    assert len(cards) == 1
    assert scored.scores[12] == np.float32(str(cards[0]["data-score"]))
    assert page.count('<span class="verdict">found elsewhere</span>') == 1
    assert '<option value="elsewhere">found elsewhere</option>' in page
    assert outcomes(page)["rate-place"] == "13 of 15 (60 to 98 %)"  # one of 14 is elsewhere
    without = make_page(make_scored(masked=False), CALIBRATION)
    assert "elsewhere" not in re.sub(r"<(script|style)>.*?</\1>", "", without, flags=re.DOTALL)
    assert "rate-place" not in outcomes(without)


def test_a_few_normal_images_are_said_to_promise_less():
    text = "".join(Elements(make_page(make_scored(), CALIBRATION)).text)
    assert (
        "from 40 normal images (held out), 1 % false alarms asked for, 2.5 % promised" in text
    )


def test_histogram_holds_every_image():
    scored = make_scored(200, {"crack": 77})
    axis = charts.score_axis(scored.scores)
    chart = charts.histogram(scored.scores, scored.labels, axis, [])
    for kind, total in (("normal", 200), ("anomalous", 77)):
        assert sum(map(int, re.findall(rf"<title>(\d+) {kind}", chart))) == total


def test_thinned_curve_stays_on_the_curve():
    x = np.sort(np.random.default_rng(0).uniform(size=5000))
    x[0], x[-1] = 0, 1
    y = x**0.1
    found_x, found_y = charts._thin((x, y), 0.3)
    assert len(found_x) <= 402
    assert found_x[-1] == pytest.approx(0.3)
    # 400 steps along a curve of length below 2: between two points it rises by 1/200.
    grid = np.linspace(0, 0.3, 1000)
    np.testing.assert_allclose(
        np.interp(grid, found_x, found_y), np.interp(grid, x, y), rtol=0, atol=1 / 200
    )


@pytest.mark.parametrize("train_images", [48, 209])
def test_published_numbers_are_of_as_many_images(train_images):
    scored = results.with_pixels(make_scored(3))
    measured = results.measure(scored) | {"color_scale": [0.0, 1.0]}
    measured |= {"train_images": train_images, "test_images": 83}
    image = np.zeros((*SIZE, 3), np.uint8)
    page = report.run_page(make_config(), scored, measured, lambda _: image)
    text = " ".join("".join(Elements(page).text).split())
    assert ("anomalib" in text) == (train_images == 209)
    assert ("this run is of 48 and 83" in text) == (train_images == 48)


def test_differences_have_no_negative_zero():
    assert document.difference(-0.0004) == "±0.000"
    assert document.difference(-0.0006) == "&minus;0.001"
    assert document.difference(0.25) == "+0.250"


def test_sweep_shows_means_spreads_and_marks():
    page = report.sweep_page(sweep_table_of(failed={"cable": "no images"}, repeats=2))
    text = " ".join("".join(Elements(page).text).split())
    assert "0.910 ±0.014" in text  # of 0.90 and 0.92
    assert "\N{MINUS SIGN}0.084!" in text  # 0.910 - 0.994, beyond 0.02
    assert "failed: cable: no images" in text
    assert 'title="0.9000, 0.9200"' in page


# Where something is missing.


@pytest.mark.parametrize(
    "scored",
    [
        make_scored(5, {}),
        make_scored(0, {"crack": 4}),
        make_scored(1, {}),
        make_scored(0, {"crack": 1}),
        make_scored(4, {"crack": 4}, masked=False),
    ],
    ids=["no anomalous", "no normal", "one normal", "one anomalous", "no masks"],
)
@pytest.mark.parametrize("calibration", [None, CALIBRATION])
def test_page_without_some_of_it(scored, calibration):
    page = make_page(scored, calibration)
    text = " ".join(Elements(page).text)
    assert len(Elements(page).having("li", **{"class": "card"})) == len(scored.scores)
    assert "undefined: no" in text
    data = page_data(page)
    assert data["low"] < scored.scores.min() <= scored.scores.max() < data["high"]
    if calibration is None and (scored.labels.all() or not scored.labels.any()):
        assert "No threshold is recommended" in text
        assert data["start"] is None
    if any(mask is None for mask in scored.masks):
        assert text.count("mask unknown") == 4


def test_no_image_at_all():
    scored = make_scored()
    nothing = Scored([], [], scored.maps[:0], scored.scores[:0])
    with pytest.raises(ValueError, match="at least one image"):
        report.run_page(CONFIG, nothing, {}, lambda _: np.zeros((*SIZE, 3), np.uint8))


# Which images, and how large the page gets.


def test_errors_come_first_then_every_type_then_an_even_sample():
    rng = np.random.default_rng(0)
    labels = np.arange(400) < 100
    scores = np.where(labels, rng.uniform(8, 20, 400), rng.uniform(0, 10, 400))
    types = ["rare" if i < 2 else "often" if i < 100 else "good" for i in range(400)]
    order = pictures.telling_order(scores, labels, types, [9.0, 12.0])
    assert sorted(order) == list(range(400))
    wrong = set(np.flatnonzero(((scores >= 9) != labels) | ((scores >= 12) != labels)))
    assert set(order[: len(wrong)]) == wrong
    # The worst of them is furthest on the wrong side of one of both.
    worst = np.where(labels, 12 - scores, scores - 9)
    assert order[0] == worst.argmax()
    rest = order[: len(wrong) + 18]
    assert {0, 1, scores.argmax(), scores.argmin()} <= set(rest)
    # Any further 50 are spread over the scores.
    sample = np.sort(scores[order[len(wrong) + 18 :][:50]])
    assert np.diff(sample).max() < 4


def test_page_of_thousands_of_images_is_below_15_megabytes(monkeypatch):
    monkeypatch.setattr(pictures, "_BUDGET", 300_000)
    scored = results.with_pixels(make_scored(900, {"crack": 300}))
    noise = np.random.default_rng(0).integers(0, 256, (*SIZE, 3)).astype(np.uint8)
    measured = results.measure(scored) | {"color_scale": [0.0, 6.0]}
    page = report.run_page(CONFIG, scored, measured, lambda _: noise)
    # The pictures' bound, and little for everything else.
    assert len(page.encode()) < 300_000 + 700_000
    shown = Elements(page).having("li", **{"class": "card"})
    assert 50 < len(shown) < 600
    assert f"{len(shown)} of 1200 images shown" in page
    errors = (scored.scores >= measured["image_f1_threshold"]) != scored.labels
    in_page = [a for a in shown if a["data-verdict"] in ("missed", "false alarm")]
    assert len(in_page) == min(errors.sum(), len(shown))
    assert sum(len(base64.b64decode(g)) for g in page_data(page)["groups"]) == 4 * 1200


def decoded(url: str) -> np.ndarray:
    content = base64.b64decode(url.partition(",")[2])
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


def test_pictures_have_the_proportions_of_the_files():
    """The model sees squares of 32x64 and of 64x32 pixels."""
    scored = make_scored(1, {"crack": 1}, size=(64, 64))
    scored = dataclasses.replace(scored, aspects=[2.0, 0.5])
    image = np.zeros((64, 64, 3), np.uint8)
    scale = figures.ColorScale(0.0, 5.0)
    found = pictures.encode(scored, [0, 1], scale, 4.0, lambda _: image)
    assert [found[i].size for i in (0, 1)] == [(64, 32), (32, 64)]  # width, height
    for url in (found[1].image, found[1].mask, found[1].lines):
        assert decoded(url).shape == (64, 32, 3)
    assert decoded(found[1].heat).shape == (32, 16, 3)
    shown = report.thumbnails(scored, scale, lambda _: image)
    assert [decoded(one["url"]).shape[:2] for one in shown] == [(64, 64), (32, 128)]
    (url,) = pictures.strip([image], [scored.maps[0]], [2.0], scale)
    assert decoded(url).shape[:2] == (32, 128)


def test_regions_of_a_pixel_are_drawn_in_small_pictures():
    scored = make_scored(0, {"crack": 1}, size=(500, 1000))
    mask = np.zeros((500, 1000), bool)
    mask[301, 501] = True
    scored = dataclasses.replace(scored, masks=[mask])
    scored.maps[0] = 0
    scored.maps[0][100, 701] = 9
    image = np.zeros((500, 1000, 3), np.uint8)
    scale = figures.ColorScale(0.0, 5.0)
    found = pictures.encode(scored, [0], scale, 8.9, lambda _: image)[0]
    assert decoded(found.mask)[301 * 192 // 500, 501 * 384 // 1000].all()
    lines = decoded(found.lines)
    assert tuple(lines[100 * 192 // 500, 701 * 384 // 1000]) == figures.PREDICTED


def test_large_pictures_are_made_small():
    scored = make_scored(1, {"crack": 1}, size=(500, 1000))
    image = np.zeros((500, 1000, 3), np.uint8)
    found = pictures.encode(scored, [1], figures.ColorScale(0.0, 5.0), 4.0, lambda _: image)
    assert found[1].size == (384, 192)
    assert found[1].mask
    assert found[1].lines
