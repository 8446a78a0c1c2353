#!/usr/bin/env bash
# Sets everything up and runs the whole test suite. Further arguments go to pytest, as
# in: bash launch/test.sh -k gaussian
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh" test
exec .venv/bin/python -m pytest "$@"
