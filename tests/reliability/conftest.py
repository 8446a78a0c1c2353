"""The program as users run it: compiled with all optimisations, here and in child processes."""

import os

import jax

os.environ.pop("JAX_DISABLE_MOST_OPTIMIZATIONS", None)
jax.config.update("jax_disable_most_optimizations", False)
