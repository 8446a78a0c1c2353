"""Copies among images: exact ones count once, near ones are noticed, and others are not."""

import hashlib
import pathlib

import numpy as np
import pytest

from padim_jax.data import copies
from padim_jax.data.input_pipeline import FolderSource
from padim_jax.data.records import Record
from padim_jax.devices.parallel import Devices
from padim_jax.errors import DataWarning

ONE = Devices(1)


def folder(root: pathlib.Path, contents: str) -> FolderSource:
    """A file for each letter, which is its content."""
    records = []
    for number, letter in enumerate(contents):
        path = root / f"{number}.png"
        path.write_text(letter)
        records.append(Record("train", path, None, 0, "good", path.name))
    return FolderSource(records)


def test_the_first_of_each_file_counts(tmp_path: pathlib.Path):
    with pytest.warns(DataWarning) as caught:
        found = copies.distinct(folder(tmp_path, "abacbbd"), ONE)
    assert [str(one.message) for one in caught] == [
        "3 of 7 images are copies of others, byte for byte (0.png = 2.png, 1.png = 4.png, "
        "1.png = 5.png): each image counts once"
    ]
    assert [record.relative_path for record in found.records] == [
        *("0.png", "1.png", "3.png", "6.png")
    ]
    assert [found.read(i)[0] for i in range(4)] == [b"a", b"b", b"c", b"d"]
    expected = [hashlib.sha256(letter).digest() for letter in (b"a", b"b", b"c", b"d")]
    assert list(map(bytes, found.digests)) == expected
    some = found.part(np.array([3, 1]))
    assert [some.read(i)[0] for i in range(2)] == [b"d", b"b"]
    assert list(map(bytes, some.digests)) == [expected[3], expected[1]]


def test_without_copies_nothing_is_said_and_nothing_read_twice(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
    found = copies.distinct(folder(tmp_path, "cab"), ONE)
    assert len(found.records) == 3
    monkeypatch.setattr(FolderSource, "read", None)
    assert copies.distinct(found, ONE) is found


def features(count: int, seed: int = 0) -> np.ndarray:
    """Of images that differ by a few things that they have in common, and by all else."""
    rng = np.random.default_rng(seed)
    common = rng.normal(size=(count, 5)) @ rng.normal(size=(5, 300))
    return (common + rng.normal(size=(count, 300))).astype(np.float32)


def repeated(x: np.ndarray, times: int, noise: float) -> np.ndarray:
    x = np.repeat(x, times, axis=0)
    return x + noise * np.random.default_rng(1).normal(size=x.shape).astype(np.float32)


@pytest.mark.parametrize("noise", [0.0, 0.1, 0.4])
@pytest.mark.parametrize(("parts", "times"), [(30, 2), (30, 4), (3, 40), (5, 2)], ids=str)
def test_near_copies_are_found(parts: int, times: int, noise: float):
    found = copies.near_copies(repeated(features(parts), times, noise))
    assert [i for i, _ in found] == list(range(parts * times))
    assert all(i != j and i // times == j // times for i, j in found)


@pytest.mark.parametrize("count", [1, 2, 3, 6, 10, 40, 200])
def test_independent_images_are_no_copies(count: int):
    for seed in range(10):
        assert not copies.near_copies(features(count, seed))


def test_two_variants_of_a_product_are_no_copies():
    x = features(40)
    assert not copies.near_copies(x + 20 * (np.arange(40) % 2)[:, None].astype(np.float32))


def test_few_copies_change_little():
    x = features(40)
    assert not copies.near_copies(np.concatenate([x, x[:4]]))  # 8 of 44
    assert len(copies.near_copies(np.concatenate([x, x[:16]]))) == 32


def test_images_that_are_all_the_same():
    assert not copies.near_copies(np.ones((12, 50), np.float32))


def test_what_is_said():
    assert copies.near_copies_text([], ["a"]) == ""
    pairs = [(0, 1), (1, 0), (2, 3), (3, 2)]
    said = copies.near_copies_text(pairs, ["a\n", "b", "c", "d", "e"])
    assert said.startswith("4 of 5 normal images are near copies of others (a\\n = b, c = d): ")
    assert "config.threshold.groups" in said
