#!/usr/bin/env bash
# Sets up the locked environment and runs the whole test suite. Further arguments go to
# pytest, as in: bash launch/test.sh -k gaussian
#
# Four processes at a time, on the CPU alone.
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh" locked
exec "$VENV/bin/python" -m pytest --numprocesses=auto --maxprocesses=4 --dist=worksteal "$@"
