"""The cache of decoded images: gives back what was put, or nothing; keeps to its bounds."""

import errno
import os
import pathlib
import subprocess
import sys
import tempfile
import threading
from typing import Any

import hypothesis
import numpy as np
import pytest
import small
from hypothesis import strategies as st
from PIL import Image

from padim_jax.config import defaults
from padim_jax.config.settings import Config, ImageConfig, validate
from padim_jax.data import image_cache
from padim_jax.data.image_cache import (
    NO_MASK,
    Decoded,
    ImageCache,
    MaskFacts,
    entry_key,
    open_cache,
)
from padim_jax.data.layouts.synthetic import generate
from padim_jax.runs import modes

HUGE = 10**9


def key(number: int) -> str:
    return f"{number:064x}"


def decoded(number: int = 0, shape=(5, 7), mask: bool = False) -> Decoded:
    rng = np.random.default_rng(number)
    image = rng.integers(0, 256, (*shape, 3), np.uint8)
    facts = MaskFacts(2**33 + number, 3, 1, 2) if mask else NO_MASK
    return Decoded(
        image, rng.random(shape) < 0.5 if mask else None, (900 + number, 31), None, facts
    )


def assert_same(found: Decoded | None, expected: Decoded) -> None:
    assert found is not None
    assert (found.size, found.facts) == (expected.size, expected.facts)
    np.testing.assert_array_equal(found.image, expected.image)
    assert (found.mask is None) == (expected.mask is None)
    if expected.mask is not None:
        assert found.mask is not None
        assert found.mask.dtype == bool
        np.testing.assert_array_equal(found.mask, expected.mask)


def entries(folder: pathlib.Path) -> dict[str, pathlib.Path]:
    return {path.name: path for path in folder.iterdir()} if folder.exists() else {}


def total(folder: pathlib.Path) -> int:
    return sum(path.stat().st_size for path in entries(folder).values())


# Areas that do and do not fill their last byte of mask bits.
@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (8, 8), (33, 64)])
@pytest.mark.parametrize("mask", [False, True])
def test_gives_back_what_was_put(shape, mask, tmp_path):
    put = decoded(3, shape, mask)
    ImageCache(tmp_path / "a" / "b", HUGE).put(key(1), put)
    later = ImageCache(tmp_path / "a" / "b", HUGE)
    assert_same(later.get(key(1)), put)
    assert later.get(key(2)) is None


class TestKey:
    CONFIG = ImageConfig(
        *((64, 48), "bilinear", (32, 40), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
        *(0.0, "centre", 0),
    )
    VIEW = (2.5, 3, 4)

    def change(self, **values: Any) -> ImageConfig:
        settings = vars(self.CONFIG) | values
        return ImageConfig(**settings)

    def test_differs_with_all_that_decides_on_the_pixels(self, monkeypatch):
        keys = [
            entry_key(image, mask, config, self.VIEW)
            for image, mask, config in [
                (b"image", None, self.CONFIG),
                (b"imagf", None, self.CONFIG),
                (b"image", b"", self.CONFIG),
                (b"image", b"mask", self.CONFIG),
                (b"image", b"masl", self.CONFIG),
                # The same bytes, divided elsewhere.
                (b"imag", b"emask", self.CONFIG),
                (b"imagemask", None, self.CONFIG),
                (b"image", None, self.change(resize=(48, 64))),
                (b"image", None, self.change(method="bicubic")),
                (b"image", None, self.change(crop=None)),
                (b"image", None, self.change(crop=(40, 32))),
                # Another crop of another size with the same digits.
                (b"image", None, self.change(resize=(64, 48), crop=(3, 240))),
            ]
        ]
        for view in ((2.5, 4, 3), (-2.5, 3, 4), (2.5000000001, 3, 4), (0.0, 3, 4)):
            keys.append(entry_key(b"image", None, self.CONFIG, view))
        monkeypatch.setattr(image_cache, "_VERSIONS", ["another Pillow"])
        keys.append(entry_key(b"image", None, self.CONFIG, self.VIEW))
        monkeypatch.setattr(image_cache, "_FORMAT", image_cache._FORMAT + 1)
        keys.append(entry_key(b"image", None, self.CONFIG, self.VIEW))
        assert len(set(keys)) == len(keys)

    def test_is_the_same_for_what_comes_after(self):
        # Normalisation happens on the device: another one need not decode again.
        expected = entry_key(b"image", b"mask", self.CONFIG, self.VIEW)
        other = self.change(mean=(0.5, 0.5, 0.5), std=(2.0, 2.0, 2.0))
        assert entry_key(b"image", b"mask", other, self.VIEW) == expected
        # Nor does it matter from where and with what seed a view was drawn.
        other = self.change(rotation=10.0, crop_at="random", seed=3)
        assert entry_key(b"image", b"mask", other, self.VIEW) == expected

    def test_is_the_same_in_another_process(self, tmp_path):
        code = """if True:
            from padim_jax.config.settings import ImageConfig
            from padim_jax.data.image_cache import entry_key
            sizes = (64, 48), "bilinear", (32, 40)
            config = ImageConfig(*sizes, (0.,) * 3, (1.,) * 3, 0.0, "centre", 0)
            print(entry_key(b"image", b"mask", config, (2.5, 3, 4)))
        """
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONPATH": str(pathlib.Path(__file__).parents[2])},
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.strip() == entry_key(b"image", b"mask", self.CONFIG, self.VIEW)


class TestDamage:
    """What is not as it was written is noticed, and written anew."""

    PUT = decoded(1, (3, 5), mask=True)

    def stored(self, folder: pathlib.Path) -> tuple[ImageCache, pathlib.Path]:
        cache = ImageCache(folder, HUGE)
        cache.put(key(1), self.PUT)
        (path,) = entries(folder).values()
        return cache, path

    def test_truncated_anywhere(self, tmp_path):
        cache, path = self.stored(tmp_path)
        content = path.read_bytes()
        for length in range(len(content)):
            path.write_bytes(content[:length])
            assert cache.get(key(1)) is None
        path.write_bytes(content + b"\0")
        assert cache.get(key(1)) is None

    def test_any_flipped_bit(self, tmp_path):
        cache, path = self.stored(tmp_path)
        content = path.read_bytes()
        for bit in range(8 * len(content)):
            changed = bytearray(content)
            changed[bit // 8] ^= 1 << bit % 8
            path.write_bytes(changed)
            assert cache.get(key(1)) is None

    def test_under_the_name_of_another(self, tmp_path):
        cache, path = self.stored(tmp_path)
        path.rename(path.with_name(path.name.replace(key(1), key(2))))
        assert cache.get(key(2)) is None

    def test_is_replaced(self, tmp_path):
        cache, path = self.stored(tmp_path)
        path.write_bytes(b"")
        cache.put(key(1), self.PUT)
        assert_same(cache.get(key(1)), self.PUT)
        path.unlink()
        path.mkdir()  # cannot be read at all
        assert cache.get(key(1)) is None


class TestBound:
    SIZE = len(image_cache._pack(key(0), decoded()))  # of each entry

    def age(self, folder: pathlib.Path, number: int, seconds: int) -> None:
        (path,) = (path for name, path in entries(folder).items() if key(number) in name)
        when = path.stat().st_mtime - seconds
        os.utime(path, (when, when))

    @pytest.mark.parametrize("fits", [1, 2, 15, 16, 17, 40])
    def test_is_never_exceeded(self, fits, tmp_path):
        limit = fits * self.SIZE + self.SIZE // 2
        cache = ImageCache(tmp_path, limit)
        for number in range(3 * fits):
            cache.put(key(number), decoded(number))
            assert total(tmp_path) <= limit
            assert_same(cache.get(key(number)), decoded(number))
        # Room is made for a sixteenth, not for all.
        assert total(tmp_path) >= limit - limit // 16 - 2 * self.SIZE

    def test_holds_for_what_was_there_before(self, tmp_path):
        before = ImageCache(tmp_path, HUGE)
        for number in range(20):
            before.put(key(number), decoded(number))
            self.age(tmp_path, number, 100 - number)
        cache = ImageCache(tmp_path, 5 * self.SIZE)
        cache.put(key(20), decoded(20))
        assert total(tmp_path) <= 5 * self.SIZE
        assert_same(cache.get(key(20)), decoded(20))
        assert_same(cache.get(key(19)), decoded(19))
        assert cache.get(key(0)) is None

    def test_the_least_recently_used_go_first(self, tmp_path):
        cache = ImageCache(tmp_path, 4 * self.SIZE)
        for number in range(4):
            cache.put(key(number), decoded(number))
            self.age(tmp_path, number, 100 - number)
        assert cache.get(key(0)) is not None  # the oldest, now used
        cache.put(key(4), decoded(4))
        cache.put(key(5), decoded(5))
        kept = {number for number in range(6) if cache.get(key(number)) is not None}
        assert kept == {0, 3, 4, 5}

    def test_more_than_fits_at_all_is_not_kept(self, tmp_path):
        cache = ImageCache(tmp_path, self.SIZE)
        cache.put(key(0), decoded(0))
        cache.put(key(1), decoded(1, (9, 9)))
        assert [key(0) in name for name in entries(tmp_path)] == [True]

    def test_nothing_but_entries_is_removed_or_counted(self, tmp_path):
        # Someone may name a folder with an `images` of its own.
        others = ["part.png", f"{key(1)}.png", "notes.pixels", f"{key(1)[:-1]}.pixels"]
        for name in others:
            (tmp_path / name).write_bytes(bytes(100 * self.SIZE))
            os.utime(tmp_path / name, (0, 0))
        (tmp_path / "folder").mkdir()
        cache = ImageCache(tmp_path, 2 * self.SIZE)
        for number in range(5):
            cache.put(key(number), decoded(number))
        assert_same(cache.get(key(4)), decoded(4))
        assert {*others, "folder"} <= set(entries(tmp_path))
        assert len(entries(tmp_path)) == len(others) + 1 + 2

    def test_what_an_interrupted_run_left_goes_as_well(self, tmp_path):
        left = tmp_path / f"{key(9)}.pixels.0123456789abcdef"
        left.write_bytes(bytes(10 * self.SIZE))
        os.utime(left, (0, 0))
        ImageCache(tmp_path, 4 * self.SIZE).put(key(0), decoded())
        assert not left.exists()
        assert total(tmp_path) == self.SIZE

    def test_the_folder_is_listed_now_and_then_only(self, tmp_path, monkeypatch):
        listed = []
        shrink = image_cache._shrink
        monkeypatch.setattr(
            image_cache, "_shrink", lambda *given: (listed.append(1), shrink(*given))
        )
        cache = ImageCache(tmp_path, 160 * self.SIZE)
        for number in range(100):  # ten fill a sixteenth
            cache.put(key(number), decoded(number))
        assert len(listed) == 10
        for number in range(100):
            assert ImageCache(tmp_path, 160 * self.SIZE).get(key(number)) is not None
        assert len(listed) == 10


class TestUnwritable:
    """Results do not depend on the cache: a run without one goes on."""

    def told(self, capsys: pytest.CaptureFixture[str], folder: pathlib.Path) -> str:
        out, err = capsys.readouterr()
        assert out == ""
        assert len(err.splitlines()) == 1
        for text in (str(folder), "--config.cache.images_gb=0", "--config.cache.dir"):
            assert text in err
        return err

    def test_folder(self, tmp_path, capsys):
        (tmp_path / "file").write_text("")
        folder = tmp_path / "file" / "images"
        for _ in range(2):  # fit and evaluation
            cache = ImageCache(folder, HUGE)
            for number in range(3):
                assert cache.get(key(number)) is None
                cache.put(key(number), decoded(number))
        assert "Not a directory" in self.told(capsys, folder)

    def test_disk_is_full(self, tmp_path, monkeypatch, capsys):
        cache = ImageCache(tmp_path, HUGE)
        cache.put(key(0), decoded(0))

        def write_half(path: pathlib.Path, content: bytes) -> None:
            with path.open("wb") as file:
                file.write(content[: len(content) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with monkeypatch.context() as full:
            full.setattr(pathlib.Path, "write_bytes", write_half)
            cache.put(key(1), decoded(1))
        # Neither a part of it nor a half-hearted second attempt.
        cache.put(key(2), decoded(2))
        assert len(entries(tmp_path)) == 1
        assert "No space left" in self.told(capsys, tmp_path)
        assert_same(cache.get(key(0)), decoded(0))

    def test_readable_only(self, tmp_path, monkeypatch, capsys):
        ImageCache(tmp_path, HUGE).put(key(0), decoded(0))

        def refuse(*_):
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

        monkeypatch.setattr(os, "utime", refuse)
        assert_same(ImageCache(tmp_path, HUGE).get(key(0)), decoded(0))
        assert capsys.readouterr() == ("", "")


def test_threads_share_a_cache(tmp_path):
    size = TestBound.SIZE
    cache = ImageCache(tmp_path, 20 * size)
    wrong = []

    def work(seed: int) -> None:
        for number in np.random.default_rng(seed).integers(0, 40, 150).tolist():
            found = cache.get(key(number))
            if found is None:
                cache.put(key(number), decoded(number))
            elif not np.array_equal(found.image, decoded(number).image):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert 10 * size < total(tmp_path) <= 20 * size


def test_processes_share_a_cache(tmp_path):
    """All write, read and remove the same few entries at once."""
    size = TestBound.SIZE
    code = """if True:
        import pathlib, sys
        import numpy as np
        from padim_jax.data.image_cache import Decoded, ImageCache

        cache = ImageCache(pathlib.Path(sys.argv[1]), int(sys.argv[2]))
        for number in np.random.default_rng(int(sys.argv[3])).integers(0, 40, 600):
            key = f"{number:064x}"
            pixels = np.full((5, 7, 3), number, np.uint8)
            found = cache.get(key)
            assert found is None or np.array_equal(found.image, pixels)
            cache.put(key, Decoded(pixels, None, (5, 7)))
    """
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path), str(32 * size), str(seed)],
            env=os.environ | {"PYTHONPATH": str(pathlib.Path(__file__).parents[2])},
            stderr=subprocess.PIPE,
            text=True,
        )
        for seed in range(3)
    ]
    for process in processes:
        _, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        assert err == ""
    # Two sixteenths more than the bound at most; nothing half written.
    assert 20 * size < total(tmp_path) <= 36 * size
    assert all(name.endswith(".pixels") for name in entries(tmp_path))


def test_settings(tmp_path):
    values: Any = defaults.get_config()
    values.cache.dir, values.cache.images_gb = str(tmp_path), 2.5e-6
    cache = open_cache(validate(values).cache)
    assert cache is not None
    for number in range(30):  # 2500 bytes hold some of them
        cache.put(key(number), decoded(number))
    assert set(entries(tmp_path)) == {"images"}
    assert 1500 < total(tmp_path / "images") <= 2500
    values.cache.images_gb = 0
    assert open_cache(validate(values).cache) is None


class TestRuns:
    """What fitting, evaluating and predicting do with the cache."""

    @pytest.fixture
    def config(self, tmp_path: pathlib.Path) -> Any:
        generate(tmp_path, n_train=5, n_test_good=2, n_test_per_defect=1, size=64)
        cache = str(tmp_path / "cache")
        return small.values(tmp_path, **{"outputs.figures": "all", "cache.dir": cache})

    def run(self, mode: str, config: Config, workdir: pathlib.Path) -> None:
        pattern = str(config.dataset.root / "part" / "test") if mode == "predict" else None
        checkpoint = workdir / "checkpoint"
        modes.run(mode, config, workdir, checkpoint, pattern)

    def test_a_second_run_decodes_nothing(self, config, tmp_path, monkeypatch):
        for place in ("first", "second"):
            self.run("train_and_eval", validate(config), tmp_path / place)
            monkeypatch.setattr(Image, "open", None)
        for name in ("metrics.json", "scores.csv"):
            first, second = (tmp_path / place / name for place in ("first", "second"))
            assert first.read_bytes() == second.read_bytes()

    def test_switched_off_nothing_is_written(self, config, tmp_path):
        config.cache.images_gb = 0
        self.run("train_and_eval", validate(config), tmp_path / "results")
        assert not (tmp_path / "cache" / "images").exists()

    def test_predictions_push_nothing_out(self, config, tmp_path):
        self.run("train", validate(config), tmp_path / "results")
        before = entries(tmp_path / "cache" / "images")
        assert len(before) == 5
        self.run("predict", validate(config), tmp_path / "results")
        assert entries(tmp_path / "cache" / "images") == before


@hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
@hypothesis.given(
    st.integers(150, 1500),
    st.lists(st.tuples(st.booleans(), st.integers(0, 5)), max_size=25),
)
def test_as_a_dictionary_that_forgets(limit: int, uses: list[tuple[bool, int]]):
    """Whatever is put and asked for in whatever order: what it was, or nothing; bounded."""
    sizes = {n: len(image_cache._pack(key(n), decoded(n, (5, 3 + n)))) for n in range(6)}
    with tempfile.TemporaryDirectory() as name:
        folder, put = pathlib.Path(name), set()
        cache = ImageCache(folder, limit)
        for is_put, number in uses:
            if is_put:
                cache.put(key(number), decoded(number, (5, 3 + number)))
                put.add(number)
            found = cache.get(key(number))
            if found is not None:
                assert number in put
                assert_same(found, decoded(number, (5, 3 + number)))
            elif is_put:  # what was put last is there, if there is room for it at all
                assert sizes[number] > limit
            elif number in put:  # nothing goes while there is room, with a sixteenth to spare
                most = max(sizes[n] for n in put)
                assert sum(sizes[n] for n in put) > limit - max(limit // 16, most)
            assert total(folder) <= limit
