#!/usr/bin/env bash
# Compares features that need no ImageNet on drawn categories, and writes one table. Arguments go
# to the program, as in: bash launch/features.sh --presets=best
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
exec "$VENV/bin/python" launch/features.py "$@"
