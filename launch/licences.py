"""The licences of all that is installed, from its metadata, against those that are allowed.

    bash launch/audit.sh           # checks; exit code 1 if one is not allowed
    bash launch/audit.sh --write   # renews third_party/licences.md

The list in third_party is what this prints, so that a change of a licence is seen in a review.
"""

import argparse
import importlib.metadata
import pathlib
import re
import sys
from collections.abc import Iterable, Mapping

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

OURS = "padim-jax"
PYTHON = "Python {}.{}".format(*sys.version_info)
LIST = pathlib.Path(__file__).parents[1] / "third_party" / "licences.md"
# By SPDX: none of them asks that a program that only imports the library be licensed alike.
ALLOWED = {
    "0BSD",
    "Apache-2.0",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "BSD",  # which of them is not said
    "CC0-1.0",
    "HPND",
    "ISC",
    "MIT",
    "MIT-CMU",
    "MPL-2.0",  # of its own files only
    "PSF-2.0",
    "Unlicense",
    "Zlib",
}
# What is accepted although its licence is none of these: distribution -> (licence, why).
EXCEPTIONS: dict[str, tuple[str, str]] = {
    "docutils": (
        "Public Domain AND BSD AND GNU General Public License (GPL)",
        "builds the documentation; the GPL is that of an Emacs mode, which the wheel lacks",
    ),
}
# How distributions write it -> SPDX: the beginning of their licence field, of its text, or of
# a classifier, in small letters and without punctuation.
SPELLINGS = {
    "apache license version 2": "Apache-2.0",
    "apache 2": "Apache-2.0",
    "apache software license": "Apache-2.0",
    "3 clause bsd license": "BSD-3-Clause",
    "bsd license": "BSD",
    "isc license": "ISC",
    "license agreement for matplotlib": "PSF-2.0",
    "mit license": "MIT",
    "mozilla public license 2": "MPL-2.0",
    "osi approved apache software license": "Apache-2.0",
    "psfl": "PSF-2.0",
    "python software foundation license": "PSF-2.0",
}


def stated(metadata: importlib.metadata.PackageMetadata) -> str:
    """A distribution's licence as an SPDX expression, or as written where that is none."""
    (expression, *_) = metadata.get_all("License-Expression") or [""]
    (field, *_) = metadata.get_all("License") or [""]
    classifiers = [
        line.rpartition(" :: ")[2]
        for line in metadata.get_all("Classifier") or []
        if line.startswith("License :: ")
    ]
    if expression:
        return expression
    if field.strip() == "UNKNOWN":  # as old versions of setuptools wrote for none
        field = ""
    if field.strip() and "\n" not in field.strip():
        return spdx(field)
    if classifiers:
        return " AND ".join(spdx(name) for name in classifiers)
    return spdx(field) if field.strip() else "not stated"


def spdx(text: str) -> str:
    """The identifier that is meant by how a licence, or its text, begins."""
    words = " ".join(re.findall(r"[a-z0-9]+", text.lower()))
    for spelling, identifier in SPELLINGS.items():
        if words.startswith(spelling):
            return identifier
    return text.strip().splitlines()[0]


def allowed(expression: str) -> bool:
    """Whether one of alternatives, or otherwise all that an expression names, is allowed."""
    names = [name.strip("() ") for name in re.split(r" AND | OR ", expression)]
    choice = " OR " in expression and " AND " not in expression
    return (any if choice else all)(name in ALLOWED for name in names)


def needed(distributions: Mapping[str, importlib.metadata.Distribution]) -> set[str]:
    """What running the program takes, as opposed to testing it."""
    found: set[str] = set()
    waiting = [(OURS, "")]
    while waiting:
        name, extra = waiting.pop()
        if name not in distributions and name != OURS:
            continue  # of another platform
        for line in distributions[name].requires or []:
            requirement = Requirement(line)
            if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
                continue
            other = canonicalize_name(requirement.name)
            more = [each for each in requirement.extras if f"{other}[{each}]" not in found]
            if other not in found:
                waiting.append((other, ""))
            waiting += [(other, each) for each in more]
            found |= {other, *(f"{other}[{each}]" for each in more)}
    return {name for name in found if "[" not in name}


def table(distributions: Mapping[str, importlib.metadata.Distribution]) -> dict[str, str]:
    """A row of the list for each distribution but ours."""
    program = needed(distributions)
    rows = {}
    for name, found in sorted(distributions.items()):
        purpose = "program" if name in program else "tests"
        rows[name] = f"| {name} | {stated(found.metadata)} | {purpose} |"
    rows.pop(OURS, None)
    return rows


def page(rows: Iterable[str]) -> str:
    """The list as it lies in third_party."""
    return "\n".join(
        [
            "# Licences of what the project is built upon",
            "",
            f"From the metadata of the locked environment (`launch/locked/`), {PYTHON};",
            "nothing of it is in this repository. `program`: needed to run it; `tests`: for",
            "tests, checks and documentation only. Without optional packages (CUDA, PyTorch,",
            "object stores).",
            "Made by `bash launch/audit.sh --write`, and checked by `bash launch/audit.sh`.",
            "",
            "| distribution | licence | for |",
            "|---|---|---|",
            *rows,
            "",
        ]
    )


def problems(
    distributions: Mapping[str, importlib.metadata.Distribution], listed: str
) -> list[str]:
    """What is wrong with the licences, or with the list of them."""
    found = []
    for name, row in table(distributions).items():
        licence = stated(distributions[name].metadata)
        if not allowed(licence) and EXCEPTIONS.get(name, ("",))[0] != licence:
            found.append(f"{name}: {licence!r} is not among the allowed licences")
        # Another Python has other versions, which may state the same in other words. Not
        # whether there are more rows: what is installed depends on the platform too.
        if PYTHON in listed and row not in listed.splitlines():
            found.append(f"{name}: {LIST.name} does not have the row {row}")
    return found


def main() -> int:
    """Checks or renews the list; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true", help="renew the list")
    arguments = parser.parse_args()
    distributions: dict[str, importlib.metadata.Distribution] = {
        canonicalize_name(each.name): each for each in importlib.metadata.distributions()
    }
    if arguments.write:
        LIST.write_text(page(table(distributions).values()), encoding="utf-8")
    found = problems(distributions, LIST.read_text(encoding="utf-8"))
    for line in found:
        print(f"error: {line}")
    if found:
        print(
            "Renew the list with bash launch/audit.sh --write; allow a licence, or one "
            "distribution, in launch/licences.py, with the reason"
        )
    else:
        print(f"licences: those of {len(distributions) - 1} distributions are all allowed")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
