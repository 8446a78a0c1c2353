"""report.html in a real headless Chromium: what a person does with it, and what it shows."""

import pathlib
import shutil
from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image
from test_report import (
    CALIBRATION,
    HOSTILE,
    hostile_page,
    hostile_sweep,
    make_page,
    make_scored,
)

from padim_jax.core import verdicts as verdicts_lib
from padim_jax.data.layouts import LAYOUTS
from padim_jax.output.results import Scored, locate, measure

webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium (extra: test)")
from selenium.common.exceptions import NoAlertPresentException  # noqa: E402
from selenium.webdriver.common.action_chains import ActionChains  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.select import Select  # noqa: E402
from selenium.webdriver.support.wait import WebDriverWait  # noqa: E402

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER),
    reason="needs Chromium and its driver (apt-get install chromium chromium-driver)",
)
# Normal images come before the defects, so that both have hostile names.
SCORED = make_scored(names=HOSTILE)
# As `SCORED`, but for four defects the map is highest far from the mask.
ELSEWHERE = make_scored()
for _index in (12, 15, 20, 26):
    ELSEWHERE.maps[_index] = np.roll(ELSEWHERE.maps[_index], 12, axis=0)
IN_PLACE = locate(ELSEWHERE, measure(ELSEWHERE), (1.0, 1.0)).in_place or ()


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in (
        "--headless=new",
        "--no-sandbox",  # which a container's root does not have; the pages are our own
        "--disable-dev-shm-usage",
        "--disable-gpu",
        "--window-size=1280,900",
        f"--user-data-dir={tmp_path_factory.mktemp('chromium')}",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(DRIVER)
    driver = webdriver.Chrome(options, service)
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("reports")
    texts = {
        "run": make_page(SCORED),
        "calibrated": make_page(SCORED, CALIBRATION),
        "elsewhere": make_page(ELSEWHERE),
        "normal": make_page(make_scored(5, {})),
        "hostile": hostile_page(),
        "sweep": hostile_sweep(),
    }
    for name, text in texts.items():
        (folder / f"{name}.html").write_text(text, encoding="utf-8")
    return {name: pathlib.Path(folder / f"{name}.html").as_uri() for name in texts}


@pytest.fixture
def page(browser, files):
    browser.get(files["run"])
    yield browser
    assert console(browser) == []


def console(browser) -> list[str]:
    return [entry["message"] for entry in browser.get_log("browser")]


def by_id(page, name: str):
    return page.find_element(By.ID, name)


def counts(page) -> list[int]:
    names = ("found", "missed", "false-alarm", "passed")
    return [int(by_id(page, f"count-{name}").text) for name in names]


def share(count: int, total: int) -> str:
    return verdicts_lib.share_text(verdicts_lib.share(np.arange(total) < count))


def expected_counts(threshold: float) -> list[int]:
    called, labels = SCORED.scores >= np.float32(threshold), SCORED.labels
    outcomes = (labels & called, labels & ~called, ~labels & called, ~labels & ~called)
    return [int(outcome.sum()) for outcome in outcomes]


def mixed_threshold(page) -> float:
    """Puts the slider where there are all four outcomes."""
    axis = np.linspace(SCORED.scores.min(), SCORED.scores.max(), 200)
    wanted = next(t for t in axis if min(expected_counts(t)) > 0)
    low, high = ends(page)
    return set_slider(page, round(1000 * (wanted - low) / (high - low)))


def ends(page) -> tuple[float, float]:
    return page.execute_script(
        "const d = JSON.parse(document.getElementById('data').textContent);"
        "return [d.low, d.high]"
    )


def cards(page) -> list[tuple[float, str, str]]:
    """Score, defect type and verdict of the images that are shown, in the page's order."""
    return page.execute_script(
        "return [...document.querySelectorAll('.card')].filter(c => c.offsetParent).map(c => "
        "[Number(c.dataset.score), c.querySelector('.kind').textContent, "
        "c.querySelector('.verdict').textContent])"
    )


def expected_cards(threshold: float) -> list[list]:
    found = []
    for i in np.argsort(-SCORED.scores, kind="stable"):
        called = SCORED.scores[i] >= np.float32(threshold)
        names = ("found", "missed") if SCORED.labels[i] else ("false alarm", "passed")
        verdict = names[0] if called else names[1]
        found.append([float(SCORED.scores[i]), SCORED.records[i].defect_type, verdict])
    return found


def set_slider(page, value: int) -> float:
    """Puts the slider somewhere; returns the threshold that this place stands for."""
    page.execute_script(
        "const s = document.getElementById('slider'); s.value = arguments[0];"
        "s.dispatchEvent(new Event('input'))",
        value,
    )
    low, high = ends(page)
    return low + (high - low) * value / 1000


def shown_layers(page, selector: str) -> list[str]:
    return page.execute_script(
        "return [...document.querySelector(arguments[0]).children]"
        ".filter(e => getComputedStyle(e).display !== 'none').map(e => e.className)",
        selector,
    )


DEFECT = ".card[data-label='1'] .frame"


@pytest.mark.parametrize("name", ["run", "calibrated", "normal", "hostile", "sweep"])
def test_loads_without_a_word_in_the_console_and_runs_nothing_hostile(browser, files, name):
    browser.get(files[name])
    assert console(browser) == []
    assert browser.execute_script("return window.hacked") is None
    # Style and script passed their own policy.
    assert browser.execute_script("return document.documentElement.className") == "scripted"
    assert browser.find_element(By.TAG_NAME, "main").is_displayed()
    if name != "sweep":
        broken = "return [...document.images].filter(i => i.complete && !i.naturalWidth).length"
        assert browser.execute_script(broken) == 0
    if name == "hostile":
        browser.find_element(By.CSS_SELECTOR, DEFECT).click()
        title = by_id(browser, "zoom-title").text
        assert any(text.split("\n")[0][:12] in title for text in HOSTILE)
        assert browser.execute_script("return window.hacked") is None


def test_names_of_real_files_are_text(browser, tmp_path):
    """Of a dataset that a stranger has made; `alert` would stop the browser."""
    names = ["<img src=x onerror=alert(1)>.png", '"><script>alert(2)<script>.png']
    kind, category = "<svg onload=alert(3)>", "'><iframe src=javascript:alert(4)>"
    base = tmp_path / category
    for folder in ("train/good", "test/good", f"test/{kind}"):
        (base / folder).mkdir(parents=True)
        for name in names:
            Image.new("RGB", (32, 24)).save(base / folder / name, "PNG")
    (base / "ground_truth" / kind).mkdir(parents=True)
    for name in names:
        mask = base / "ground_truth" / kind / f"{pathlib.Path(name).stem}_mask.png"
        Image.new("L", (32, 24), 255).save(mask)
    records = [
        r for r in LAYOUTS["mvtec_ad"].records(tmp_path, category, 0) if r.split == "test"
    ]
    maps = np.random.default_rng(0).random((4, 24, 32), np.float32)
    masks = [np.zeros((24, 32), bool) | bool(record.label) for record in records]
    scored = Scored(records, masks, maps, maps.max(axis=(1, 2)))
    path = tmp_path / "report.html"
    path.write_text(make_page(scored, category=category), encoding="utf-8")
    browser.get(path.as_uri())
    with pytest.raises(NoAlertPresentException):
        browser.switch_to.alert  # noqa: B018 (asks the browser)
    assert console(browser) == []
    assert (
        browser.execute_script("return document.querySelectorAll('iframe, svg[onload]').length")
        == 0
    )
    shown = {element.text for element in browser.find_elements(By.CSS_SELECTOR, ".card .file")}
    assert shown == set(names)
    kinds = {element.text for element in browser.find_elements(By.CSS_SELECTOR, ".card .kind")}
    assert kinds == {"good", kind}
    assert category in browser.find_element(By.TAG_NAME, "h1").text
    browser.find_element(By.CSS_SELECTOR, DEFECT).click()
    assert any(name in by_id(browser, "zoom-title").text for name in names)
    with pytest.raises(NoAlertPresentException):
        browser.switch_to.alert  # noqa: B018


def test_policy_keeps_a_script_that_got_in_from_running(browser, files):
    browser.get(files["run"])
    browser.execute_script(
        "const i = document.createElement('div'); i.innerHTML ="
        '\'<img src="https://example.invalid/x.png" onerror="window.hacked = 1">\';'
        "document.body.append(i); const s = document.createElement('script');"
        "s.textContent = 'window.hacked = 2'; document.body.append(s)"
    )
    assert browser.execute_script("return window.hacked") is None
    assert "Content Security Policy" in " ".join(console(browser))


@pytest.mark.parametrize("value", [0, 200, 431, 500, 517, 620, 800, 1000])
def test_slider_counts_what_numpy_counts(page, value):
    threshold = set_slider(page, value)
    assert counts(page) == expected_counts(threshold)
    assert cards(page) == expected_cards(threshold)


def test_rates_and_counts_by_type_follow(page):
    threshold = mixed_threshold(page)
    tp, fn, fp, tn = expected_counts(threshold)
    assert min(tp, fn, fp, tn) > 0
    for name, count, total in (("recall", tp, tp + fn), ("alarms", fp, fp + tn)):
        assert by_id(page, f"rate-{name}").text == share(count, total)
    assert by_id(page, "rate-precision").text == f"{100 * tp / (tp + fp):.1f} %"
    assert by_id(page, "rate-f1").text == f"{2 * tp / (2 * tp + fp + fn):.4f}"
    called = SCORED.scores >= threshold
    kinds = np.array([record.defect_type for record in SCORED.records])
    found = [e.text for e in page.find_elements(By.CSS_SELECTOR, "[data-found]")]
    assert [" ".join(text.split()) for text in found] == [
        share((called & (kinds == kind)).sum(), (kinds == kind).sum())
        for kind in ("crack", "hole")
    ]
    dot = by_id(page, "dot")
    assert float(dot.get_attribute("cx")[:-1]) == pytest.approx(100 * fp / (fp + tn))
    assert float(dot.get_attribute("cy")[:-1]) == pytest.approx(100 * fn / (tp + fn))


def test_threshold_typed_or_chosen_is_exact(browser, files, page):
    # At an image's own score, the image is called anomalous; just above, it is not.
    score = SCORED.scores[SCORED.labels].max()
    for value in (score, np.nextafter(score, np.float32(np.inf))):
        field = by_id(page, "threshold")
        field.clear()
        field.send_keys(repr(float(value)))
        assert counts(page) == expected_counts(float(value))
    page.find_element(By.CSS_SELECTOR, "[data-named='0']").click()
    best = measure(SCORED)["image_f1_threshold"]
    assert counts(page) == expected_counts(best)
    # With thresholds from normal images those come first.
    browser.get(files["calibrated"])
    assert counts(browser) == expected_counts(CALIBRATION.image_threshold)
    browser.find_element(By.CSS_SELECTOR, "[data-named='1']").click()
    assert counts(browser) == expected_counts(best)


def test_filters_filter(page):
    threshold = mixed_threshold(page)
    everything = expected_cards(threshold)
    kind, outcome = Select(by_id(page, "type")), Select(by_id(page, "outcome"))
    for option, verdicts in (
        ("errors", ("missed", "false alarm")),
        ("missed", ("missed",)),
        ("false alarm", ("false alarm",)),
        ("found", ("found",)),
        ("passed", ("passed",)),
    ):
        outcome.select_by_value(option)
        expected = [card for card in everything if card[2] in verdicts]
        assert cards(page) == expected
        assert expected
        total = len(everything)
        assert by_id(page, "shown").text == f"{len(expected)} of {total}"
    outcome.select_by_value("errors")
    kind.select_by_visible_text("hole (6)")
    errors = ("missed", "false alarm")
    assert cards(page) == [c for c in everything if c[1] == "hole" and c[2] in errors]
    # Filters hold while the threshold moves: all are found there.
    set_slider(page, 0)
    assert cards(page) == []
    assert by_id(page, "none").is_displayed()
    # A count is a filter as well.
    page.find_element(By.CSS_SELECTOR, "[data-filter='false alarm']").click()
    assert [card[1] for card in cards(page)] == 12 * ["good"]


def test_found_elsewhere(browser, files):
    """The counts of defects in place, the filter and the cards follow the threshold."""
    browser.get(files["elsewhere"])
    axis = np.linspace(ELSEWHERE.scores.min(), ELSEWHERE.scores.max(), 5)
    low, high = ends(browser)
    on_defect = np.array([place is True for place in IN_PLACE])
    off_defect = np.array([place is False for place in IN_PLACE])
    assert off_defect.sum() == 4
    for value in axis:
        threshold = set_slider(browser, round(1000 * (value - low) / (high - low)))
        called = ELSEWHERE.scores >= np.float32(threshold)
        total, found = int(ELSEWHERE.labels.sum()), int((called & on_defect).sum())
        assert by_id(browser, "rate-place").text == share(found, total)
        kinds = np.array([record.defect_type for record in ELSEWHERE.records])
        found = browser.find_elements(By.CSS_SELECTOR, "[data-place]")
        assert [" ".join(element.text.split()) for element in found] == [
            share((called & on_defect & (kinds == kind)).sum(), (kinds == kind).sum())
            for kind in ("crack", "hole")
        ]
        Select(by_id(browser, "outcome")).select_by_value("elsewhere")
        shown = cards(browser)
        assert sorted(score for score, *_ in shown) == sorted(
            ELSEWHERE.scores[called & off_defect].astype(float)
        )
        assert {verdict for *_, verdict in shown} <= {"found elsewhere"}
        Select(by_id(browser, "outcome")).select_by_value("found")
        assert len(cards(browser)) == (called & ELSEWHERE.labels).sum()
    assert console(browser) == []


def test_without_a_threshold_nothing_is_called_until_one_is_chosen(browser, files):
    dash = "\N{EN DASH}"
    browser.get(files["normal"])
    for name in ("found", "missed", "false-alarm", "passed"):
        assert by_id(browser, f"count-{name}").text == dash
    assert {verdict for *_, verdict in cards(browser)} == {""}
    set_slider(browser, 0)
    assert by_id(browser, "count-false-alarm").text == "5"
    assert by_id(browser, "count-passed").text == "0"
    assert by_id(browser, "count-missed").text == dash  # no anomalous image
    assert by_id(browser, "rate-alarms").text == share(5, 5)
    assert {verdict for *_, verdict in cards(browser)} == {"false alarm"}
    assert console(browser) == []


def test_a_zero_is_not_red(page):
    def colors() -> list[str]:
        return [
            by_id(page, f"count-{name}").value_of_css_property("color")
            for name in ("missed", "false-alarm", "passed")
        ]

    set_slider(page, 0)
    missed, alarms, passed = colors()
    assert missed == passed != alarms
    set_slider(page, 1000)
    missed, alarms, passed = colors()
    assert alarms == passed != missed


def test_orders_order(page):
    threshold, order = mixed_threshold(page), Select(by_id(page, "order"))
    scores = np.array([card[0] for card in cards(page)])
    order.select_by_value("low")
    assert [card[0] for card in cards(page)] == sorted(scores)
    order.select_by_value("near")
    distance = [abs(card[0] - threshold) for card in cards(page)]
    assert distance == sorted(distance)
    order.select_by_value("wrong")
    wrong = [c[0] - threshold if c[1] == "good" else threshold - c[0] for c in cards(page)]
    assert wrong == sorted(wrong, reverse=True)
    order.select_by_value("high")
    assert [card[0] for card in cards(page)] == sorted(scores, reverse=True)


def test_views_by_key_pointer_and_large(page):
    body = page.find_element(By.TAG_NAME, "body")
    # Where the pointer is over no image.
    ActionChains(page).move_to_element(page.find_element(By.TAG_NAME, "h1")).perform()
    for key, layers in (
        ("1", ["image"]),
        ("2", ["image", "heat"]),
        ("3", ["image", "mask"]),
        ("4", ["image", "lines"]),
    ):
        body.send_keys(key)
        assert shown_layers(page, DEFECT) == layers
    page.find_element(By.CSS_SELECTOR, "label:has(#view-image)").click()
    frame = page.find_element(By.CSS_SELECTOR, DEFECT)
    ActionChains(page).move_to_element(frame).perform()
    assert shown_layers(page, DEFECT) == ["image", "heat"]
    frame.click()
    for view, layers in (("heat", ["image", "heat"]), ("lines", ["image", "lines"])):
        assert shown_layers(page, f"#panels .view-{view}") == layers
    first = by_id(page, "zoom-title").text
    page.switch_to.active_element.send_keys(Keys.ARROW_RIGHT)
    assert by_id(page, "zoom-title").text != first
    page.switch_to.active_element.send_keys(Keys.ARROW_LEFT)
    assert by_id(page, "zoom-title").text == first
    page.switch_to.active_element.send_keys(Keys.ESCAPE)
    assert not by_id(page, "zoom").is_displayed()


def test_all_of_it_by_keyboard(page):
    slider = by_id(page, "slider")
    slider.send_keys(Keys.HOME)
    assert counts(page)[1] == counts(page)[3] == 0  # everything is called anomalous
    slider.send_keys(Keys.END)
    assert counts(page)[0] == counts(page)[2] == 0
    slider.send_keys(Keys.ARROW_LEFT)
    assert slider.get_attribute("value") == "999"
    # From the last control by Tab to the first image, by arrows to the next, back from large.
    by_id(page, "order").send_keys(Keys.TAB)
    focused = page.switch_to.active_element
    assert focused.get_attribute("className") == "frame"
    focused.send_keys(Keys.ARROW_RIGHT)
    second = page.switch_to.active_element
    assert second != focused
    second.send_keys(Keys.ENTER)
    assert by_id(page, "zoom").is_displayed()
    page.switch_to.active_element.send_keys(Keys.ARROW_RIGHT, Keys.ESCAPE)
    # The dialog gives the focus back when its event of closing comes.
    WebDriverWait(page, 5).until(
        lambda page: page.switch_to.active_element not in (focused, second)
    )
    assert page.switch_to.active_element.get_attribute("className") == "frame"


def test_dark_and_light_by_preference_and_by_button(browser, files):
    def background() -> int:
        color = browser.execute_script(
            "return getComputedStyle(document.documentElement).backgroundColor"
        )
        return int(color.partition("(")[2].partition(",")[0])

    def prefer(scheme: str) -> None:
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    for name in ("run", "sweep"):
        prefer("dark")
        browser.get(files[name])
        assert background() < 60
        by_id(browser, "theme").click()
        assert background() > 230
        prefer("light")
        browser.get(files[name])
        assert background() > 230
        by_id(browser, "theme").click()
        assert background() < 60
    assert console(browser) == []


def test_narrow_screens_need_no_sideways_scrolling(browser, files):
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": 360, "height": 740, "deviceScaleFactor": 1, "mobile": False},
    )
    try:
        for name in ("run", "hostile", "sweep"):
            browser.get(files[name])
            root = "document.documentElement"
            assert browser.execute_script(f"return {root}.scrollWidth == {root}.clientWidth")
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_reads_without_the_script(browser, files):
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        browser.get(files["calibrated"])
        assert counts(browser) == expected_counts(CALIBRATION.image_threshold)
        assert not by_id(browser, "slider").is_displayed()
        browser.find_element(By.CSS_SELECTOR, "label:has(#view-lines)").click()
        lines = browser.find_element(By.CSS_SELECTOR, f"{DEFECT} .lines")
        assert lines.is_displayed()
    finally:
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
