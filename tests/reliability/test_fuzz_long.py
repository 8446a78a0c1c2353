"""As `test_fuzz`, of other examples every day; of five times as many with
PADIM_JAX_EVERYTHING=1.

PADIM_JAX_NEW_EXAMPLES=1 in the environment draws others, and prints how to repeat one that
fails.
"""

import os
from collections.abc import Callable
from typing import Any

import fuzzing
import hypothesis
import pytest
from fuzzing import FORMS

pytestmark = [
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning"),
    # Which draw random numbers while the strategies do.
    pytest.mark.filterwarnings("ignore:Do not use the `random` module inside strategies"),
]


@pytest.fixture(scope="module", autouse=True)
def prepared() -> None:
    fuzzing.prepare()


def examples(count: int) -> Callable[[Any], Any]:
    """So many, if nothing is left out; a fifth, which the day decides."""
    if "PADIM_JAX_EVERYTHING" in os.environ or "PADIM_JAX_NEW_EXAMPLES" in os.environ:
        return fuzzing.examples(count)
    few = fuzzing.examples(count // 5)
    return lambda test: hypothesis.seed(os.environ["PADIM_JAX_SAMPLE"])(few(test))


@examples(1500)
@hypothesis.given(fuzzing.settings())
def test_settings(values):
    fuzzing.check_settings(values)


@examples(400)
@hypothesis.given(fuzzing.weights())
def test_weights(file):
    suffix, content = file
    fuzzing.check_weights(suffix, content.data)


@examples(400)
@hypothesis.given(fuzzing.damages(), fuzzing.st.sampled_from([".npz", ".safetensors", ".pth"]))
def test_damaged_weights(damage, suffix):
    fuzzing.check_weights(suffix, damage(fuzzing.encoded(fuzzing.tensors(), suffix)))


@examples(500)
@hypothesis.given(fuzzing.model_files())
def test_model_files_whose_checksum_is_right(file):
    form, content = file
    fuzzing.check_model_file(form, content.data)


@examples(500)
@hypothesis.given(fuzzing.st.sampled_from(FORMS), fuzzing.damages())
def test_damaged_model_files(form, damage):
    fuzzing.check_model_file(form, damage(fuzzing.model_content(form)), damaged=True)


@examples(100)
@hypothesis.given(fuzzing.checkpoints())
def test_checkpoints(case):
    fuzzing.check_checkpoint(*case)


@examples(1000)
@hypothesis.given(fuzzing.calibrations())
def test_calibrations(content):
    fuzzing.check_calibration(content)
