"""Fixtures and checks that hold for every test."""

import os
import pathlib

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # as main.py does, and why

import jax
import pytest
from jaxtyping import install_import_hook

# Every shape written in a signature is checked at run time, in every test.
install_import_hook("padim_jax", "beartype.beartype")

jax.config.update("jax_numpy_rank_promotion", "raise")

SHARED = pathlib.Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> pathlib.Path:
    """The reference material beside the checkout: real data, real weights, goldens."""
    if not SHARED.is_dir():
        pytest.skip(f"needs the reference data and weights at {SHARED}")
    return SHARED
