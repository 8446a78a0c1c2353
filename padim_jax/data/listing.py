"""Paths, folders and globs that a person gives -> images to score."""

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

UNKNOWN = "unknown"  # the defect type of an image of which nothing is known


def find(pattern: str, setting: str = "--input") -> list[Record]:
    """Lists the images to score, sorted; prints what was passed over.

    Args:
      pattern: an image file, a folder (images anywhere below it; see `files.walk`) or a
        glob (`**` for any depth), of this machine or remote. Hidden and system folders
        are passed over, but those that the pattern names.
      setting: what named them, for an error.

    Returns:
      Records whose relative paths start at the folder that all images share.

    Raises:
      UserError: there is none.
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
    """The images that match a glob, each once, and the hidden folders that were passed over."""
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
        hidden.update(above[-1:])  # the one that holds the others
        if not above:
            found.append(path)
    return _each_once(found), sorted(hidden)


def _glob(pattern: pathlib.Path) -> tuple[list[pathlib.Path], list[Path]]:
    """What matches a local glob, and the hidden folders with images that `**` passed over.

    Python's own would follow links from `**` in loops, of which two take for ever.
    """
    parts = pattern.parts
    start = parts.index("**") if "**" in parts else len(parts)
    # pathlib's own glob takes no absolute pattern.
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
    """Without those that are there by a link to a folder as well, sorted."""
    by_place: dict[str, Path] = {}
    # What is there without a link first.
    for path in sorted(files, key=lambda path: (_place(path) != _absolute(path), path)):
        by_place.setdefault(_place(path), path)
    return sorted(by_place.values())


def _place(path: Path) -> str:
    """Where a file is, links to folders resolved; a link to the file itself stays one."""
    if not isinstance(path, pathlib.Path):
        return os.fspath(path)
    return os.fspath(path.parent.resolve() / path.name)


def _absolute(path: Path) -> str:
    return os.fspath(paths.absolute(path))


def _is_listed(folder: pathlib.Path) -> bool:
    """As an image: so that it is refused, and not passed over."""
    return is_image(folder) and (folder.is_symlink() or not images_below(folder)[0])


def _common_folder(files: Sequence[Path]) -> Path:
    common = files[0].parent
    while not all(path.is_relative_to(common) for path in files):
        common = common.parent
    return common
