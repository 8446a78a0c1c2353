#!/usr/bin/env bash
# What the project is built upon: known vulnerabilities and licences of the locked environment.
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh" locked
"$VENV/bin/python" launch/audit.py
"$VENV/bin/python" launch/licences.py "$@"
