"""The published layouts -> records, on small made copies; what a wrong copy is told."""

import io
import pathlib
import random

import numpy as np
import pytest
from PIL import Image
from trees import fails, listing, rows, write

from padim_jax.config import defaults
from padim_jax.config import settings as config
from padim_jax.data import dataset_splits, masks, packing
from padim_jax.data.input_pipeline import FolderSource
from padim_jax.data.layouts import LAYOUTS
from padim_jax.data.records import Record
from padim_jax.errors import DataWarning, UserError
from padim_jax.runs import train


def records(name: str, root: pathlib.Path, category: str, seed: int = 0) -> list[Record]:
    return LAYOUTS[name].records(root, category, seed)


def of_dataset(name: str, root: pathlib.Path, category: str) -> config.Config:
    values = defaults.get_config()
    settings = {"dataset.name": name, "dataset.root": str(root), "category": category}
    values.update_from_flattened_dict(settings)
    return config.validate(values)


def draw_mask(path: pathlib.Path, *defects: tuple[int, int], value: int = 255) -> None:
    """Writes a mask of 4x4 pixels with those of `defects` (row, column) set."""
    pixels = np.zeros((4, 4), np.uint8)
    for place in defects:
        pixels[place] = value
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def save_npy(path: pathlib.Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, array)


def draw_loco(root: pathlib.Path) -> None:
    write(
        root,
        "pushpins/train/good/001.png",
        "pushpins/train/good/000.png",
        "pushpins/validation/good/000.png",
        "pushpins/test/structural_anomalies/000.png",
        "pushpins/test/good/000.png",
        "pushpins/test/logical_anomalies/001.png",
        "pushpins/test/logical_anomalies/000.png",
    )
    masks_ = root / "pushpins/ground_truth"
    draw_mask(masks_ / "logical_anomalies/000/000.png", (0, 0), value=250)
    draw_mask(masks_ / "logical_anomalies/000/001.png", (3, 3), value=248)
    draw_mask(masks_ / "logical_anomalies/001/000.png", (1, 2))
    draw_mask(masks_ / "structural_anomalies/000/000.png", (2, 2))
    (root / "pushpins/defects_config.json").write_text("[]")


def draw_3d(root: pathlib.Path) -> None:
    write(
        root,
        "bagel/train/good/rgb/000.png",
        "bagel/validation/good/rgb/000.png",
        "bagel/test/good/rgb/000.png",
        "bagel/test/good/gt/000.png",
        "bagel/test/hole/rgb/001.png",
        "bagel/test/hole/rgb/000.png",
        "bagel/test/hole/gt/000.png",
        "bagel/test/hole/gt/001.png",
    )
    for place in ("train/good", "validation/good", "test/good", "test/hole"):
        (root / "bagel" / place / "xyz").mkdir()
        (root / "bagel" / place / "xyz/000.tiff").write_bytes(b"a point cloud")


def draw_ad_2(root: pathlib.Path) -> None:
    write(
        root,
        "can/train/good/000_regular.png",
        "can/validation/good/000_regular.png",
        "can/test_public/good/000_regular.png",
        "can/test_public/bad/000_regular.png",
        "can/test_public/bad/000_overexposed.png",
        "can/test_public/ground_truth/bad/000_regular_mask.png",
        "can/test_public/ground_truth/bad/000_overexposed_mask.png",
        "can/test_private/000_regular.png",
        "can/test_private_mixed/000_mixed.png",
    )


def draw_btad(root: pathlib.Path) -> None:
    write(
        root,
        "01/train/ok/0000.bmp",
        "01/test/ok/0000.bmp",
        "01/test/ko/0001.bmp",
        "01/test/ko/0000.bmp",
        "01/ground_truth/ko/0000.png",
        "01/ground_truth/ko/0001.png",
        "03/train/ok/0000.bmp",
        "03/test/ok/0000.bmp",
        "03/test/ko/0000.bmp",
        "03/ground_truth/ko/0000.bmp",
    )


def draw_mpdd(root: pathlib.Path) -> None:
    write(
        root,
        "tubes/train/good/000.png",
        "tubes/test/good/000.png",
        "tubes/test/anomalous/000.png",
        "tubes/ground_truth/anomalous/000_mask.png",
    )


VISA_TABLE = """object,split,label,image,mask
pcb1,test,anomaly,pcb1/Data/Images/Anomaly/000.JPG,pcb1/Data/Masks/Anomaly/000.png
pcb1,train,normal,pcb1/Data/Images/Normal/0002.JPG,
pcb1,train,normal,pcb1/Data/Images/Normal/0000.JPG,
pcb1,test,normal,pcb1/Data/Images/Normal/0001.JPG,
candle,train,normal,candle/Data/Images/Normal/0000.JPG,
candle,test,anomaly,candle/Data/Images/Anomaly/000.JPG,candle/Data/Masks/Anomaly/000.png
"""


def draw_visa(root: pathlib.Path) -> None:
    for row in VISA_TABLE.splitlines()[1:]:
        write(root, *filter(None, row.split(",")[3:]))
    (root / "split_csv").mkdir()
    (root / "split_csv/1cls.csv").write_text(VISA_TABLE)


def draw_ksdd2(root: pathlib.Path) -> None:
    # 10001 and 20000 have a defect; of 10002 it is one pixel.
    for name, defects in {
        "train/10000": (),
        "train/10001": ((1, 1), (1, 2)),
        "train/10002": ((3, 0),),
        "train/10301": (),
        "test/20000": ((0, 3),),
        "test/20001": (),
    }.items():
        write(root, f"{name}.png")
        draw_mask(root / f"{name}_GT.png", *defects)
    write(root, "train/10301 (copy).png")
    draw_mask(root / "train/10301_GT (copy).png")


STC_LABELS = {"01_0014": [0, 0, 1, 1, 0], "01_0015": [0, 0], "02_0128": [1]}


def draw_stc(root: pathlib.Path) -> None:
    # Written, and sorted as text, in another order than that of their numbers.
    write(root, *(f"training/frames/01_001/{n}.jpg" for n in ("1000", "999", "998")))
    write(root, "training/frames/01_002/000.jpg", "training/frames/02_001/000.jpg")
    write(root, "training/frames/13_001/000.jpg")
    testing = root / "testing"
    for video, labels in STC_LABELS.items():
        write(testing, *(f"frames/{video}/{n:03}.jpg" for n in range(len(labels))))
        save_npy(testing / f"test_frame_mask/{video}.npy", np.array(labels, np.int8))
        pixels = np.zeros((len(labels), 4, 4), np.uint8)
        for number, label in enumerate(labels):  # the row says which frame's it is
            pixels[number, number % 4] = label
        save_npy(testing / f"test_pixel_mask/{video}.npy", pixels)


TILES = ("MT_Blowhole", "MT_Break", "MT_Crack", "MT_Fray", "MT_Uneven")


def draw_tiles(root: pathlib.Path) -> None:
    for number in range(10):
        write(
            root, f"MT_Free/Imgs/exp1_num_{number}.jpg", f"MT_Free/Imgs/exp1_num_{number}.png"
        )
    for name in TILES:
        write(root, f"{name}/Imgs/b.jpg", f"{name}/Imgs/a.jpg")
        draw_mask(root / name / "Imgs/a.png", (0, 0))
        draw_mask(root / name / "Imgs/b.png", (1, 1))


DRAWN = {
    "mvtec_loco": (draw_loco, "pushpins"),
    "mvtec_3d_ad": (draw_3d, "bagel"),
    "mvtec_ad_2": (draw_ad_2, "can"),
    "btad": (draw_btad, "01"),
    "mpdd": (draw_mpdd, "tubes"),
    "visa": (draw_visa, "pcb1"),
    "ksdd2": (draw_ksdd2, ""),
    "stc": (draw_stc, "01"),
    "magnetic_tile": (draw_tiles, ""),
}
layouts = pytest.mark.parametrize("name", DRAWN)


@layouts
def test_records_hold_what_every_layout_promises(name, tmp_path):
    draw, category = DRAWN[name]
    draw(tmp_path)
    before = listing(tmp_path)
    found = records(name, tmp_path, category)
    assert listing(tmp_path) == before  # read in place
    assert {r.split for r in found} >= {"train", "test"}
    for r in found:
        assert r.image == tmp_path / r.relative_path
        assert (r.label == 0) == (r.defect_type == "good")
        assert r.split == "test" or r.label == 0  # only normal images are fitted
        assert (r.mask is not None) == (r.label == 1)
        if r.mask is not None:
            image = masks.decode(masks.read(r) or b"", "a mask")
            assert image.shape == (4, 4)
    assert len({r.relative_path for r in found}) == len(found)
    # In order of the splits.
    order = ["train", "validation", "test"]
    assert [r.split for r in found] == sorted((r.split for r in found), key=order.index)
    assert category in LAYOUTS[name].categories(tmp_path)
    assert LAYOUTS[name].folder(tmp_path, category).is_dir()
    assert LAYOUTS[name].unused(tmp_path, category) == []


@layouts
def test_a_missing_root_is_told_with_the_source_of_the_data(name, tmp_path):
    _, category = DRAWN[name]
    missing = tmp_path / "no_such"
    fails([f"config.dataset.root={missing}", "https://"], records, name, missing, category)
    fails([f"config.dataset.root={missing}"], LAYOUTS[name].categories, missing)
    assert not missing.exists()


@layouts
def test_a_root_without_the_data(name, tmp_path):
    fails([tmp_path], records, name, tmp_path, DRAWN[name][1])
    fails([tmp_path], LAYOUTS[name].categories, tmp_path)


@layouts
def test_hidden_and_other_files_are_no_images(name, tmp_path):
    draw, category = DRAWN[name]
    draw(tmp_path)
    before = records(name, tmp_path, category)
    for folder in {(tmp_path / r.relative_path).parent for r in before}:
        (folder / ".DS_Store").write_bytes(b"no image")
        (folder / "Thumbs.db").write_bytes(b"no image")
        write(folder, "._a.png")
    assert records(name, tmp_path, category) == before


@layouts
def test_packed_is_the_same(name, tmp_path):
    draw, category = DRAWN[name]
    draw(tmp_path / "data")
    found = records(name, tmp_path / "data", category)
    builder = packing.prepare(tmp_path / "packed", found)
    for split in ("train", "validation", "test"):
        source = FolderSource([r for r in found if r.split == split])
        packed = packing.open_split(builder, split)
        assert list(packed.records) == list(source.records)
        numbers = range(len(source.records))
        assert [packed.read(n) for n in numbers] == [source.read(n) for n in numbers]
    packing.prepare(tmp_path / "packed", found)  # nothing changed
    defect = next(r for r in found if r.mask is not None)
    place = pathlib.Path(str(defect.mask))
    place = place / "000.png" if place.is_dir() else place
    if defect.mask_frame is None:
        draw_mask(place, (0, 1), (0, 2))
    else:
        pixels = np.load(place)
        pixels[defect.mask_frame] = np.eye(4)
        np.save(place, pixels)
    with pytest.raises(UserError, match="differ"):
        packing.prepare(tmp_path / "packed", records(name, tmp_path / "data", category))


class TestCategories:
    def test_of_mvtec_ad_are_in_the_published_order(self, tmp_path):
        # Textures first; the user's own behind, sorted.
        for name in ("zipper", "bottle", "wood", "carpet", "my part", "a part", "transistor"):
            write(tmp_path, f"{name}/train/good/0.png")
        write(tmp_path, "notes/0.png")
        found = LAYOUTS["mvtec_ad"].categories(tmp_path)
        published = ["carpet", "wood", "bottle", "transistor", "zipper"]
        assert found == [*published, "a part", "my part"]

    def test_of_visa_are_in_the_table_s_order_where_there_are_folders(self, tmp_path):
        draw_visa(tmp_path)
        assert LAYOUTS["visa"].categories(tmp_path) == ["pcb1", "candle"]
        (tmp_path / "pcb1").rename(tmp_path / "elsewhere")
        assert LAYOUTS["visa"].categories(tmp_path) == ["candle"]

    def test_of_stc_are_the_scenes_that_have_test_videos(self, tmp_path):
        draw_stc(tmp_path)
        assert LAYOUTS["stc"].categories(tmp_path) == ["01", "02"]  # and not 13

    def test_of_a_folder(self, tmp_path):
        categories = LAYOUTS["folder"].categories
        fails([f"config.dataset.root={tmp_path}", "train/good"], categories, tmp_path)
        write(tmp_path, "lid/train/good/0.png", "cap/train/good/0.png", "notes/0.png")
        assert categories(tmp_path) == ["cap", "lid"]
        write(tmp_path, "train/good/0.png")
        assert categories(tmp_path) == [""]

    def test_of_the_synthetic_one(self, tmp_path):
        assert LAYOUTS["synthetic"].categories(tmp_path / "not there yet") == ["part"]

    @pytest.mark.parametrize("name", ["ksdd2", "magnetic_tile"])
    def test_there_are_none_in(self, name, tmp_path):
        draw, _ = DRAWN[name]
        draw(tmp_path)
        assert LAYOUTS[name].categories(tmp_path) == [""]
        fails(["config.category='bottle'", "expected"], records, name, tmp_path, "bottle")


class TestTrees:
    """The datasets that are laid out much like MVTec AD."""

    def test_loco(self, tmp_path):
        draw_loco(tmp_path)
        found = records("mvtec_loco", tmp_path, "pushpins")
        logical, structural = "logical_anomalies", "structural_anomalies"
        assert rows(found) == [
            ("train", "good", 0, "pushpins/train/good/000.png", None),
            ("train", "good", 0, "pushpins/train/good/001.png", None),
            ("validation", "good", 0, "pushpins/validation/good/000.png", None),
            ("test", "good", 0, "pushpins/test/good/000.png", None),
            ("test", logical, 1, f"pushpins/test/{logical}/000.png", "000"),
            ("test", logical, 1, f"pushpins/test/{logical}/001.png", "001"),
            ("test", structural, 1, f"pushpins/test/{structural}/000.png", "000"),
        ]
        # Both masks of the image hold, and no other image's of the same name.
        defects = [
            np.argwhere(masks.decode(masks.read(r) or b"", "mask")).tolist() for r in found[4:]
        ]
        assert defects == [[[0, 0], [3, 3]], [[1, 2]], [[2, 2]]]

    def test_3d_ad_takes_the_colour_images(self, tmp_path):
        draw_3d(tmp_path)
        found = records("mvtec_3d_ad", tmp_path, "bagel")
        assert rows(found) == [
            ("train", "good", 0, "bagel/train/good/rgb/000.png", None),
            ("validation", "good", 0, "bagel/validation/good/rgb/000.png", None),
            ("test", "good", 0, "bagel/test/good/rgb/000.png", None),
            ("test", "hole", 1, "bagel/test/hole/rgb/000.png", "000.png"),
            ("test", "hole", 1, "bagel/test/hole/rgb/001.png", "001.png"),
        ]
        assert found[3].mask == tmp_path / "bagel/test/hole/gt/000.png"

    def test_ad_2_takes_the_public_test_images(self, tmp_path):
        draw_ad_2(tmp_path)
        found = records("mvtec_ad_2", tmp_path, "can")
        assert rows(found) == [
            ("train", "good", 0, "can/train/good/000_regular.png", None),
            ("validation", "good", 0, "can/validation/good/000_regular.png", None),
            (
                *("test", "bad", 1, "can/test_public/bad/000_overexposed.png"),
                "000_overexposed_mask.png",
            ),
            ("test", "bad", 1, "can/test_public/bad/000_regular.png", "000_regular_mask.png"),
            ("test", "good", 0, "can/test_public/good/000_regular.png", None),
        ]
        assert found[2].mask is not None
        assert found[2].mask.parent == tmp_path / "can/test_public/ground_truth/bad"

    @pytest.mark.parametrize(("category", "suffix"), [("01", "png"), ("03", "bmp")])
    def test_btad_pairs_masks_whatever_the_suffix(self, category, suffix, tmp_path):
        draw_btad(tmp_path)
        found = records("btad", tmp_path, category)
        # Normal images are "good" as everywhere, though their folder is ok.
        assert {(r.split, r.defect_type, r.label) for r in found} == {
            ("train", "good", 0),
            ("test", "good", 0),
            ("test", "ko", 1),
        }
        for r in (r for r in found if r.label):
            truth = tmp_path / category / "ground_truth/ko"
            assert r.mask == truth / f"{r.image.stem}.{suffix}"

    def test_btad_with_two_masks_of_one_image(self, tmp_path):
        draw_btad(tmp_path)
        write(tmp_path, "01/ground_truth/ko/0000.bmp")
        texts = ["01/test/ko/0000.bmp: has more than one mask, 0000.bmp, 0000.png"]
        fails(texts, records, "btad", tmp_path, "01")

    def test_mpdd(self, tmp_path):
        draw_mpdd(tmp_path)
        assert rows(records("mpdd", tmp_path, "tubes")) == [
            ("train", "good", 0, "tubes/train/good/000.png", None),
            ("test", "anomalous", 1, "tubes/test/anomalous/000.png", "000_mask.png"),
            ("test", "good", 0, "tubes/test/good/000.png", None),
        ]

    @pytest.mark.parametrize(
        ("name", "mask"),
        [
            ("mvtec_loco", "ground_truth/logical_anomalies/001"),
            ("mvtec_3d_ad", "test/hole/gt/001.png"),
            ("mvtec_ad_2", "test_public/ground_truth/bad/000_regular_mask.png"),
            ("btad", "ground_truth/ko/0001.png"),
            ("mpdd", "ground_truth/anomalous/000_mask.png"),
        ],
    )
    def test_a_missing_mask_is_named(self, name, mask, tmp_path):
        draw, category = DRAWN[name]
        draw(tmp_path)
        path = tmp_path / category / mask
        path.rename(tmp_path / "elsewhere")
        fails([f"{path} does not exist"], records, name, tmp_path, category)

    def test_several_missing_masks_are_all_told_of(self, tmp_path):
        draw_btad(tmp_path)
        for path in (tmp_path / "01/ground_truth/ko").iterdir():
            path.unlink()
        texts = ["01/test/ko/0000.bmp: its ground-truth mask", "(nor those of 0001.bmp)"]
        fails(texts, records, "btad", tmp_path, "01")

    def test_an_image_beside_the_folders_of_defect_types(self, tmp_path):
        draw_loco(tmp_path)
        write(tmp_path, "pushpins/test/000.png")
        place = tmp_path / "pushpins/test/000.png"
        fails([f"{place}: lies directly in test/"], records, "mvtec_loco", tmp_path, "pushpins")

    def test_an_unknown_category(self, tmp_path):
        draw_btad(tmp_path)
        texts = ["config.category='04'", f"Categories found in {tmp_path}: 01, 03"]
        fails(texts, records, "btad", tmp_path, "04")

    @pytest.mark.parametrize("split", ["validation", "test"])
    def test_without_validation_or_test_there_are_the_others(self, split, tmp_path):
        draw_loco(tmp_path)
        everything = records("mvtec_loco", tmp_path, "pushpins")
        (tmp_path / "pushpins" / split).rename(tmp_path / "elsewhere")
        expected = [r for r in everything if r.split != split]
        assert records("mvtec_loco", tmp_path, "pushpins") == expected

    def test_validation_images_of_any_such_dataset(self, tmp_path):
        draw_mpdd(tmp_path)
        published = records("mpdd", tmp_path, "tubes")
        write(tmp_path, "tubes/validation/good/000.png")
        found = records("mpdd", tmp_path, "tubes")
        added = [record for record in found if record not in published]
        assert rows(added) == [("validation", "good", 0, "tubes/validation/good/000.png", None)]
        assert [record for record in found if record in published] == published


class TestUnused:
    """Folders with images that are not read are named, in one line."""

    def test_of_a_layout_of_splits(self, tmp_path):
        draw_mpdd(tmp_path)
        names = ["extra/deep", "train/defective", "validation/bad", "val/good"]
        write(tmp_path, *(f"tubes/{name}/000.png" for name in names))
        write(tmp_path, "tubes/train/000.png")
        (tmp_path / "tubes" / "empty").mkdir()
        found = LAYOUTS["mpdd"].unused(tmp_path, "tubes")
        assert [path.relative_to(tmp_path / "tubes").as_posix() for path in found] == [
            *("extra", "train", "train/defective", "val", "validation/bad")
        ]

    def test_of_a_folder_of_one_s_own(self, tmp_path):
        write(tmp_path, "train/OK/0.png", "val/good/0.png", "val/bad/0.png", "masks/bad/0.png")
        assert LAYOUTS["folder"].unused(tmp_path, "") == []
        write(tmp_path, "train/defective/0.png", "test/good/0.png", "train/0.png")
        found = LAYOUTS["folder"].unused(tmp_path, "")
        assert [path.relative_to(tmp_path).as_posix() for path in found] == [
            *("test", "train", "train/defective")
        ]

    def test_they_are_named_when_the_dataset_is_opened(self, tmp_path):
        draw_mpdd(tmp_path)
        write(tmp_path, "tubes/train/defective/000.png")
        with pytest.warns(DataWarning, match="not used lie in train/defective; ") as caught:
            dataset_splits.open_dataset(of_dataset("mpdd", tmp_path, "tubes"))
        assert len(caught) == 1

    @pytest.mark.parametrize(("layout", "other"), [("mvtec_ad", "val"), ("folder", "test")])
    def test_no_test_images_names_both_layouts_and_what_was_found(
        self, layout, other, tmp_path
    ):
        write(tmp_path, "part/train/good/0.png", f"part/{other}/good/0.png")
        settings = of_dataset(layout, tmp_path, "part")
        with (
            pytest.warns(DataWarning, match=f"lie in {other};"),
            pytest.raises(UserError, match="no test images") as caught,
        ):
            train.train_and_eval(settings, tmp_path / "a", tmp_path / "b")
        message = str(caught.value)
        assert f"{tmp_path / 'part'} holds {', '.join(sorted(['train', other]))}" in message
        assert "test/good and test/<defect type> (config.dataset.name=mvtec_ad)" in message
        assert "val/good and val/bad (or val/<defect type>) (config.dataset.name" in message


class TestVisa:
    @pytest.fixture
    def root(self, tmp_path):
        draw_visa(tmp_path)
        return tmp_path

    def change(self, root: pathlib.Path, old: str, new: str) -> None:
        assert old in VISA_TABLE
        (root / "split_csv/1cls.csv").write_text(VISA_TABLE.replace(old, new))

    def test_the_table_s_split(self, root):
        images = "pcb1/Data/Images"
        assert rows(records("visa", root, "pcb1")) == [
            ("train", "good", 0, f"{images}/Normal/0000.JPG", None),
            ("train", "good", 0, f"{images}/Normal/0002.JPG", None),
            ("test", "anomaly", 1, f"{images}/Anomaly/000.JPG", "000.png"),
            ("test", "good", 0, f"{images}/Normal/0001.JPG", None),
        ]

    def test_without_the_table(self, root):
        (root / "split_csv/1cls.csv").unlink()
        fails([root / "split_csv/1cls.csv", "https://"], records, "visa", root, "pcb1")

    def test_an_unknown_category(self, root):
        texts = ["config.category='pcb2'", "did you mean 'pcb1'?", "pcb1, candle"]
        fails(texts, records, "visa", root, "pcb2")

    def test_rows_whose_files_are_not_there(self, root):
        (root / "pcb1/Data/Images/Normal/0001.JPG").unlink()
        fails(["names 0001.JPG", "does not hold"], records, "visa", root, "pcb1")
        write(root, "pcb1/Data/Images/Normal/0001.JPG")
        (root / "pcb1/Data/Masks/Anomaly/000.png").unlink()
        fails(["names 000.png", "Masks/Anomaly"], records, "visa", root, "pcb1")

    def test_images_that_the_table_leaves_out(self, root):
        write(root, "pcb1/Data/Images/Normal/0003.JPG")
        fails(["holds 0003.JPG", "does not name"], records, "visa", root, "pcb1")

    @pytest.mark.parametrize(
        ("old", "new", "said"),
        [
            ("object,", "thing,", "has the columns thing,"),
            ("pcb1,train", "pcb1,validation", "0002.JPG: split 'validation'; expected train"),
            ("pcb1,test,normal", "pcb1,test,good", "label 'good'; expected normal or anomaly"),
            ("pcb1,test,anomaly", "pcb1,train,anomaly", "an anomaly to train on"),
            (",pcb1/Data/Masks/Anomaly/000.png", ",", "no mask of an anomaly"),
            ("pcb1/Data/Images/Normal/0002", "../../x", "the path '../../x.JPG'"),
            ("pcb1/Data/Images/Normal/0002", "pcb1/../../x", "begins with pcb1/"),
            ("pcb1/Data/Images/Normal/0002", "/etc/x", "the path '/etc/x.JPG'"),
            ("pcb1/Data/Images/Normal/0002.JPG", ".", "the path '.'"),
            ("pcb1,train", "../pcb1,train", "object '../pcb1'; expected a folder's name"),
            ("pcb1,train", "..,train", "object '..'; expected a folder's name"),
            ("0002.JPG,", "0002.JPG", "line 3: expected 5 values"),
            ("0002.JPG,", "0002.JPG,,", "line 3: expected 5 values"),
        ],
    )
    def test_a_wrong_row_is_named(self, root, old, new, said):
        self.change(root, old, new)
        fails([root / "split_csv/1cls.csv", said], records, "visa", root, "pcb1")

    def test_a_table_that_is_none(self, root):
        (root / "split_csv/1cls.csv").write_bytes(b"\xff\xfe\x00")
        fails(["not a table"], records, "visa", root, "pcb1")


class TestKsdd2:
    @pytest.fixture
    def root(self, tmp_path):
        draw_ksdd2(tmp_path)
        return tmp_path

    def test_defects_are_known_from_masks_and_not_fitted(self, root):
        assert rows(records("ksdd2", root, "")) == [
            ("train", "good", 0, "train/10000.png", None),
            ("train", "good", 0, "train/10301.png", None),
            ("test", "defect", 1, "test/20000.png", "20000_GT.png"),
            ("test", "good", 0, "test/20001.png", None),
        ]

    def test_other_copies_are_not_left_out_in_silence(self, root):
        write(root, "train/10000 (copy).png")
        fails(["10000 (copy).png without the other"], records, "ksdd2", root, "")

    @pytest.mark.parametrize("name", ["10000.png", "10000_GT.png"])
    def test_half_of_a_pair(self, root, name):
        (root / "train" / name).unlink()
        other = {"10000.png": "10000_GT.png"}.get(name, "10000.png")
        fails([root / "train", f"{other} without the other"], records, "ksdd2", root, "")

    def test_two_images_of_a_name(self, root):
        write(root, "train/10000.jpg")
        fails(["do not match one to one"], records, "ksdd2", root, "")

    def test_a_broken_mask_is_named(self, root):
        path = root / "test/20001_GT.png"
        path.write_bytes(b"")
        fails([path], records, "ksdd2", root, "")

    def test_without_a_normal_image(self, root):
        for name in ("10000", "10301"):
            draw_mask(root / f"train/{name}_GT.png", (0, 0))
        fails([root / "train", "10000.png", "10002.png"], records, "ksdd2", root, "")

    def test_without_test_images_it_can_be_fitted(self, root):
        (root / "test").rename(root / "elsewhere")
        assert [r.split for r in records("ksdd2", root, "")] == ["train", "train"]


class TestStc:
    @pytest.fixture
    def root(self, tmp_path):
        draw_stc(tmp_path)
        return tmp_path

    def test_frames_are_those_of_the_scene_in_the_order_of_their_numbers(self, root):
        train = [r.relative_path for r in records("stc", root, "01") if r.split == "train"]
        assert [name.removeprefix("training/frames/") for name in train] == [
            "01_001/998.jpg",
            "01_001/999.jpg",
            "01_001/1000.jpg",
            "01_002/000.jpg",
        ]

    def test_labels_and_masks_are_those_of_the_frame(self, root):
        test = [r for r in records("stc", root, "01") if r.split == "test"]
        assert [(r.image.parent.name, r.image.name, r.label, r.mask_frame) for r in test] == [
            ("01_0014", "000.jpg", 0, None),
            ("01_0014", "001.jpg", 0, None),
            ("01_0014", "002.jpg", 1, 2),
            ("01_0014", "003.jpg", 1, 3),
            ("01_0014", "004.jpg", 0, None),
            ("01_0015", "000.jpg", 0, None),
            ("01_0015", "001.jpg", 0, None),
        ]
        for r, row in zip(test[2:4], (2, 3), strict=True):
            assert r.defect_type == "anomaly"
            assert r.mask == root / "testing/test_pixel_mask/01_0014.npy"
            defects = masks.decode(masks.read(r) or b"", "mask")
            assert np.argwhere(defects.any(1)).tolist() == [[row]]

    def test_frames_past_999_keep_their_masks(self, root):
        # Sorted as text 1000.jpg would come first, and get the mask of 998.jpg.
        video = root / "testing/frames/02_0128"
        (video / "000.jpg").unlink()
        write(video, "998.jpg", "999.jpg", "1000.jpg")
        save_npy(root / "testing/test_frame_mask/02_0128.npy", np.array([1, 0, 1], bool))
        save_npy(root / "testing/test_pixel_mask/02_0128.npy", np.ones((3, 4, 4), np.uint8))
        test = [r for r in records("stc", root, "02") if r.split == "test"]
        assert [(r.image.name, r.label, r.mask_frame) for r in test] == [
            ("998.jpg", 1, 0),
            ("999.jpg", 0, None),
            ("1000.jpg", 1, 2),
        ]

    def test_a_scene_without_test_videos_can_be_fitted(self, root):
        assert [r.split for r in records("stc", root, "13")] == ["train"]

    def test_normal_videos_need_no_pixel_masks(self, root):
        (root / "testing/test_pixel_mask/01_0015.npy").unlink()
        assert len(records("stc", root, "01")) == 11

    @pytest.mark.parametrize("number", [0, 2, 4])
    def test_a_missing_frame_is_noticed(self, root, number):
        # Else all behind it would get the labels and masks of their neighbours.
        (root / f"testing/frames/01_0014/{number:03}.jpg").unlink()
        fails([root / "testing", "01_0014"], records, "stc", root, "01")

    def test_a_gap_in_as_many_frames_as_masks_is_noticed(self, root):
        video = root / "testing/frames/01_0014"
        (video / "002.jpg").rename(video / "005.jpg")
        fails([f"{video}: no frame 2 between 0 and 5"], records, "stc", root, "01")

    @pytest.mark.parametrize("kind", ["frame", "pixel"])
    @pytest.mark.parametrize("count", [4, 6])
    def test_masks_of_another_length(self, root, kind, count):
        path = root / f"testing/test_{kind}_mask/01_0014.npy"
        save_npy(path, np.ones(count if kind == "frame" else (count, 4, 4), np.uint8))
        texts = [f"{path}: ", "for the 5 frames in", root / "testing/frames/01_0014"]
        fails(texts, records, "stc", root, "01")

    @pytest.mark.parametrize("kind", ["frame", "pixel"])
    def test_masks_that_are_missing_or_none(self, root, kind):
        path = root / f"testing/test_{kind}_mask/01_0014.npy"
        for damaged in (b"text", b"\x93NUMPY\x01\x00\x03\x00(((", b"\x93NUMPY\x01\x00\x09\x00"):
            path.write_bytes(damaged)
            fails([f"{path}: not an .npy file"], records, "stc", root, "01")
        path.unlink()
        fails([f"{path}: cannot be read"], records, "stc", root, "01")

    def test_labels_are_never_unpickled(self, root, tmp_path):
        trace = tmp_path / "executed"

        class Malicious:
            def __reduce__(self):
                return pathlib.Path.touch, (trace,)

        content = io.BytesIO()
        np.save(content, np.array([Malicious()] * 5, object), allow_pickle=True)
        path = root / "testing/test_frame_mask/01_0014.npy"
        path.write_bytes(content.getvalue())
        fails([f"{path}: not an .npy file"], records, "stc", root, "01")
        assert not trace.exists()

    @pytest.mark.parametrize("count", [5, 10**12])
    def test_no_room_is_made_for_labels_that_a_file_only_claims(self, root, count):
        path = root / "testing/test_frame_mask/01_0014.npy"
        claim = {"descr": "|b1", "fortran_order": False, "shape": (count,)}
        with path.open("wb") as file:
            np.lib.format.write_array_header_1_0(file, claim)
        fails([f"{path}: "], records, "stc", root, "01")

    def test_labels_in_an_archive(self, root):
        path = root / "testing/test_frame_mask/01_0014.npy"
        with path.open("wb") as file:
            np.savez(file, np.zeros(5, bool))
        fails([f"{path}: not an .npy file"], records, "stc", root, "01")

    def test_labels_other_than_0_and_1(self, root):
        save_npy(root / "testing/test_frame_mask/01_0014.npy", np.array([0, 0, 2, 0, 0]))
        fails(["01_0014.npy", "expected 0 or 1"], records, "stc", root, "01")

    def test_frames_without_a_number(self, root):
        write(root, "testing/frames/01_0014/first.jpg")
        fails(["first.jpg", "000.jpg"], records, "stc", root, "01")

    def test_frames_of_one_number(self, root):
        write(root, "testing/frames/01_0014/1.jpg")
        fails(["different numbers"], records, "stc", root, "01")

    def test_videos_that_are_not_unpacked_come_with_a_command(self, root):
        videos = root / "training/videos"
        videos.mkdir()
        for name in ("01_001.avi", "01_002.avi", "01_003.avi", "02_001.avi"):
            (videos / name).touch()
        assert records("stc", root, "02")  # other scenes do not matter
        texts = [f"{videos}: 01_003.avi not unpacked", "ffmpeg -r 1 -i", "videos/01_*.avi"]
        fails(texts, records, "stc", root, "01")
        (root / "training/frames").rename(root / "elsewhere")
        fails(["01_001.avi, 01_002.avi, 01_003.avi"], records, "stc", root, "01")

    def test_an_unknown_scene(self, root):
        texts = ["config.category='bottle'", "scenes found: 01, 02, 13"]
        fails(texts, records, "stc", root, "bottle")


class TestMagneticTile:
    @pytest.fixture
    def root(self, tmp_path):
        draw_tiles(tmp_path)
        return tmp_path

    def test_a_fifth_of_the_normal_images_is_tested(self, root):
        found = records("magnetic_tile", root, "", seed=3)
        names = [f"MT_Free/Imgs/exp1_num_{number}.jpg" for number in range(10)]
        tested = set(random.Random(3).sample(names, 2))
        good = [r for r in found if r.label == 0]
        assert [r.relative_path for r in good] == [
            *(name for name in names if name not in tested),
            *sorted(tested),
        ]
        assert [r.split for r in good] == ["train"] * 8 + ["test"] * 2
        assert all(r.mask is None for r in good)

    def test_every_image_with_a_defect_is_tested(self, root):
        found = [r for r in records("magnetic_tile", root, "") if r.label]
        assert [(r.split, r.defect_type, r.image.name) for r in found] == [
            ("test", name, image)
            for name in ("blowhole", "break", "crack", "fray", "uneven")
            for image in ("a.jpg", "b.jpg")
        ]
        assert all(r.mask == r.image.with_suffix(".png") for r in found)

    def test_the_seed_is_the_split_s(self, root):
        def tested(seed: int) -> list[str]:
            found = records("magnetic_tile", root, "", seed)
            return [r.image.name for r in found if r.split == "test" and r.label == 0]

        assert tested(0) == tested(0)
        assert len({tuple(tested(seed)) for seed in range(4)}) > 1

    @pytest.mark.parametrize("name", ["MT_Free", "MT_Uneven"])
    def test_a_missing_folder(self, root, name):
        (root / name).rename(root / "elsewhere")
        fails([root / name / "Imgs", "MT_Break"], records, "magnetic_tile", root, "")

    @pytest.mark.parametrize("name", ["a.jpg", "a.png"])
    def test_half_of_a_pair(self, root, name):
        (root / "MT_Crack/Imgs" / name).unlink()
        other = {"a.jpg": "a.png", "a.png": "a.jpg"}[name]
        texts = [root / "MT_Crack/Imgs", f"{other} without the other"]
        fails(texts, records, "magnetic_tile", root, "")

    def test_two_images_of_a_name(self, root):
        write(root, "MT_Crack/Imgs/a.bmp")
        fails(["do not match one to one"], records, "magnetic_tile", root, "")

    def test_too_few_normal_images(self, root):
        for path in (root / "MT_Free/Imgs").glob("*_[1-9].jpg"):
            path.unlink()
        fails([root / "MT_Free/Imgs", "at least two"], records, "magnetic_tile", root, "")


def test_hidden_and_system_folders_are_passed_over(tmp_path, capsys):
    """In every layout, as --input passes them over, and in a line."""
    write(tmp_path, "train/good/a.png", "val/bad/b.png")
    hidden = ("train/good/@eaDir/a.png", "val/__MACOSX/b.png", "lost+found/c.png")
    write(tmp_path, *hidden, "val/bad/.thumbnails/b.png")
    values = defaults.get_config()
    values.update({"dataset": {"name": "folder", "root": str(tmp_path)}, "category": ""})
    sources = dataset_splits.open_dataset(config.validate(values))
    found = [record.relative_path for source in sources.values() for record in source.records]
    assert sorted(found) == ["train/good/a.png", "val/bad/b.png"]
    assert "passed over: 4 hidden or system folders with images" in capsys.readouterr().out
