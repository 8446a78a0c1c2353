"""A synthetic inspection category, drawn on demand: the demo that needs no download.

The one category, `part`, is a brushed-metal cover with screws, a boss, a connector,
a label and a plug, photographed from above. It is written as PNG files in MVTec AD's
layout, so that all later stages read it like real data:

    root/part/train/good/000.png ..
    root/part/test/{good,scratch,stain,missing_piece,misplaced_part}/000.png ..
    root/part/ground_truth/<defect>/000_mask.png ..
    root/part/synthetic.json             what was generated, by which version

`synthetic_part` draws the images.
"""

import concurrent.futures
import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator

import numpy as np
from PIL import Image

from padim_jax.data.layouts.mvtec_ad import mvtec_ad
from padim_jax.data.records import GOOD, Record
from padim_jax.data.synthetic_part import DEFECTS, photograph
from padim_jax.errors import UserError
from padim_jax.system import locks, paths
from padim_jax.system.paths import Path

CATEGORY = "part"
VERSION = 1  # raise it with each change to the pixels: older folders are regenerated
MARKER = "synthetic.json"
GENERATOR = "padim_jax.data.layouts.synthetic"


def synthetic(root: Path, category: str) -> list[Record]:
    """List the images of the synthetic category, drawing them first if they are missing.

    Args:
      root: folder for the category folder; created if needed.
      category: "part".

    Returns:
      Records of train/good, then of test/*, as `mvtec_ad` gives them.

    Raises:
      UserError: another category is given, or see `generate`.
    """
    if category != CATEGORY:
        raise UserError(
            f"config.category={category!r}: the synthetic dataset has no such category; "
            f"allowed: {CATEGORY!r}"
        )
    if not isinstance(root, pathlib.Path):
        raise UserError(
            f"config.dataset.root={root}: the synthetic dataset is drawn into a folder of this "
            "machine only; name one, and copy what is drawn there if you want it remote (it "
            "is in the layout of config.dataset.name=mvtec_ad)"
        )
    generate(root)
    return mvtec_ad(root, category)


def generate(
    root: pathlib.Path,
    *,
    seed: int = 0,
    n_train: int = 60,
    n_test_good: int = 12,
    n_test_per_defect: int = 7,
    size: int = 320,
) -> pathlib.Path:
    """Draw the category into `root/part`, unless exactly that is there already.

    Equal arguments give byte-identical files (with the same versions of NumPy, SciPy and
    Pillow). The folder appears in one step, when all is written. A folder made with other
    arguments or by another version, or one that lacks files, is replaced.

    Args:
      root: folder for the category folder; created if needed.
      seed: seed of everything random; not negative.
      n_train: number of good training images.
      n_test_good: number of good test images.
      n_test_per_defect: number of test images of each kind of defect.
      size: side of the images in pixels, at least 64.

    Returns:
      The category folder, `root/part`.

    Raises:
      UserError: `root/part` holds files that were not generated here, or cannot be written.
      ValueError: an argument is out of range.
    """
    if min(n_train, n_test_good, n_test_per_defect) < 1 or size < 64 or seed < 0:
        raise ValueError(
            f"{n_train=}, {n_test_good=}, {n_test_per_defect=}, {size=}, {seed=}; expected at "
            "least one image of each, a size of at least 64 and a seed of at least 0"
        )
    shots = _shots(n_train, n_test_good, n_test_per_defect)
    marker = {
        "generator": GENERATOR,
        "version": VERSION,
        "seed": seed,
        "n_train": n_train,
        "n_test_good": n_test_good,
        "n_test_per_defect": n_test_per_defect,
        "size": size,
        "files": [name for shot in shots for name in (shot.image, shot.mask) if name],
    }
    folder = root / CATEGORY
    if _is_current(folder, marker):
        return folder
    try:
        root.mkdir(parents=True, exist_ok=True)
        with locks.attempt(folder, wait=True):
            # Another process (one per host, say) may have made the same meanwhile.
            if not _is_current(folder, marker):
                for left in root.glob(f".{CATEGORY}-*"):  # of a killed process
                    shutil.rmtree(left)
                _replace(folder, shots, seed, size, marker)
    except OSError as error:
        raise UserError(
            f"config.dataset.root={root}: cannot write the synthetic dataset there: {error}. "
            "Free some space or point config.dataset.root at a folder you can write to"
        ) from error
    return folder


@dataclasses.dataclass(frozen=True)
class _Shot:
    """One photograph to take: `stream` selects its random numbers; names are POSIX paths."""

    kind: str
    stream: tuple[int, int]
    image: str
    mask: str | None


def _shots(n_train: int, n_test_good: int, n_test_per_defect: int) -> list[_Shot]:
    folders = [("train", GOOD, n_train), ("test", GOOD, n_test_good)]
    folders += [("test", defect, n_test_per_defect) for defect in DEFECTS]
    return [
        _Shot(
            kind=kind,
            stream=(number, n),
            image=f"{split}/{kind}/{n:03d}.png",
            mask=None if kind == GOOD else f"ground_truth/{kind}/{n:03d}_mask.png",
        )
        for number, (split, kind, count) in enumerate(folders)
        for n in range(count)
    ]


def _is_current(folder: pathlib.Path, marker: dict[str, object]) -> bool:
    """Return whether the folder matches the marker; raise UserError if it is not ours."""
    if not os.path.lexists(folder):
        return False
    try:
        found = json.loads((folder / MARKER).read_text())
        ours = found["generator"] == GENERATOR
        written = set(found["files"])
    except (OSError, ValueError, KeyError, TypeError):
        ours, found, written = False, None, set()
    if not ours:
        raise UserError(
            f"{folder}: exists already and was not made by the synthetic dataset (it has no "
            f"valid {MARKER}); it is left alone. Point config.dataset.root at another folder, "
            "or move this one away"
        )
    present = {path.relative_to(folder).as_posix() for path in _files(folder)}
    if found == marker and written <= present:
        return True
    foreign = sorted(present - written - {MARKER})
    if foreign:
        raise UserError(
            f"{folder}: must be generated anew, but holds {foreign[0]}, which was not "
            f"generated ({len(foreign)} such files). Move what you want to keep, then delete "
            "the folder"
        )
    return False


def _files(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yield the non-empty files below a folder, except hidden ones."""
    for path in folder.rglob("*"):
        hidden = path.name.startswith(".") or paths.is_system_file(path.name)
        if path.is_file() and path.stat().st_size and not hidden:
            yield path


def _write(folder: pathlib.Path, shot: _Shot, seed: int, size: int) -> None:
    image, mask = photograph(shot.kind, np.random.default_rng([seed, *shot.stream]), size)
    _save(folder / shot.image, image)
    if shot.mask:
        _save(folder / shot.mask, np.where(mask, np.uint8(255), np.uint8(0)))


def _replace(
    folder: pathlib.Path, shots: list[_Shot], seed: int, size: int, marker: dict[str, object]
) -> None:
    # A hidden sibling: on the same file system, and never listed as a category.
    with tempfile.TemporaryDirectory(prefix=f".{CATEGORY}-", dir=folder.parent) as work:
        fresh = pathlib.Path(work, "new")
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(lambda shot: _write(fresh, shot, seed, size), shots))
        (fresh / MARKER).write_text(json.dumps(marker, indent=1))
        with contextlib.suppress(FileNotFoundError):
            folder.replace(pathlib.Path(work, "old"))
        fresh.replace(folder)


def _save(path: pathlib.Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Noise hardly compresses: a fixed low level is nearly as small, and fast.
    Image.fromarray(pixels).save(path, compress_level=1)
