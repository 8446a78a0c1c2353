"""Seeded draws of records, and the part of a source that they choose."""

import random

import pytest
from trees import write

from padim_jax.config import defaults
from padim_jax.config import settings as config_lib
from padim_jax.data import dataset_splits
from padim_jax.data.input_pipeline import FolderSource
from padim_jax.data.records import Record, Source
from padim_jax.data.sampling import groups, held_out, part, subset
from padim_jax.errors import UserError


def test_a_subset_is_the_seed_s_sample_in_the_given_order():
    names = [f"{number}.png" for number in range(12)]  # not sorted as text
    expected = random.Random(5).sample(range(12), 4)
    assert subset(names, 4, 5) == [names[number] for number in sorted(expected)]
    assert subset(names, 4, 5) != subset(names, 4, 6)


@pytest.mark.parametrize("count", [0, 5, 6])
def test_a_subset_of_none_or_more_than_there_are_is_all(count):
    assert subset(range(5), count, 1) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("images", "fraction", "count"),
    [(209, 0.2, 42), (10, 0.25, 2), (10, 0.01, 1), (10, 0.99, 9), (2, 0.2, 1), (2, 0.9, 1)],
)
def test_held_out_images_and_the_others_are_all(images, fraction, count):
    fitted, held = held_out(range(images), fraction, 0)
    assert len(held) == count
    assert sorted(fitted + held) == list(range(images))
    assert fitted == sorted(fitted)
    assert held == sorted(held)
    assert held_out(range(images), fraction, 0) == (fitted, held)


def test_another_seed_holds_out_others():
    assert held_out(range(50), 0.2, 0) != held_out(range(50), 0.2, 1)


@pytest.mark.parametrize("images", [0, 1])
def test_too_few_to_hold_one_out(images):
    with pytest.raises(UserError, match=f"held_out: {images} training image"):
        held_out(range(images), 0.2, 0)


def test_a_part_of_a_source_reads_its_own_images(tmp_path):
    records = []
    for number in range(5):
        image, mask = tmp_path / f"{number}.png", tmp_path / f"{number}_mask.png"
        image.write_bytes(bytes([number]))
        mask.write_bytes(bytes([number, number]))
        place = mask if number % 2 else None
        records.append(Record("test", image, place, number % 2, "x", image.name))
    some = part(FolderSource(records), [4, 1, 3])
    assert isinstance(some, Source)
    assert list(some.records) == [records[4], records[1], records[3]]
    expected = [(b"\4", None), (b"\1", b"\1\1"), (b"\3", b"\3\3")]
    assert [some.read(index) for index in range(3)] == expected
    with pytest.raises(IndexError):
        some.read(3)


def test_a_part_of_a_part(tmp_path):
    records = [
        Record("train", tmp_path / f"{n}.png", None, 0, "good", str(n)) for n in range(6)
    ]
    some = part(part(FolderSource(records), [1, 3, 5]), [0, 2])
    assert [record.relative_path for record in some.records] == ["1", "5"]


def test_groups_are_what_the_expression_finds(tmp_path):
    names = ["a/part2_0.png", "a/part10_0.png", "b/part2_1.png", "b/part3_0.png"]
    records = [Record("train", tmp_path / name, None, 0, "good", name) for name in names]
    assert groups(records, "").tolist() == [0, 1, 2, 3]
    assert groups(records, "part[0-9]+").tolist() == [0, 1, 0, 2]
    assert groups(records, "part([0-9])").tolist() == [0, 1, 0, 2]
    assert groups(records, "^.").tolist() == [0, 0, 1, 1]
    with pytest.raises(UserError, match=r"groups='part10': not found in a/part2_0\.png"):
        groups(records, "part10")


@pytest.mark.parametrize("source", ["folder", "tfds"])
def test_a_data_set_gives_a_subset_of_its_training_images(source, tmp_path):
    write(tmp_path, *(f"data/train/good/{number}.png" for number in range(9)))
    write(tmp_path, "data/val/good/0.png", "data/val/bad/0.png")

    def opened(**settings: int) -> dict[str, Source]:
        values = defaults.get_config()
        places = {"root": str(tmp_path / "data"), "tfds_dir": str(tmp_path / "packed")}
        chosen = {"name": "folder", "source": source, **places, **settings}
        values.update_from_flattened_dict({f"dataset.{key}": chosen[key] for key in chosen})
        values.category = ""
        return dataset_splits.open_dataset(config_lib.validate(values))

    everything = opened()
    some = opened(train_images=4, seed=3)
    chosen = sorted(random.Random(3).sample(range(9), 4))
    assert list(some["train"].records) == [everything["train"].records[n] for n in chosen]
    assert some["train"].read(1) == everything["train"].read(chosen[1])
    assert list(some["test"].records) == list(everything["test"].records)
    assert len(some["test"].records) == 2
    assert len(some["validation"].records) == 0
    assert len(opened(train_images=10)["train"].records) == 9
