"""What one run compiles the next one loads; damage and bad folders cost time, nothing else."""

import os
import pathlib
import shutil
from collections.abc import Callable, Iterator

import jax
import numpy as np
import pytest

from padim_jax import compilation_cache
from padim_jax.config import CacheConfig

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
def config(tmp_path: pathlib.Path) -> CacheConfig:
    return CacheConfig(tmp_path / "cache", 0.0, True)


def compute(factor: float) -> list[float]:
    """One program per factor, new to JAX with each call."""
    return np.asarray(jax.jit(lambda x: factor * x)(X)).tolist()


def run(config: CacheConfig, factor: float = 2.0) -> list[float]:
    with compilation_cache.enabled(config):
        return compute(factor)


def entries(config: CacheConfig) -> list[pathlib.Path]:
    return sorted(pathlib.Path(config.folder, "compilation").glob("*-cache"))


def entry(config: CacheConfig) -> pathlib.Path:
    (found,) = entries(config)
    return found


def test_second_run_loads_what_the_first_compiled(config: CacheConfig, events: list[str]):
    assert run(config) == [0, 2, 4, 6]
    first = entry(config).read_bytes()
    assert run(config) == [0, 2, 4, 6]
    assert events == ["misses", "hits"]
    assert entry(config).read_bytes() == first


def test_other_programs_have_other_entries(config: CacheConfig, events: list[str]):
    assert [run(config, 2.0), run(config, 3.0), run(config, 2.0)] == [
        [0, 2, 4, 6],
        [0, 3, 6, 9],
        [0, 2, 4, 6],
    ]
    assert events == ["misses", "misses", "hits"]
    assert len(entries(config)) == 2


def test_settings_are_those_of_before_afterwards(config: CacheConfig, events: list[str]):
    before = settings()

    def fail() -> None:
        with compilation_cache.enabled(config):
            assert settings() != before
            compute(2.0)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert settings() == before
    compute(3.0)
    assert events == ["misses"]  # that within the block
    run(config)
    assert events == ["misses", "hits"]  # and that is whole all the same


def test_folders_take_turns(config: CacheConfig, tmp_path: pathlib.Path, events: list[str]):
    """JAX alone would stay with the first."""
    other = CacheConfig(tmp_path / "other", 0.0, True)
    run(config)
    run(other)
    assert events == ["misses", "misses"]
    assert entry(config).name == entry(other).name


def test_switched_off(tmp_path: pathlib.Path, events: list[str]):
    before = settings()
    with compilation_cache.enabled(CacheConfig(tmp_path / "cache", 0.0, False)):
        assert settings() == before
        compute(2.0)
    assert events == []
    assert list(tmp_path.iterdir()) == []


def test_folder_of_the_users_choice_stays(
    config: CacheConfig, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
    """As with JAX_COMPILATION_CACHE_DIR."""
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "mine"))
    try:
        before = settings()
        with compilation_cache.enabled(config):
            assert settings() == before
    finally:
        jax.config.update("jax_compilation_cache_dir", None)
    assert not config.folder.exists()


@pytest.mark.parametrize("taken", ["cache", "cache/compilation"])
def test_unusable_folder_is_told(
    taken: str,
    config: CacheConfig,
    tmp_path: pathlib.Path,
    events: list[str],
    capsys: pytest.CaptureFixture[str],
):
    (tmp_path / taken).parent.mkdir(exist_ok=True)
    (tmp_path / taken).write_text("mine")
    assert run(config) == [0, 2, 4, 6]
    assert events == []
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith(f"warning: {config.folder / 'compilation'}: compiled programs ")
    assert "--config.cache.dir" in line
    assert (tmp_path / taken).read_text() == "mine"


def flip(path: pathlib.Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: pathlib.Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def empty(path: pathlib.Path) -> None:
    path.write_bytes(b"")


def drop(path: pathlib.Path) -> None:
    path.unlink()


@pytest.mark.parametrize("damage", [flip, truncate, empty, drop])
@pytest.mark.parametrize("victim", ["-cache", "-sha256"])
def test_damage_is_compiled_again(
    victim: str,
    damage: Callable[[pathlib.Path], None],
    config: CacheConfig,
    events: list[str],
):
    run(config)
    (path,) = pathlib.Path(config.folder, "compilation").glob(f"*{victim}")
    damage(path)
    # Warnings are errors: JAX would give one for what it cannot decompress.
    assert run(config) == [0, 2, 4, 6]
    assert run(config) == [0, 2, 4, 6]
    assert events == ["misses", "misses", "hits"]


def test_another_programs_entry_is_not_run(config: CacheConfig, tmp_path: pathlib.Path):
    """Intact for JAX, which runs it: damage that it does not see has the same effect."""
    run(config, 3.0)
    wrong = entry(config).read_bytes()
    shutil.rmtree(config.folder)
    run(config, 2.0)
    entry(config).write_bytes(wrong)
    assert run(config, 2.0) == [0, 2, 4, 6]


def test_interrupted_run_leaves_nothing_to_load(config: CacheConfig, events: list[str]):
    """A write may have been cut off; what was not closed in order has no seal."""
    folder = config.folder / "compilation"
    run(config)
    (seal,) = folder.glob("*-sha256")
    seal.unlink()
    with compilation_cache.enabled(config):
        assert entries(config) == []
    assert events == ["misses"]


def test_size_is_bounded(config: CacheConfig, monkeypatch: pytest.MonkeyPatch):
    run(config, 2.0)
    first = entry(config)
    monkeypatch.setattr(compilation_cache, "_LIMIT", 2 * first.stat().st_size)
    for factor in range(3, 9):
        run(config, float(factor))
    left = entries(config)
    assert 1 <= len(left) <= 2
    assert first not in left
    run(config, 8.0)
    seals = pathlib.Path(config.folder, "compilation").glob("*-sha256")
    assert {path.name.removesuffix("-sha256") for path in seals} == {
        path.name.removesuffix("-cache") for path in left
    }


def test_other_files_are_left_alone(config: CacheConfig):
    mine = config.folder / "compilation" / "notes.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    run(config)
    run(config)
    assert mine.read_text() == "mine"


def test_nobody_else_can_put_programs_there(config: CacheConfig):
    run(config)
    assert pathlib.Path(config.folder, "compilation").stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("mode", [0o770, 0o702, 0o1777])
def test_folders_above_that_others_may_write_to(
    mode: int, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
):
    """They could put a folder of their own in the place of the private one."""
    parent = tmp_path / "parent"
    config = CacheConfig(parent / "mine" / "cache", 0.0, True)
    run(config)
    parent.chmod(mode)
    assert capsys.readouterr().err == ""
    run(config)
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
    config = CacheConfig(parent / "mine" / "cache", 0.0, True)
    run(config)
    original = pathlib.Path.stat

    def stat(self: pathlib.Path, **options: bool) -> os.stat_result:
        status = original(self, **options)
        if self != parent:
            return status
        return os.stat_result([*status[:4], os.geteuid() + 1, *status[5:]])

    monkeypatch.setattr(pathlib.Path, "stat", stat)
    run(config)
    assert f"others may write there, as {parent} lets them" in capsys.readouterr().err


def test_link_in_a_folder_that_others_may_write_to(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "mine").mkdir(mode=0o700)
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared").chmod(0o777)
    (tmp_path / "shared" / "link").symlink_to(tmp_path / "mine")
    run(CacheConfig(tmp_path / "shared" / "link", 0.0, True))
    assert f"as {tmp_path / 'shared'} lets them" in capsys.readouterr().err


def test_folders_that_are_made_are_private(tmp_path: pathlib.Path):
    before = os.umask(0)
    try:
        run(CacheConfig(tmp_path / "new" / "cache", 0.0, True))
    finally:
        os.umask(before)
    assert (tmp_path / "new").stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("theirs", ["mode", "owner"])
def test_programs_that_others_may_have_put_there_are_not_run(
    theirs: str,
    config: CacheConfig,
    events: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    run(config)
    if theirs == "mode":
        pathlib.Path(config.folder, "compilation").chmod(0o770)
    else:  # as if another user had made the folder, who keeps the right to write to it
        uid = os.geteuid()
        monkeypatch.setattr(os, "geteuid", lambda: uid + 1)
        monkeypatch.setattr(compilation_cache, "_TRUSTED", ())
    events.clear()
    assert run(config) == [0, 2, 4, 6]
    assert events == []
    assert "others may write there" in capsys.readouterr().err
