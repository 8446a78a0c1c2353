"""Paths, folders and globs from the user -> images to score."""

import fnmatch
import glob
import os
import pathlib
from collections.abc import Sequence

from padim_jax.data.files import images_below, is_hidden_folder, is_image, passed_over
from padim_jax.data.records import Record
from padim_jax.errors import UserError
from padim_jax.system import paths, progress
from padim_jax.system.paths import Path

UNKNOWN = "unknown"  # the defect type of images without a known label


def find(pattern: str, setting: str = "--input") -> list[Record]:
    """List the images to score, sorted; print the folders that were passed over.

    Args:
      pattern: an image file, a folder (images anywhere below it; see `files.walk`) or a glob
        (`**` for any depth), local or remote. Hidden and system folders are passed over unless
        the pattern names them.
      setting: setting that contains the pattern, for error messages.

    Returns:
      Records whose relative paths start at the common folder of all images.

    Raises:
      UserError: there is no image.
    """
    given = paths.parse(pattern)
    found: list[Path]
    hidden: list[Path] = []
    if paths.is_folder(given):
        base = given
        found, hidden = images_below(given)
    elif given.exists():
        base, found = given.parent, [given]
    else:
        found, hidden = _matching(given, pattern)
        base = _common_folder(found) if found else given
    if text := passed_over(hidden):
        progress.say(text)
    if not found:
        raise UserError(
            f"{setting}={pattern}: no image there; expected an image file, a folder of images "
            f"or a quoted glob, as in '{setting}=parts/**/*.png'"
        )
    return [
        Record("test", path, None, 0, UNKNOWN, path.relative_to(base).as_posix())
        for path in found
    ]


def _matching(given: Path, pattern: str) -> tuple[list[Path], list[Path]]:
    """Return the images that match a glob, each once, and the hidden folders passed over."""
    matching: Sequence[Path]
    if not isinstance(given, pathlib.Path):
        matching, hidden = paths.glob(pattern), set[Path]()
    else:
        local, below = _glob(given)
        matching = [path for path in local if not path.is_dir() or _is_listed(path)]
        hidden = set(below)
    named = set(given.parts)
    found: list[Path] = []
    for path in matching:
        above = [x for x in path.parents if is_hidden_folder(x.name) and x.name not in named]
        hidden.update(above[-1:])  # the outermost hidden folder
        if not above:
            found.append(path)
    return _each_once(found), sorted(hidden)


def _glob(pattern: pathlib.Path) -> tuple[list[pathlib.Path], list[Path]]:
    """Return what matches a local glob, and the hidden folders with images below `**`.

    Python's own glob follows links from `**` in loops; two of them take forever.
    """
    parts = pattern.parts
    start = parts.index("**") if "**" in parts else len(parts)
    # pathlib's own glob accepts no absolute pattern.
    places = glob.glob(str(pathlib.Path(*parts[:start])))  # noqa: PTH207
    if start == len(parts):
        return list(map(pathlib.Path, places)), []
    found: list[pathlib.Path] = []
    hidden: list[Path] = []
    for place in map(pathlib.Path, places):
        if place.is_dir():
            below, passed = images_below(place, lambda name: not name.name.startswith("."))
            local = [path for path in below if isinstance(path, pathlib.Path)]
            found += [
                path for path in local if _matches(path.relative_to(place).parts, parts[start:])
            ]
            hidden += passed
    return found, hidden


def _matches(names: Sequence[str], pattern: Sequence[str]) -> bool:
    if not pattern:
        return not names
    if pattern[0] == "**":
        return _matches(names, pattern[1:]) or (bool(names) and _matches(names[1:], pattern))
    matching = bool(names) and fnmatch.fnmatch(names[0], pattern[0])
    return matching and _matches(names[1:], pattern[1:])


def _each_once(files: Sequence[Path]) -> list[Path]:
    """Return the files sorted, without those also reached by a link to a folder."""
    by_place: dict[str, Path] = {}
    # Paths without a link come first.
    for path in sorted(files, key=lambda path: (_place(path) != _absolute(path), path)):
        by_place.setdefault(_place(path), path)
    return sorted(by_place.values())


def _place(path: Path) -> str:
    """Return a file's path with links to folders resolved, but not the file's own link."""
    if not isinstance(path, pathlib.Path):
        return os.fspath(path)
    return os.fspath(path.parent.resolve() / path.name)


def _absolute(path: Path) -> str:
    return os.fspath(paths.absolute(path))


def _is_listed(folder: pathlib.Path) -> bool:
    """Return whether a folder with an image's name is listed as one, so that it is rejected."""
    return is_image(folder) and (folder.is_symlink() or not images_below(folder)[0])


def _common_folder(files: Sequence[Path]) -> Path:
    common = files[0].parent
    while not all(path.is_relative_to(common) for path in files):
        common = common.parent
    return common
