#!/usr/bin/env bash
# Builds the documentation, runs its notebooks, and fails on any warning, broken link or error
# in a notebook. The site: results/docs/index.html. Further arguments go to sphinx-build, as
# in: bash launch/docs.sh --define nb_execution_mode=off
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh" locked
exec "$VENV/bin/python" -m sphinx --fail-on-warning --keep-going --fresh-env --jobs=auto \
  --conf-dir docs "$@" . results/docs
