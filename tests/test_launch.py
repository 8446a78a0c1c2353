"""The set-up scripts, in a copy of the project with stand-ins for Python and the driver."""

import os
import pathlib
import shutil
import subprocess

import pytest

ROOT = pathlib.Path(__file__).parents[1]

# Tells its version, makes "environments" with itself in them, and notes everything else.
PYTHON = """#!/bin/sh
case "$*" in "-m pip --version") exit "${{STAND_IN_LACKS_PIP:-0}}" ;; esac
case "$1 $2" in
  "-c "*sys.executable*) echo "$0" ;;
  "-c import ensurepip") exit "${{STAND_IN_LACKS_ENSUREPIP:-0}}" ;;
  "-c "*"!= '{version}'"*) exit 0 ;;
  "-c "*) exit 1 ;;
  "--version "*) echo "Python {version}" ;;
  "-m venv")
    for last; do :; done
    case "$*" in *--clear*) rm -rf "$last" ;; esac
    mkdir -p "$last/bin" && cp "$0" "$last/bin/python" ;;
  *) echo "$@" >> "{log}" ; exit "${{STAND_IN_FAILS:-0}}" ;;
esac
"""


class Project:
    def __init__(self, folder: pathlib.Path):
        self.root, self.bin, self.log = folder / "project", folder / "bin", folder / "log"
        shutil.copytree(ROOT / "launch", self.root / "launch")
        shutil.copy(ROOT / "pyproject.toml", self.root)
        self.bin.mkdir()

    def stand_in(self, name: str, text: str) -> None:
        (self.bin / name).write_text(text)
        (self.bin / name).chmod(0o755)

    def python(self, name: str, version: str) -> None:
        self.stand_in(name, PYTHON.format(version=version, log=self.log))

    def run(self, script: str, **environment: str) -> tuple[int, str, list[str]]:
        """Exit code, output, and what the environment's Python was asked for."""
        self.log.unlink(missing_ok=True)
        done = subprocess.run(
            ["bash", str(self.root / "launch" / script)],
            env={
                # Only what stands in, and the ordinary tools.
                "PATH": f"{self.bin}:/usr/bin:/bin",
                "HOME": str(self.root),
                "PADIM_JAX_PYTHON": "",
                **environment,
            },
            capture_output=True,
            text=True,
            check=False,
        )
        asked = self.log.read_text().splitlines() if self.log.exists() else []
        return done.returncode, done.stdout + done.stderr, asked


@pytest.fixture
def project(tmp_path: pathlib.Path) -> Project:
    if os.path.exists("/proc/driver/nvidia/version"):  # noqa: PTH110
        pytest.skip("this machine has an NVIDIA driver; the scripts would always see it")
    made = Project(tmp_path)
    made.python("python3.12", "3.12")
    return made


def test_demo_sets_up_and_runs_the_main_job(project: Project):
    code, output, asked = project.run("demo.sh")
    assert code == 0, output
    assert asked[0].startswith("-m pip install")
    assert asked[0].endswith("-e .")
    assert asked[1:] == ["-m padim_jax.main --config=configs/demo.py"]


def test_second_run_installs_nothing(project: Project):
    project.run("demo.sh")
    assert project.run("demo.sh")[2] == ["-m padim_jax.main --config=configs/demo.py"]


def test_changed_dependencies_are_installed(project: Project):
    project.run("demo.sh")
    (project.root / "pyproject.toml").write_text("[project]\n")
    assert project.run("demo.sh")[2][0].startswith("-m pip install")


def test_interrupted_installation_is_not_taken_for_done(project: Project):
    assert project.run("demo.sh", STAND_IN_FAILS="1")[0] != 0
    assert project.run("demo.sh")[2][0].startswith("-m pip install")


def test_interrupted_environment_is_made_anew(project: Project):
    project.run("demo.sh")
    assert "creating .venv" not in project.run("demo.sh")[1]
    assert "creating .venv" in project.run("demo.sh", STAND_IN_LACKS_PIP="1")[1]


PYTEST = "-m pytest --numprocesses=auto --maxprocesses=4 --dist=worksteal"


def test_tests_get_what_is_locked_by_hash_and_nothing_else(project: Project):
    _, output, asked = project.run("test.sh")
    assert "creating .venv-locked" in output
    *installed, check, tests = asked
    assert (check.split()[:3], tests) == (["-m", "pip", "check"], PYTEST)
    *locked, ours = installed
    assert [line.split()[-1] for line in locked] == [
        "launch/locked/build.txt",
        "launch/locked/test.txt",
    ]
    assert all("--require-hashes" in line for line in locked)
    # Nothing but the first brings what was not asked for, or builds with what is not locked.
    assert all("--no-deps --no-build-isolation" in line for line in installed[1:])
    assert ours.endswith("-e .")
    assert project.run("test.sh")[2] == [PYTEST]


def test_a_renewed_lock_makes_the_environment_anew(project: Project):
    project.run("test.sh")
    left = project.root / ".venv-locked" / "left_over"
    left.touch()
    lock = project.root / "launch" / "locked" / "test.txt"
    lock.write_text(lock.read_text() + "# renewed\n")
    assert project.run("test.sh")[2][-1] == PYTEST
    assert not left.exists()


def test_a_locked_environment_that_does_not_fit_together_is_not_used(project: Project):
    code, _, asked = project.run("test.sh", STAND_IN_FAILS="1")
    assert code != 0
    assert asked[0].startswith("-m pip install")
    assert project.run("test.sh")[2][0] == asked[0]


def test_nvidia_driver_brings_cuda_to_the_program(project: Project):
    project.stand_in("nvidia-smi", "#!/bin/sh\nexit 0\n")
    assert project.run("demo.sh")[2][0].endswith("-e .[cuda12]")
    assert "cuda" not in " ".join(project.run("test.sh")[2])  # tests run on the CPU


def test_a_driver_that_does_not_answer_does_not(project: Project):
    project.stand_in("nvidia-smi", "#!/bin/sh\nexit 9\n")
    assert project.run("demo.sh")[2][0].endswith("-e .")


def test_newest_python_wins(project: Project):
    project.python("python3.13", "3.13")
    project.python("python3", "3.11")
    assert "3.13" in project.run("demo.sh")[1]


def test_an_interpreter_that_does_not_run_is_passed_over(project: Project):
    # As pyenv's stand-in for a version that is installed but not selected.
    project.stand_in("python3.13", "#!/bin/sh\nexit 127\n")
    assert "3.12" in project.run("demo.sh")[1]


def test_python_without_ensurepip_gets_pip_from_outside(project: Project):
    code, output, asked = project.run("demo.sh", STAND_IN_LACKS_ENSUREPIP="1")
    assert code == 0, output
    assert asked[0] == "-m pip --python .venv/bin/python install --quiet pip"
    assert asked[1].startswith("-m pip install")


def test_no_supported_python(project: Project):
    for name in ("python3.13", "python3.12", "python3.11", "python3"):
        project.stand_in(name, "#!/bin/sh\nexit 1\n")
    code, output, asked = project.run("demo.sh")
    assert code != 0
    assert not asked
    assert "install one" in output
