"""What the project is built upon and what it is built into: lock, licences, audit, wheel."""

import email.message
import importlib
import importlib.metadata
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = pathlib.Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
LOCKS = {path.stem: path for path in (ROOT / "launch" / "locked").glob("*.txt")}


@pytest.fixture(autouse=True)
def launch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "launch")


def module(name: str) -> Any:
    return importlib.import_module(name)


# ---- The lock -------------------------------------------------------------------------------


def pins(lock: str) -> dict[Requirement, list[str]]:
    """Each locked distribution with its hashes."""
    text = LOCKS[lock].read_text(encoding="utf-8").replace("\\\n", "")
    lines = [line for line in text.splitlines() if line.strip() and "#" not in line[:8]]
    split = [line.partition(" --hash=") for line in lines]
    return {Requirement(pin): (mark + rest).split() for pin, mark, rest in split}


def locked(lock: str, python: str, system: str, machine: str) -> dict[str, str]:
    """The versions that an interpreter gets."""
    environment = {
        "python_version": python,
        "python_full_version": f"{python}.0",
        "sys_platform": system,
        "platform_system": system.capitalize(),
        "platform_machine": machine,
        "os_name": "posix",
        "implementation_name": "cpython",
        "platform_python_implementation": "CPython",
        "extra": "",
    }
    found: dict[str, str] = {}
    for pin in pins(lock):
        if pin.marker is None or pin.marker.evaluate(environment):
            assert canonicalize_name(pin.name) not in found, pin
            (version,) = pin.specifier
            assert version.operator == "=="
            found[canonicalize_name(pin.name)] = version.version
    return found


def declared() -> list[Requirement]:
    """What pyproject.toml asks for, to run, test, check and document the project."""
    extras = PROJECT["project"]["optional-dependencies"]
    lines = [*PROJECT["project"]["dependencies"]]
    for extra in ("onnx", "openvino", "test", "docs", "dev"):
        lines += extras[extra]
    return [each for each in map(Requirement, lines) if each.name != PROJECT["project"]["name"]]


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
@pytest.mark.parametrize(
    ("system", "machine"), [("linux", "x86_64"), ("linux", "aarch64"), ("darwin", "arm64")]
)
def test_lock_agrees_with_the_project(python: str, system: str, machine: str):
    found = locked("test", python, system, machine)
    renew = "renew it: bash launch/lock.sh"
    for requirement in declared():
        version = found.get(canonicalize_name(requirement.name))
        assert version is not None, f"{requirement} is not locked; {renew}"
        assert requirement.specifier.contains(version), f"{requirement}: {version}; {renew}"
    (builder,) = map(Requirement, PROJECT["build-system"]["requires"])
    (version,) = locked("build", python, system, machine).values()
    assert builder.specifier.contains(version)


@pytest.mark.parametrize("lock", ["build", "test"])
def test_lock_names_content_and_no_place(lock: str):
    for pin, hashes in pins(lock).items():
        assert pin.url is None
        assert hashes, pin
        assert all(re.fullmatch("--hash=sha256:[0-9a-f]{64}", each) for each in hashes), pin
    text = LOCKS[lock].read_text(encoding="utf-8")
    assert not re.search(r"--(extra-)?index-url|--find-links|://|file:", text)


# ---- Licences -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"License-Expression": "MIT", "License": "GPL"}, "MIT"),
        ({"License": "Apache 2.0"}, "Apache-2.0"),
        ({"License": "ISC", "Classifier": "License :: OSI Approved :: MIT License"}, "ISC"),
        ({"Classifier": "License :: OSI Approved :: MIT License"}, "MIT"),
        (
            {
                "License": "UNKNOWN",
                "Classifier": "License :: OSI Approved :: ISC License (ISCL)",
            },
            "ISC",
        ),
        # The whole text instead of a name.
        ({"License": "\n   Apache License\n   Version 2.0, January 2004\n"}, "Apache-2.0"),
        ({"License": "GNU Lesser General Public License"}, "GNU Lesser General Public License"),
        ({"Classifier": "Topic :: Software Development"}, "not stated"),
    ],
)
def test_licence_as_it_is_stated(fields: dict[str, str], expected: str):
    metadata = email.message.Message()
    for name, value in fields.items():
        metadata[name] = value
    assert module("licences").stated(metadata) == expected


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("MIT", True),
        ("GPL-3.0-only", False),
        ("MIT OR GPL-3.0-only", True),
        ("MIT AND GPL-3.0-only", False),
        ("(MIT OR GPL-3.0-only) AND Zlib", False),  # what cannot be told is asked about
        ("(MIT OR Apache-2.0) AND Zlib", True),
        ("not stated", False),
        ("LGPL-2.1 WITH exception", False),
    ],
)
def test_licences_that_are_allowed(expression: str, expected: bool):
    assert module("licences").allowed(expression) is expected


def test_a_new_licence_is_noticed(tmp_path: pathlib.Path):
    def distribution(name: str, licence: str, *requires: str) -> Any:
        folder = tmp_path / f"{name}.dist-info"
        folder.mkdir(exist_ok=True)
        lines = [f"Name: {name}", f"License-Expression: {licence}"]
        lines += [f"Requires-Dist: {each}" for each in requires]
        (folder / "METADATA").write_text("\n".join(lines) + "\n")
        return importlib.metadata.PathDistribution(folder)

    licences = module("licences")
    installed = {
        "padim-jax": distribution("padim-jax", "MIT", "a[more]", "t; extra == 'test'"),
        "a": distribution("a", "MIT", "b; extra == 'more'"),
        "b": distribution("b", "ISC"),
        "t": distribution("t", "MIT"),
    }
    listed = licences.page(licences.table(installed).values())
    assert "| b | ISC | program |" in listed
    assert "| t | MIT | tests |" in listed
    assert licences.problems(installed, listed) == []
    installed["b"] = distribution("b", "AGPL-3.0-only")
    not_allowed, not_listed = licences.problems(installed, listed)
    assert "b: 'AGPL-3.0-only' is not among the allowed" in not_allowed
    assert "does not have the row | b | AGPL-3.0-only | program |" in not_listed


def test_the_list_of_licences_is_of_what_is_locked():
    text = (ROOT / "third_party" / "licences.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"^\| (\S+) \|", text, re.MULTILINE)) - {"distribution"}
    everything = {canonicalize_name(pin.name) for lock in LOCKS for pin in pins(lock)}
    on_linux = set(locked("test", "3.13", "linux", "x86_64"))
    assert on_linux <= listed <= everything, "renew it: bash launch/audit.sh --write"


# ---- Known vulnerabilities ------------------------------------------------------------------

CLEAN = {"name": "clean", "version": "1", "vulns": []}
SKIPPED = {"name": "ours", "skip_reason": "not found on PyPI"}
LEAK = {"id": "PYSEC-1", "aliases": ["CVE-1"], "fix_versions": ["3"]}
BAD = {"name": "bad", "version": "2", "vulns": [LEAK]}


@pytest.mark.parametrize(
    ("found", "message", "code", "said"),
    [
        ([CLEAN], "", 0, "1 of 1 locked distributions checked"),
        ([CLEAN, BAD], "", 1, "bad 2: PYSEC-1, CVE-1; mended in 3"),
        # pip-audit calls this "No known vulnerabilities found".
        ([SKIPPED], "", 0, "0 of 1 locked distributions checked\n  the others not: not found"),
        (None, "requests.exceptions.ConnectionError: pypi.org", 0, "not checked"),
        (None, "ImportError: no module", 1, "pip-audit failed: ImportError"),
    ],
)
def test_verdict_on_vulnerabilities(found: list | None, message: str, code: int, said: str):
    report = None if found is None else {"dependencies": found}
    got, text = module("audit").verdict(report, message)
    assert got == code
    assert said in text


# ---- The wheel ------------------------------------------------------------------------------


def build(kind: str, source: pathlib.Path, target: pathlib.Path) -> pathlib.Path:
    target.mkdir()
    program = f"import sys; from setuptools import build_meta as b; b.build_{kind}(sys.argv[1])"
    subprocess.run(
        [sys.executable, "-c", program, str(target)],
        cwd=source,
        env={**os.environ, "SOURCE_DATE_EPOCH": "1700000000"},
        capture_output=True,
        check=True,
    )
    (made,) = target.iterdir()
    return made


def test_wheel_has_all_of_the_package_and_runs(tmp_path: pathlib.Path):
    pytest.importorskip("setuptools", reason="needs setuptools (launch/test.sh brings it)")
    tree = tmp_path / "tree"
    leave_out = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "padim_jax", tree / "padim_jax", symlinks=True, ignore=leave_out)
    shutil.copytree(ROOT / "third_party", tree / "third_party")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    # As installers do it: the wheel of the source distribution.
    with tarfile.open(build("sdist", tree, tmp_path / "sdist")) as archive:
        archive.extractall(tmp_path, filter="data")
    (unpacked,) = tmp_path.glob("padim_jax-*")
    wheel = build("wheel", unpacked, tmp_path / "wheel")
    assert build("wheel", tree, tmp_path / "again").read_bytes() == wheel.read_bytes()

    with zipfile.ZipFile(wheel) as archive:
        inside = {name for name in archive.namelist() if ".dist-info/" not in name}
        archive.extractall(tmp_path / "installed")  # noqa: S202 (made just now)
    package = [path for path in (tree / "padim_jax").rglob("*") if path.is_file()]
    assert inside == {path.relative_to(tree).as_posix() for path in package}

    published = "import padim_jax.output.published as p; print(p.__file__, len(p.everything()))"
    weights = (
        "from padim_jax.models.weights import pretrained as p; "
        'print(p.load("none", "scattering", ("layer3",))[1])'
    )
    for arguments in (["-c", published], ["-c", weights], ["-m", "padim_jax.main", "--help"]):
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(tmp_path / "installed")},
            capture_output=True,
            text=True,
            check=False,
        )
        assert "padim_jax" in done.stdout, done.stderr
        assert "Traceback" not in done.stderr
