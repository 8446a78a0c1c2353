#!/usr/bin/env bash
# Renews launch/locked/ after pyproject.toml has changed, for Python 3.11 to 3.13 and all
# platforms at once. What is locked stays where it still fits. Needs uv (pip install uv).
#
#   bash launch/lock.sh                          what has changed
#   bash launch/lock.sh --upgrade                everything to its newest release
#   bash launch/lock.sh --upgrade-package jax    one package
#
# Then: bash launch/audit.sh --write (new licences), bash launch/test.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

compile() {
  uv pip compile --quiet --universal --python-version=3.11 --generate-hashes \
    --custom-compile-command="bash launch/lock.sh" "$@"
}

# What builds wheels: of this project, and of those that have none.
python3 -c "import tomllib
print(*tomllib.load(open('pyproject.toml', 'rb'))['build-system']['requires'], sep='\n')" |
  compile "$@" --output-file=launch/locked/build.txt -
compile "$@" --extra=dev --output-file=launch/locked/test.txt pyproject.toml
