#!/usr/bin/env bash
# Sets everything up and runs PaDiM on a category that the program draws itself: no
# download of data or weights. Results: results/synthetic_part. Further arguments go to
# the program, as in: bash launch/demo.sh --config.outputs.figures=all
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
exec "$VENV/bin/python" -m padim_jax.main --config=configs/demo.py "$@"
