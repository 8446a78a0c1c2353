"""What one run compiles the next one loads; damage and bad folders cost time, nothing else."""

import os
import pathlib
from collections.abc import Iterator

import jax
import numpy as np
import pytest

from padim_jax.system import compilation_cache

pytestmark = pytest.mark.usefixtures("no_compilation_cache")

SETTINGS = (
    "jax_compilation_cache_dir",
    "jax_compilation_cache_max_size",
    "jax_persistent_cache_min_compile_time_secs",
    "jax_persistent_cache_enable_xla_caches",
)
X = np.arange(4, dtype=np.float32)


def settings() -> dict[str, object]:
    return {name: getattr(jax.config, name) for name in SETTINGS}


@pytest.fixture
def events() -> Iterator[list[str]]:
    """What JAX's cache is asked for: "hits", and "misses" that it then keeps."""
    found = []

    def listen(event: str, **_: object) -> None:
        if event.startswith("/jax/compilation_cache/cache_"):
            found.append(event.rpartition("_")[2])

    jax.monitoring.register_event_listener(listen)
    yield found
    jax.monitoring.unregister_event_listener(listen)


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    return tmp_path / "cache"


def compute(factor: float) -> list[float]:
    """One program per factor, new to JAX with each call."""
    return np.asarray(jax.jit(lambda x: factor * x)(X)).tolist()


def run(folder: pathlib.Path, factor: float = 2.0) -> list[float]:
    with compilation_cache.enabled(folder):
        return compute(factor)


def entries(folder: pathlib.Path) -> list[pathlib.Path]:
    return sorted(folder.glob("*-cache"))


def entry(folder: pathlib.Path) -> pathlib.Path:
    (found,) = entries(folder)
    return found


def test_second_run_loads_what_the_first_compiled(folder: pathlib.Path, events: list[str]):
    assert run(folder) == [0, 2, 4, 6]
    first = entry(folder).read_bytes()
    assert run(folder) == [0, 2, 4, 6]
    assert events == ["misses", "hits"]
    assert entry(folder).read_bytes() == first


def test_other_programs_have_other_entries(folder: pathlib.Path, events: list[str]):
    assert [run(folder, 2.0), run(folder, 3.0), run(folder, 2.0)] == [
        [0, 2, 4, 6],
        [0, 3, 6, 9],
        [0, 2, 4, 6],
    ]
    assert events == ["misses", "misses", "hits"]
    assert len(entries(folder)) == 2


def test_settings_are_those_of_before_afterwards(folder: pathlib.Path, events: list[str]):
    before = settings()

    def fail() -> None:
        with compilation_cache.enabled(folder):
            assert settings() != before
            compute(2.0)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert settings() == before
    compute(3.0)
    assert events == ["misses"]  # that within the block
    run(folder)
    assert events == ["misses", "hits"]  # and that is whole all the same


def test_folders_take_turns(folder: pathlib.Path, tmp_path: pathlib.Path, events: list[str]):
    """JAX alone would stay with the first."""
    other = tmp_path / "other"
    run(folder)
    run(other)
    assert events == ["misses", "misses"]
    assert entry(folder).name == entry(other).name


def test_switched_off(tmp_path: pathlib.Path, events: list[str]):
    before = settings()
    with compilation_cache.enabled(None):
        assert settings() == before
        compute(2.0)
    assert events == []
    assert list(tmp_path.iterdir()) == []


def test_folder_of_the_users_choice_stays(
    folder: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
    """As with JAX_COMPILATION_CACHE_DIR."""
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "mine"))
    try:
        before = settings()
        with compilation_cache.enabled(folder):
            assert settings() == before
    finally:
        jax.config.update("jax_compilation_cache_dir", None)
    assert not folder.exists()


@pytest.mark.parametrize("taken", ["above", "above/cache"])
def test_unusable_folder_is_told(
    taken: str,
    tmp_path: pathlib.Path,
    events: list[str],
    capsys: pytest.CaptureFixture[str],
):
    folder = tmp_path / "above" / "cache"
    (tmp_path / taken).parent.mkdir(exist_ok=True)
    (tmp_path / taken).write_text("mine")
    assert run(folder) == [0, 2, 4, 6]
    assert events == []
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith(f"warning: {folder}: compiled programs ")
    assert "--config.cache.dir" in line
    assert (tmp_path / taken).read_text() == "mine"


def test_an_entry_that_was_cut_off_is_compiled_again(
    folder: pathlib.Path, capsys: pytest.CaptureFixture[str]
):
    """By a full disk, or a process that was killed while it wrote."""
    run(folder)
    path = entry(folder)
    path.write_bytes(path.read_bytes()[:-9])
    capsys.readouterr()
    assert run(folder) == [0, 2, 4, 6]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: {folder}: compiled programs cannot be read, and are ")


def test_size_is_bounded(folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
    run(folder, 2.0)
    first = entry(folder)
    monkeypatch.setattr(compilation_cache, "_LIMIT", 2 * first.stat().st_size)
    for factor in range(3, 9):
        run(folder, float(factor))
    left = entries(folder)
    assert 1 <= len(left) <= 2
    assert first not in left


def test_other_files_are_left_alone(folder: pathlib.Path):
    mine = folder / "notes.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    run(folder)
    run(folder)
    assert mine.read_text() == "mine"


def test_nobody_else_can_put_programs_there(folder: pathlib.Path):
    run(folder)
    assert folder.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("mode", [0o770, 0o702, 0o1777])
def test_folders_above_that_others_may_write_to(
    mode: int, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
):
    """They could put a folder of their own in the place of the private one."""
    parent = tmp_path / "parent"
    folder = parent / "mine" / "cache"
    run(folder)
    parent.chmod(mode)
    assert capsys.readouterr().err == ""
    run(folder)
    message = capsys.readouterr().err
    if mode & 0o1000:  # sticky: nobody renames what is another's
        assert message == ""
    else:
        assert f"others may write there, as {parent} lets them" in message


def test_folder_above_of_another_user(
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    parent = tmp_path / "parent"
    folder = parent / "mine" / "cache"
    run(folder)
    original = pathlib.Path.stat

    def stat(self: pathlib.Path, **options: bool) -> os.stat_result:
        status = original(self, **options)
        if self != parent:
            return status
        return os.stat_result([*status[:4], os.geteuid() + 1, *status[5:]])

    monkeypatch.setattr(pathlib.Path, "stat", stat)
    run(folder)
    assert f"others may write there, as {parent} lets them" in capsys.readouterr().err


def test_link_in_a_folder_that_others_may_write_to(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "mine").mkdir(mode=0o700)
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared").chmod(0o777)
    (tmp_path / "shared" / "link").symlink_to(tmp_path / "mine")
    run(tmp_path / "shared" / "link")
    assert f"as {tmp_path / 'shared'} lets them" in capsys.readouterr().err


def test_folders_that_are_made_are_private(tmp_path: pathlib.Path):
    before = os.umask(0)
    try:
        run(tmp_path / "new" / "cache")
    finally:
        os.umask(before)
    assert (tmp_path / "new").stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("theirs", ["mode", "owner"])
def test_programs_that_others_may_have_put_there_are_not_run(
    theirs: str,
    folder: pathlib.Path,
    events: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    run(folder)
    if theirs == "mode":
        folder.chmod(0o770)
    else:  # as if another user had made the folder, who keeps the right to write to it
        uid = os.geteuid()
        monkeypatch.setattr(os, "geteuid", lambda: uid + 1)
        monkeypatch.setattr(compilation_cache, "_TRUSTED", ())
    events.clear()
    assert run(folder) == [0, 2, 4, 6]
    assert events == []
    assert "others may write there" in capsys.readouterr().err
