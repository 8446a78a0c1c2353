"""Checkpoints that are being written when the process is killed, at every change to files."""

import contextlib
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from test_checkpoint import ONE, Crash, load, make_fitted, same, save, start, steps

from padim_jax.errors import UserError
from padim_jax.store import checkpoint
from padim_jax.store.checkpoint import Fitted


def write_history(path: pathlib.Path) -> Iterator[tuple[list[Fitted], list[Any]]]:
    """Saves one checkpoint after the other.

    Yields:
      Before each: what there is then to load, if the next save ends at any time: the
      models of which one must be found, and the unfinished fits, None for none.
    """
    first, second = make_fitted(0), make_fitted(1, form="samples")
    fits = [make_fitted(seed, unfinished=f"train {seed}") for seed in (2, 3)]
    yield [], [None]
    save(path, first)
    yield [first], [None, fits[0]]
    save(path, fits[0])
    yield [first], fits
    save(path, fits[1])
    yield [first, second], [fits[1], None]
    with checkpoint.saving(path, second, ONE):
        pass
    yield [second, first], [None]
    with contextlib.suppress(Crash), checkpoint.saving(path, first, ONE):
        raise Crash


def on_change(act) -> None:
    """From now on `act` is called before every change that Python makes to files."""
    lock, changes = threading.RLock(), {"os.mkdir", "os.rename", "os.remove", "os.rmdir"}
    inside = threading.local()

    def hook(event: str, args: tuple) -> None:
        writes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_RDWR | 1)
        if (writes or event in changes) and not getattr(inside, "here", False):
            inside.here = True
            try:
                with lock:
                    act()
            finally:
                inside.here = False

    sys.addaudithook(hook)


def main_of_child(path: pathlib.Path, copies: pathlib.Path | None, kill: int) -> None:
    """Writes the history; copies the folder at every change, or ends at one of them."""
    stage, number = 0, 0

    def act() -> None:
        nonlocal number
        number += 1
        if number == kill:
            os.kill(os.getpid(), signal.SIGKILL)
        while copies is not None and path.exists():
            try:
                shutil.copytree(path, copies / f"{stage} {number}")
            except shutil.Error:  # another thread has renamed something meanwhile
                shutil.rmtree(copies / f"{stage} {number}")
            else:
                break

    on_change(act)
    for stage, _ in enumerate(write_history(path)):
        print(stage, flush=True)
    print(number, flush=True)


def child(*arguments: Any) -> subprocess.Popen[str]:
    folder = str(pathlib.Path(__file__).parent)
    source = (
        f"import sys; sys.path.append({folder!r}); import {__name__} as here; "
        "here.main_of_child(*map(eval, sys.argv[1:]))"
    )
    return start(source, *(repr(x) for x in arguments))


def require_sound(
    path: pathlib.Path, next_one: Fitted, models: list[Fitted], fits: list[Any]
) -> None:
    """What a save that was killed left is one of these, and in nobody's way."""
    if models:
        assert any(same(load(path), model) for model in models), steps(path)
    else:
        with contextlib.suppress(UserError):
            load(path)
    fit = checkpoint.load_unfinished(path, ONE)
    assert any(
        fit is None if wanted is None else fit is not None and same(fit, wanted)
        for wanted in fits
    ), steps(path)
    save(path, next_one)
    assert same(load(path), next_one)
    assert checkpoint.load_unfinished(path, ONE) is None
    assert len(steps(path)) == 1
    assert steps(path)[0].isdigit()


@pytest.fixture(scope="module")
def history(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return list(write_history(tmp_path_factory.mktemp("history") / "checkpoint"))


def roughly(path: pathlib.Path) -> set[str]:
    """Steps and their parts; of what is being written only that it is."""
    found = set()
    for entry in path.iterdir():
        found.add(entry.name)
        if entry.name.isdigit():
            found |= {f"{entry.name}/{part.name}" for part in entry.iterdir()}
    return found


class TestKilled:
    """Ended at any moment, it has saved what it had, and the next save mends the rest."""

    def test_state_at_every_change(self, history: list[Any], tmp_path: pathlib.Path):
        """The files as an end before each change to them would leave them."""
        copies = tmp_path / "copies"
        process = child(tmp_path / "checkpoint", copies, 0)
        _, errors = process.communicate(timeout=100)
        assert process.returncode == 0, errors
        seen, stages, next_one = set(), [], make_fitted(4)
        for found in sorted(copies.iterdir(), key=lambda x: int(x.name.split()[1])):
            stage = int(found.name.split()[0])
            if (state := (stage, *sorted(roughly(found)))) in seen:
                continue
            seen.add(state)
            stages.append(stage)
            require_sound(found, next_one, *history[stage])
        # All parts of it, and so many that the kinds of leftovers have been there.
        assert set(stages) == set(range(len(history)))
        assert len(seen) >= 12
        names = {name for _, *state in seen for name in state}
        assert any("orbax-checkpoint-tmp" in name for name in names)
        assert any(name.endswith(".deleted") for name in names)

    @pytest.mark.sampled(1)
    @pytest.mark.parametrize("number", range(4))
    def test_for_real(self, number: int, history: list[Any], tmp_path: pathlib.Path):
        rng = random.Random(f"{os.environ['PADIM_JAX_SAMPLE']} {number}")
        change = rng.randrange(10, 180)
        print(f"before change {change}")
        process = child(tmp_path / "checkpoint", None, change)
        out, errors = process.communicate(timeout=100)
        assert process.returncode == -signal.SIGKILL, errors
        stage = len(out.split()) - 1
        require_sound(tmp_path / "checkpoint", make_fitted(4), *history[stage])
