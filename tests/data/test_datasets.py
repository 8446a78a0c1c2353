"""Folder layouts -> records, on small made trees and on MVTec AD's bottle."""

import collections
import re
import shutil

import pytest
from trees import fails, listing, rows, write

from padim_jax.config import datasets
from padim_jax.data.layouts import LAYOUTS
from padim_jax.data.layouts import folder as folder_lib
from padim_jax.data.layouts.folder import folder
from padim_jax.data.layouts.mvtec_ad import mvtec_ad
from padim_jax.errors import UserError


@pytest.fixture
def mvtec(tmp_path):
    """MVTec AD's layout of one category, written in no particular order."""
    write(
        tmp_path,
        "nut/train/good/010.png",
        "nut/train/good/002.png",
        "nut/train/good/001.png",
        "nut/test/scratch/001.png",
        "nut/test/scratch/000.png",
        "nut/test/good/000.png",
        "nut/test/bent/000.png",
        "nut/ground_truth/bent/000_mask.png",
        "nut/ground_truth/scratch/000_mask.png",
        "nut/ground_truth/scratch/001_mask.png",
    )
    (tmp_path / "nut/license.txt").write_text("read in place, not an image")
    return tmp_path


def test_mvtec_ad_lists_splits_types_and_masks_in_order(mvtec):
    before = listing(mvtec)
    records = mvtec_ad(mvtec, "nut")
    assert rows(records) == [
        ("train", "good", 0, "nut/train/good/001.png", None),
        ("train", "good", 0, "nut/train/good/002.png", None),
        ("train", "good", 0, "nut/train/good/010.png", None),
        ("test", "bent", 1, "nut/test/bent/000.png", "000_mask.png"),
        ("test", "good", 0, "nut/test/good/000.png", None),
        ("test", "scratch", 1, "nut/test/scratch/000.png", "000_mask.png"),
        ("test", "scratch", 1, "nut/test/scratch/001.png", "001_mask.png"),
    ]
    assert all(r.image == mvtec / r.relative_path for r in records)
    # Masks of equal name lie in the folder of their own defect type.
    assert records[3].mask == mvtec / "nut/ground_truth/bent/000_mask.png"
    assert records[5].mask == mvtec / "nut/ground_truth/scratch/000_mask.png"
    assert listing(mvtec) == before  # read in place: nothing copied, nothing written


@pytest.mark.parametrize("layout", ["mvtec_ad", "folder"])
def test_hidden_and_other_files_are_no_images(tmp_path, layout):
    test = {"mvtec_ad": "test", "folder": "val"}[layout]
    write(tmp_path, "c/train/good/a.png", f"c/{test}/good/b.png")
    plain = LAYOUTS[layout].records(tmp_path, "c", 0)
    write(
        tmp_path,
        "c/train/good/._a.png",
        "c/train/good/.hidden.png",
        f"c/{test}/.cache/x.png",
        f"c/{test}/good/.b.png",
    )
    (tmp_path / "c/train/good/Thumbs.db").write_bytes(b"no image")
    (tmp_path / f"c/{test}/.DS_Store").write_bytes(b"no image")
    assert LAYOUTS[layout].records(tmp_path, "c", 0) == plain


def test_mvtec_ad_without_its_root(tmp_path):
    missing = tmp_path / "no_such"
    # It says where the data can be had and what it should look like.
    texts = ["config.dataset.root", missing, "https://www.mvtec.com", "bottle/train/good"]
    fails(texts, mvtec_ad, missing, "bottle")


def test_mvtec_ad_of_an_unknown_category(mvtec):
    write(mvtec, "washer/train/good/0.png", "notes/readme/0.png")
    with pytest.raises(UserError) as caught:
        mvtec_ad(mvtec, "nuts")
    message = str(caught.value)
    assert "config.category='nuts'" in message
    assert "did you mean 'nut'?" in message
    assert f"Categories found in {mvtec}: nut, washer" in message  # and not notes


def test_mvtec_ad_in_a_root_without_categories(tmp_path):
    fails(["did you mean 'bottle'?", tmp_path], mvtec_ad, tmp_path, "botle")
    with pytest.raises(UserError) as caught:
        mvtec_ad(tmp_path, "bottle")
    assert "did you mean" not in str(caught.value)  # 'bottle' is right; the root is not


def test_mvtec_ad_with_a_mask_missing(mvtec):
    mask = mvtec / "nut/ground_truth/scratch/001_mask.png"
    mask.unlink()
    fails([mask, mvtec / "nut/test/scratch/001.png"], mvtec_ad, mvtec, "nut")


@pytest.mark.parametrize("empty", ["train/good", "test/good", "test/bent", "test"])
def test_mvtec_ad_with_an_empty_split(mvtec, empty):
    place = mvtec / "nut" / empty
    for path in sorted(place.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    fails([f"{place}: holds no"], mvtec_ad, mvtec, "nut")
    place.rmdir()
    if empty == "train/good":  # which defects there are is the folders' to say
        fails([f"{place}: no such folder"], mvtec_ad, mvtec, "nut")


def test_mvtec_ad_without_test_images_can_be_fitted(mvtec):
    shutil.rmtree(mvtec / "nut" / "test")
    assert {record.split for record in mvtec_ad(mvtec, "nut")} == {"train"}


@pytest.mark.parametrize("place", ["train/good", "test/good", "test/bent"])
def test_images_deeper_down_are_not_left_out(mvtec, place):
    deeper = mvtec / "nut" / place / "day2"
    deeper.mkdir()
    (deeper / "notes.txt").touch()
    mvtec_ad(mvtec, "nut")
    write(deeper, "001.png")
    fails([f"{deeper}: holds images"], mvtec_ad, mvtec, "nut")


def test_mvtec_ad_of_bottle(shared):
    records = mvtec_ad(shared / "data/mvtec_ad", "bottle")
    assert [r.split for r in records] == ["train"] * 209 + ["test"] * 83
    test = records[209:]
    assert collections.Counter(r.defect_type for r in test) == {
        "broken_large": 20,
        "broken_small": 22,
        "contamination": 21,
        "good": 20,
    }
    assert sum(r.mask is not None for r in records) == 63
    assert all((r.mask is None) == (r.label == 0) == (r.defect_type == "good") for r in records)
    assert all(r.image.is_file() and (r.mask is None or r.mask.is_file()) for r in records)
    assert len({r.relative_path for r in records}) == 292


def test_folder_lists_good_and_every_defect_type(tmp_path):
    write(
        tmp_path,
        "train/good/b.png",
        "train/good/a.png",
        "val/good/c.png",
        "val/bad/d.png",
        "val/torn edge/e.png",
        "masks/torn edge/e.png",
    )
    before = listing(tmp_path)
    records = folder(tmp_path)
    assert rows(records) == [
        ("train", "good", 0, "train/good/a.png", None),
        ("train", "good", 0, "train/good/b.png", None),
        ("test", "bad", 1, "val/bad/d.png", None),
        ("test", "good", 0, "val/good/c.png", None),
        ("test", "torn edge", 1, "val/torn edge/e.png", "e.png"),
    ]
    assert records[-1].mask == tmp_path / "masks/torn edge/e.png"
    assert all(r.image == tmp_path / r.relative_path for r in records)
    assert listing(tmp_path) == before


@pytest.mark.parametrize("suffix", ["png", "jpg", "jpeg", "bmp", "tif", "tiff", "webp"])
def test_folder_takes_each_format_in_any_case(tmp_path, suffix):
    names = {f"a.{suffix}", f"b.{suffix.upper()}", f"c.{suffix.capitalize()}"}
    write(tmp_path, *(f"train/good/{name}" for name in names))
    assert {r.image.name for r in folder(tmp_path)} == names


def test_folder_pairs_masks_by_name(tmp_path):
    write(
        tmp_path,
        "train/good/a.png",
        "val/bad/1.jpg",
        "val/bad/2.JPG",
        "val/bad/10.png",
        "val/dent/1.png",
        "masks/bad/1_mask.png",
        "masks/bad/2.bmp",
        "masks/bad/10.png",
        "masks/dent/1.png",
    )
    masks = {r.relative_path: r.mask for r in folder(tmp_path)}
    assert masks == {
        "train/good/a.png": None,
        "val/bad/1.jpg": tmp_path / "masks/bad/1_mask.png",
        "val/bad/2.JPG": tmp_path / "masks/bad/2.bmp",
        "val/bad/10.png": tmp_path / "masks/bad/10.png",
        "val/dent/1.png": tmp_path / "masks/dent/1.png",
    }


@pytest.mark.parametrize("name", ["normal", "OK", "Good", "Okay", "PASSED", "Defect-free"])
def test_folder_knows_the_usual_names_of_good_images(tmp_path, name):
    write(tmp_path, f"train/{name}/a.png", f"val/{name}/b.png", "val/bad/c.png")
    write(tmp_path, "train/defective/d.png")
    records = folder(tmp_path)
    assert sorted(rows(records)) == [
        ("test", "bad", 1, "val/bad/c.png", None),
        ("test", "good", 0, f"val/{name}/b.png", None),
        ("train", "good", 0, f"train/{name}/a.png", None),
    ]
    expected = f"folders of good images: train/{name}, val/{name}; of defects: val/bad"
    assert folder_lib.summary(
        sorted(records, key=lambda record: record.split, reverse=True)
    ) == (expected)


def test_folder_reads_all_folders_of_good_images(tmp_path):
    write(tmp_path, "train/good/a.png", "train/OK/a.png", "val/good/b.png", "val/OK/b.png")
    write(tmp_path, "val/not ok/c.png", "masks/OK/b.png", "masks/not ok/c.png")
    assert rows(folder(tmp_path)) == [
        ("train", "good", 0, "train/OK/a.png", None),
        ("train", "good", 0, "train/good/a.png", None),
        ("test", "good", 0, "val/OK/b.png", None),
        ("test", "good", 0, "val/good/b.png", None),
        ("test", "not ok", 1, "val/not ok/c.png", "c.png"),
    ]


def test_folder_without_a_folder_of_good_images(tmp_path):
    write(tmp_path, "train/parts/a.png")
    fails(
        [tmp_path / "train/good", "no such folder", "parts", "good, normal"], folder, tmp_path
    )


@pytest.mark.parametrize("name", ["masks", "mask", "Mask", "ground_truth", "Ground Truth"])
def test_folder_finds_masks_by_their_usual_names(tmp_path, name):
    write(tmp_path, "train/good/a.png", "val/bad/b.png", f"{name}/bad/b_mask.png")
    assert folder(tmp_path)[-1].mask == tmp_path / name / "bad/b_mask.png"


def test_folder_with_masks_that_are_ambiguous(tmp_path):
    write(tmp_path, "train/good/a.png", "val/bad/b.png")
    write(tmp_path, "mask/bad/b.png", "ground_truth/bad/b.png")
    fails([tmp_path, "2 folders of masks", "ground_truth, mask"], folder, tmp_path)
    shutil.rmtree(tmp_path / "mask")
    (tmp_path / "ground_truth").rename(tmp_path / "val/ground_truth")
    fails([tmp_path / "val/ground_truth", "folder of masks"], folder, tmp_path)


def test_folder_with_a_category_reads_below_it_only(tmp_path):
    write(tmp_path, "cap/train/good/a.png", "cap/val/bad/b.png", "cap/masks/bad/b.png")
    write(tmp_path, "lid/train/good/z.png", "train/good/y.png")
    assert rows(folder(tmp_path, "cap")) == [
        ("train", "good", 0, "cap/train/good/a.png", None),
        ("test", "bad", 1, "cap/val/bad/b.png", "b.png"),
    ]
    assert rows(folder(tmp_path)) == [("train", "good", 0, "train/good/y.png", None)]


def test_folder_without_val_is_for_fitting_only(tmp_path):
    write(tmp_path, "train/good/a.png", "train/good/b.png")
    assert [r.split for r in folder(tmp_path)] == ["train", "train"]


@pytest.mark.parametrize(
    ("masks", "said"),
    [
        (["1.png"], r"no mask for 2\.png, 3\.png\."),
        (["1.png", "2.png", "3.png", "4_mask.png"], r"no image for 4_mask\.png\."),
        (["1.png", "2.png", "4.png"], r"no mask for 3\.png; no image for 4\.png\."),
        (["1.png", "2.png", "3.png", "1_mask.png"], r"more than one mask for 1\.png\."),
        (["1.png", "2.png", "3.png", "3.bmp"], r"more than one mask for 3\.png\."),
    ],
)
def test_folder_with_masks_for_some_images_only(tmp_path, masks, said):
    write(tmp_path, "train/good/a.png", "val/bad/1.png", "val/bad/2.png", "val/bad/3.png")
    write(tmp_path, *(f"masks/bad/{name}" for name in masks))
    with pytest.raises(UserError) as caught:
        folder(tmp_path)
    assert str(caught.value).startswith(str(tmp_path / "masks/bad"))
    assert re.search(said, str(caught.value))


def test_folder_with_one_mask_for_two_images(tmp_path):
    # a.png and a.jpg would both be scored against the mask of one of them.
    write(tmp_path, "train/good/x.png", "val/bad/a.png", "val/bad/a.jpg", "masks/bad/a.png")
    fails([tmp_path / "masks/bad", "more than one image for a.png"], folder, tmp_path)


def test_folder_names_only_a_few_of_many_missing_masks(tmp_path):
    write(tmp_path, "train/good/x.png", "masks/bad/00.png")
    write(tmp_path, *(f"val/bad/{number:02}.png" for number in range(40)))
    fails(["no mask for 01.png, 02.png", "and 34 more"], folder, tmp_path)


def test_folder_with_masks_or_images_in_the_wrong_place(tmp_path):
    write(tmp_path, "train/good/a.png", "val/bad/b.png", "masks/b.png")
    fails([tmp_path / "masks/b.png", tmp_path / "masks/bad/b.png"], folder, tmp_path)
    (tmp_path / "masks/b.png").unlink()
    write(tmp_path, "masks/broken/b.png")
    fails([tmp_path / "masks/broken", "bad"], folder, tmp_path)
    (tmp_path / "masks/broken/b.png").unlink()
    (tmp_path / "masks/broken").rmdir()
    write(tmp_path, "val/c.png")
    fails([tmp_path / "val/c.png", tmp_path / "val/bad/c.png"], folder, tmp_path)


def test_folder_with_something_missing_or_empty(tmp_path):
    fails(["config.dataset.root", tmp_path / "x", "train/good"], folder, tmp_path / "x")
    fails(["config.category='x'", tmp_path / "x", "train/good"], folder, tmp_path, "x")
    fails([f"{tmp_path / 'train/good'}: no such folder"], folder, tmp_path)
    (tmp_path / "train/good").mkdir(parents=True)
    fails([f"{tmp_path / 'train/good'}: holds no image", ".png"], folder, tmp_path)
    write(tmp_path, "train/good/a.png")
    (tmp_path / "val").mkdir()
    fails([f"{tmp_path / 'val'}: holds no folder"], folder, tmp_path)
    (tmp_path / "val/bad").mkdir()
    fails([f"{tmp_path / 'val/bad'}: holds no image"], folder, tmp_path)
    write(tmp_path, "val/bad/b.png")
    assert len(folder(tmp_path)) == 2


def test_folder_given_a_file(tmp_path):
    write(tmp_path, "train/good/a.png")
    path = tmp_path / "train/good/a.png"
    fails(["config.dataset.root", path], folder, path)
    (tmp_path / "val").write_text("")
    fails([f"{tmp_path / 'val'}: is not a folder"], folder, tmp_path)


def test_the_configuration_knows_every_layout():
    assert tuple(LAYOUTS) == datasets.LAYOUTS
