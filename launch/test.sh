#!/usr/bin/env bash
# Sets everything up and runs the whole test suite. Further arguments go to pytest, as
# in: bash launch/test.sh -k gaussian
#
# Four processes at a time, on the CPU alone.
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh" test
exec .venv/bin/python -m pytest --numprocesses=auto --maxprocesses=4 --dist=worksteal "$@"
