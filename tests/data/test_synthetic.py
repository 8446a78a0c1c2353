"""The synthetic category: what is drawn, and what is done to the disk."""

import concurrent.futures
import dataclasses
import hashlib
import importlib
import json
import math
import pathlib
import threading

import numpy as np
import pytest
from PIL import Image

from padim_jax.data.layouts.synthetic import generate, synthetic
from padim_jax.data.synthetic_part import (
    BORE,
    DEFECTS,
    PLUG,
    Defect,
    Scene,
    Scratch,
    changed,
    draw_defect,
    draw_scene,
    photograph,
    render,
)
from padim_jax.errors import UserError

# The package's attribute of this name is the function.
module = importlib.import_module("padim_jax.data.layouts.synthetic")

FEW = {"n_train": 2, "n_test_good": 1, "n_test_per_defect": 1, "size": 64}

STRAIGHT = Scene(
    x=0.0,
    y=0.0,
    angle=0.0,
    screw_angles=(0.0, 0.0, 0.0, 0.0),
    grain_seed=0,
    light_azimuth=math.radians(-130),
    gain=1.0,
    gradient=(0.0, 0.0),
    vignette=0.1,
    sheen=0.0,
)


def contents(folder: pathlib.Path) -> dict[str, str]:
    """Every file below a folder, hidden ones included, and its bytes' digest."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def pixels(path: pathlib.Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def refuse(*_):
    raise AssertionError("nothing should be drawn")


# ---------------------------------------------------------------- pictures and masks


def test_mask_is_where_the_image_differs_from_its_good_twin(tmp_path, monkeypatch):
    few = FEW | {"n_test_per_defect": 3, "size": 128}
    folder = generate(tmp_path / "defective", **few)

    def good(kind, rng, size):
        return photograph("good", rng, size)

    # The same random numbers without the defect: the same part, light and noise.
    monkeypatch.setattr(module, "photograph", good)
    twins = generate(tmp_path / "good", **few)

    for kind in DEFECTS:
        for n in range(3):
            image = pixels(folder / f"test/{kind}/{n:03d}.png").astype(int)
            twin = pixels(twins / f"test/{kind}/{n:03d}.png").astype(int)
            mask = pixels(folder / f"ground_truth/{kind}/{n:03d}_mask.png")
            assert mask.dtype == np.uint8
            assert mask.shape == (128, 128)
            assert set(np.unique(mask)) == {0, 255}
            difference = np.abs(image - twin).max(-1)
            # 8 levels, give or take one for rounding and one for the noise, whose
            # strength goes with brightness.
            assert difference[mask == 0].max() <= 10
            saturated = (image == 255).any(-1) | (twin == 255).any(-1)
            assert difference[(mask == 255) & ~saturated].min() >= 6
            assert 0.0005 < (mask == 255).mean() < 0.1
    for split in ("train", "test"):
        for path in (folder / split / "good").iterdir():
            twin = twins / path.relative_to(folder)
            np.testing.assert_array_equal(pixels(path), pixels(twin))


@pytest.mark.parametrize("kind", DEFECTS)
def test_masks_of_many_defects_have_a_sensible_area(kind):
    areas = [photograph(kind, np.random.default_rng(n), 96)[1].mean() for n in range(20)]
    assert min(areas) > 0.0005
    assert max(areas) < 0.1
    assert max(areas) > 1.3 * min(areas)  # severity varies


def test_a_missing_plug_changes_its_place_only():
    size = 320  # a pixel is a unit
    mask = changed(
        render(STRAIGHT, Defect(), size), render(STRAIGHT, Defect(missing=("plug",)), size)
    )
    y, x = np.mgrid[:size, :size] + 0.5 - size / 2
    away = np.hypot(x - PLUG[0], y - PLUG[1])
    assert mask[away < 10].mean() > 0.95
    assert not mask[away > 25].any()  # the radius of 11 and the shadow's length


def test_a_misplaced_plug_marks_the_place_left_and_the_place_taken():
    size = 320
    moved = Defect(moved={"plug": (20.0, -15.0, 0.0)})
    mask = changed(render(STRAIGHT, Defect(), size), render(STRAIGHT, moved, size))
    y, x = np.mgrid[:size, :size] + 0.5 - size / 2
    left = np.hypot(x - PLUG[0], y - PLUG[1])
    taken = np.hypot(x - PLUG[0] - 20, y - PLUG[1] + 15)
    assert mask[left < 10].mean() > 0.95
    assert mask[taken < 10].mean() > 0.95
    assert not mask[(left > 25) & (taken > 25)].any()


@pytest.mark.parametrize("size", [160, 320])
def test_a_defect_moves_and_turns_with_the_part(size):
    angle = math.radians(20)
    scene = dataclasses.replace(STRAIGHT, x=12.0, y=-7.0, angle=angle)
    defect = Defect(missing=("plug",))
    mask = changed(render(scene, Defect(), size), render(scene, defect, size))
    y, x = np.nonzero(mask)
    scale = size / 320
    x, y = (x + 0.5) / scale - 160, (y + 0.5) / scale - 160
    expected_x = math.cos(angle) * PLUG[0] - math.sin(angle) * PLUG[1] + 12
    expected_y = math.sin(angle) * PLUG[0] + math.cos(angle) * PLUG[1] - 7
    # The plug's own shadow pulls the centroid by a fraction of its length.
    assert math.hypot(x.mean() - expected_x, y.mean() - expected_y) < 2


def test_a_scratch_spares_the_holes_and_the_mat():
    # From the bore's middle across the plate and off its left edge.
    points = ((-58.0, -14.0), (-105.0, -14.0), (-152.0, -14.0))
    scratch = Scratch(points=points, width=1.5, strength=1.0)
    good = render(STRAIGHT, Defect(), 320)
    mask = changed(good, render(STRAIGHT, Defect(scratches=(scratch,)), 320))
    x = np.arange(320) + 0.5 - 160
    marked = mask.any(0)
    assert marked[(x > -125) & (x < -82)].mean() > 0.9
    assert not marked[(x < -134) | (x > -58 - BORE + 2)].any()


def test_every_way_to_fail_is_drawn():
    defects = {
        kind: [draw_defect(kind, np.random.default_rng(n)) for n in range(60)]
        for kind in DEFECTS
    }
    missing = {name for defect in defects["missing_piece"] for name in defect.missing}
    assert missing == {"plug", "screw0", "screw1", "screw2", "screw3"}
    assert any(defect.chips for defect in defects["missing_piece"])
    moved = {name for defect in defects["misplaced_part"] for name in defect.moved}
    assert moved == {"connector", "label", "plug"}
    assert all(defect.scratches for defect in defects["scratch"])
    assert all(defect.stains for defect in defects["stain"])
    with pytest.raises(ValueError, match="dent"):
        draw_defect("dent", np.random.default_rng(0))


def test_good_images_vary_in_more_than_noise_yet_show_the_same_part():
    images = [photograph("good", np.random.default_rng(n), 128)[0] for n in range(5)]
    # Means over 8 x 8 pixels: noise of about 2 levels leaves a quarter of a level.
    means = [image.reshape(16, 8, 16, 8, 3).mean((1, 3)) for image in images]
    for n in range(5):
        for m in range(n):
            assert np.abs(means[n] - means[m]).max() > 5
            assert np.abs(means[n] - means[m]).mean() < 20


def test_drawing_leaves_no_trace_on_the_next():
    scene = draw_scene(np.random.default_rng(3))
    good = render(scene, Defect(), 64)
    render(scene, Defect(missing=("plug",), moved={"label": (5.0, 5.0, 0.2)}), 64)
    np.testing.assert_array_equal(render(scene, Defect(), 64), good)


# ---------------------------------------------------------------- the folder


def test_layout_and_records(tmp_path, monkeypatch):
    generate(tmp_path, **FEW)
    monkeypatch.setattr(module, "generate", lambda root: generate(root, **FEW))
    records = synthetic(tmp_path, "part")
    assert [record.relative_path for record in records] == [
        "part/train/good/000.png",
        "part/train/good/001.png",
        "part/test/good/000.png",
        "part/test/misplaced_part/000.png",
        "part/test/missing_piece/000.png",
        "part/test/scratch/000.png",
        "part/test/stain/000.png",
    ]
    for record in records:
        image = pixels(pathlib.Path(record.image))
        assert image.dtype == np.uint8
        assert image.shape == (64, 64, 3)
        assert (record.mask is not None) == (record.label == 1)


def test_draws_what_is_not_there_and_names_the_category(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        module, "generate", lambda root: asked.append(root) or generate(root, **FEW)
    )
    with pytest.raises(UserError, match=r"config\.category='bottle'.*'part'"):
        synthetic(tmp_path, "bottle")
    assert not asked
    assert len(synthetic(tmp_path / "new" / "root", "part")) == 7


def test_same_seed_same_bytes_other_seed_other_images(tmp_path):
    first = contents(generate(tmp_path / "a", seed=5, **FEW))
    assert first == contents(generate(tmp_path / "b", seed=5, **FEW))
    other = contents(generate(tmp_path / "c", seed=6, **FEW))
    assert first.keys() == other.keys()
    assert all(first[name] != other[name] for name in first)
    # No image twice: train, test and the kinds of defect draw from streams of their own.
    assert len(set(first.values())) == len(first)


def test_an_image_does_not_depend_on_how_many_there_are(tmp_path):
    few = contents(generate(tmp_path / "few", **FEW))
    more = contents(generate(tmp_path / "more", **(FEW | {"n_train": 4, "n_test_good": 2})))
    del few["synthetic.json"]
    assert few.items() < more.items()


def test_finished_work_is_reused(tmp_path, monkeypatch):
    folder = generate(tmp_path, **FEW)
    before = contents(folder)
    (folder / "train/good/.thumbnails").write_text("a file browser's")
    monkeypatch.setattr(module, "photograph", refuse)
    assert generate(tmp_path, **FEW) == folder
    assert (folder / "train/good/.thumbnails").exists()
    assert before.items() < contents(folder).items()


@pytest.mark.parametrize("change", [{"seed": 1}, {"n_train": 1}, {"size": 72}, {}])
def test_other_arguments_or_version_replace_all(tmp_path, monkeypatch, change):
    folder = generate(tmp_path, **FEW)
    if not change:
        monkeypatch.setattr(module, "VERSION", module.VERSION + 1)
    before = contents(folder)
    generate(tmp_path, **(FEW | change))
    assert contents(folder) != before
    assert contents(folder) == contents(generate(tmp_path / "fresh", **(FEW | change)))
    assert {path.name for path in tmp_path.iterdir()} == {"part", "fresh", ".locks"}


@pytest.mark.parametrize("damage", ["deleted", "emptied"])
def test_an_incomplete_folder_is_made_anew(tmp_path, damage):
    folder = generate(tmp_path, **FEW)
    before = contents(folder)
    victim = folder / "ground_truth/stain/000_mask.png"
    if damage == "deleted":
        victim.unlink()
    else:
        victim.write_bytes(b"")
    generate(tmp_path, **FEW)
    assert contents(folder) == before


@pytest.mark.parametrize(
    "marker", [None, "", "[]", "{}", '{"generator": "another", "files": []}']
)
def test_a_folder_of_somebody_elses_is_left_alone(tmp_path, marker):
    folder = tmp_path / "part"
    (folder / "train").mkdir(parents=True)
    (folder / "train/mine.png").write_bytes(b"precious")
    if marker is not None:
        (folder / "synthetic.json").write_text(marker)
    before = contents(tmp_path)
    with pytest.raises(UserError, match="left alone") as error:
        generate(tmp_path, **FEW)
    assert str(folder) in str(error.value)
    assert contents(tmp_path) == before


def test_what_somebody_added_is_not_thrown_away(tmp_path):
    folder = generate(tmp_path, **FEW)
    (folder / "train/good/mine.png").write_bytes(b"precious")
    before = contents(tmp_path)
    with pytest.raises(UserError, match=r"train/good/mine\.png"):
        generate(tmp_path, seed=1, **FEW)
    assert contents(tmp_path) == before


def failing(after: int):
    """Stands in for photograph: breaks down after some images."""
    calls = iter(range(after))

    def photograph_or_fail(kind, rng, size):
        if next(calls, None) is None:
            raise RuntimeError("power cut")
        return photograph(kind, rng, size)

    return photograph_or_fail


def test_a_crash_leaves_nothing_that_passes_for_finished(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(module, "photograph", failing(after=3))
        with pytest.raises(RuntimeError, match="power cut"):
            generate(tmp_path, **FEW)
    assert [path.name for path in tmp_path.iterdir()] == [".locks"]
    assert len(contents(generate(tmp_path, **FEW))) == 12  # 7 images, 4 masks, marker


def test_a_crash_while_replacing_keeps_the_old(tmp_path, monkeypatch):
    folder = generate(tmp_path, **FEW)
    before = contents(tmp_path)
    monkeypatch.setattr(module, "photograph", failing(after=3))
    with pytest.raises(RuntimeError, match="power cut"):
        generate(tmp_path, seed=1, **FEW)
    assert contents(tmp_path) == before
    assert json.loads((folder / "synthetic.json").read_text())["seed"] == 0


def test_an_unfinished_folder_of_a_killed_process_is_no_category(tmp_path, monkeypatch):
    """What a kill leaves behind is hidden, and does not stand in the way."""
    seen = []

    def look(kind, rng, size):
        seen.extend(path.name for path in tmp_path.iterdir())
        return photograph(kind, rng, size)

    monkeypatch.setattr(module, "photograph", look)
    generate(tmp_path, **FEW)
    assert seen
    assert all(name.startswith(".") for name in seen)


def test_two_processes_at_once(tmp_path, monkeypatch, capsys):
    """The slower one waits for the faster one's work and keeps it."""
    begun, drawn, others = threading.Event(), [], []

    def second():
        begun.wait()
        return generate(tmp_path, **FEW)

    def look(kind, rng, size):
        drawn.append(kind)
        begun.set()
        others.append(next(tmp_path.glob(".locks/part.json"), None))
        return photograph(kind, rng, size)

    monkeypatch.setattr(module, "photograph", look)
    with concurrent.futures.ThreadPoolExecutor() as threads:
        other = threads.submit(second)
        folder = generate(tmp_path, **FEW)
        assert other.result() == folder
    assert all(others)  # who is at it is told
    count = len(drawn)
    assert contents(folder) == contents(generate(tmp_path / "alone", **FEW))
    assert len(drawn) == 2 * count


def test_what_killed_processes_left_is_removed(tmp_path):
    (tmp_path / ".part-abc" / "new").mkdir(parents=True)
    folder = generate(tmp_path, **FEW)
    assert sorted(tmp_path.iterdir()) == [tmp_path / ".locks", folder]
    assert [path.name for path in (tmp_path / ".locks").iterdir()] == ["part.lock"]


def test_a_root_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(UserError, match=r"config\.dataset\.root=.*file"):
        generate(tmp_path / "file", **FEW)


@pytest.mark.parametrize("wrong", [{"n_train": 0}, {"size": 32}, {"seed": -1}])
def test_arguments_out_of_range(tmp_path, wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        generate(tmp_path, **(FEW | wrong))
    assert list(tmp_path.iterdir()) == []
