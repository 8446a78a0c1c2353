"""Fixtures and checks that hold for every test."""

import atexit
import datetime
import os
import pathlib
import random
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # as main.py does, and why

# As many devices everywhere; a GPU, if there is one, would be shared by many processes.
os.environ["JAX_PLATFORMS"] = "cpu"

# Compiling takes longer than what the tests compute. Without LLVM's optimisations it takes half
# as long; `optimized` has them, as the demo and tests/reliability do.
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "true"

# Nothing is read from or written to the caches of who runs the tests, by child processes
# neither. Before the imports, of which one may ask for the place.
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="padim_jax_tests_")

# What a sample is drawn by; the day's, unless another is given. The workers inherit it.
os.environ.setdefault("PADIM_JAX_SAMPLE", str(datetime.datetime.now().date()))

# What one test has compiled, the others of this run load: those of other workers, and child
# processes. Made by the first process, whose environment the workers inherit.
if "PYTEST_XDIST_WORKER" not in os.environ:
    COMPILED = tempfile.mkdtemp(prefix="padim_jax_compiled_")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = COMPILED
    os.environ["MPLCONFIGDIR"] = COMPILED + "/matplotlib"  # a list of fonts takes seconds
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.02"
    os.environ["JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES"] = "none"
    atexit.register(shutil.rmtree, COMPILED, ignore_errors=True)

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache
from jaxtyping import install_import_hook

# Every shape written in a signature is checked at run time, in every test. That makes importing
# the package twice as long where no bytecode is kept.
sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
install_import_hook("padim_jax", "beartype.beartype")

from padim_jax.devices import parallel  # noqa: E402 (after the hook)

# In a shell's background job Ctrl-C is ignored, and would be by all processes of the tests.
signal.signal(signal.SIGINT, signal.default_int_handler)

jax.config.update("jax_numpy_rank_promotion", "raise")
# Virtual ones, for the tests of many; all others have one (see `one_device`).
jax.config.update("jax_num_cpu_devices", 8)

atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)


@pytest.fixture(scope="session", autouse=True)
def one_device() -> Iterator[None]:
    """Runs use a single device, as they would without the virtual ones."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parallel, "every", lambda: parallel.Devices(1))
        yield


@pytest.fixture
def optimized() -> Iterator[None]:
    """Compile as users do, for tests of the compiled program itself."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture
def no_compilation_cache(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Neither this process nor its children use the cache of this run of the tests."""
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.delenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS")
    monkeypatch.delenv("JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES")
    folder = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_compilation_cache_dir", folder)
    compilation_cache.reset_cache()


QUICK = ("core", "config", "test_api.py")


@pytest.hookimpl(wrapper=True)
def pytest_collection_modifyitems(
    config: pytest.Config, items: list[pytest.Item]
) -> Iterator[None]:
    """Mark the quick ones, by which may be chosen; of what is chosen, draw the sample."""
    tests = pathlib.Path(__file__).parent
    for item in items:
        ours = item.path.is_relative_to(tests) and item.path.relative_to(tests).parts[0]
        # Programs of a real size are compiled for longer.
        if ours in QUICK and "optimized" not in getattr(item, "fixturenames", ()):
            item.add_marker("quick")
    yield
    left_out = set() if "PADIM_JAX_EVERYTHING" in os.environ else not_sampled(items)
    config.hook.pytest_deselected(items=list(left_out))
    items[:] = [item for item in items if item not in left_out]


def not_sampled(items: list[pytest.Item]) -> set[pytest.Item]:
    """Of each test or group that is marked as `sampled`, what is left out today."""
    groups: dict[tuple[str, int], list[pytest.Item]] = {}
    for item in items:
        if marker := item.get_closest_marker("sampled"):
            name = marker.kwargs.get("group", item.nodeid.partition("[")[0])
            groups.setdefault((name, marker.args[0]), []).append(item)
    left_out: set[pytest.Item] = set()
    for (name, count), cases in groups.items():
        rng = random.Random(f"{os.environ['PADIM_JAX_SAMPLE']} {name}")
        left_out.update(rng.sample(cases, max(0, len(cases) - count)))
    return left_out


def pytest_report_header() -> str:
    """Say how to draw this run's sample again."""
    if "PADIM_JAX_EVERYTHING" in os.environ:
        return "sample: everything"
    return f"sample: PADIM_JAX_SAMPLE={os.environ['PADIM_JAX_SAMPLE']}"


SHARED = pathlib.Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> pathlib.Path:
    """The reference material beside the checkout: real data, real weights, goldens."""
    if not SHARED.is_dir():
        pytest.skip(f"needs the reference data and weights at {SHARED}")
    return SHARED
