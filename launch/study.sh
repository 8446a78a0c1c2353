#!/usr/bin/env bash
# Measures variants of features and image scores on a folder of categories, and writes one
# table. Arguments go to the program, as in: bash launch/study.sh --root=data/mvtec_ad
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
exec "$VENV/bin/python" launch/study.py "$@"
