#!/usr/bin/env bash
# Lint, format and types, as a change must pass them: pinned ruff and pyright.
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh" dev
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/pyright --pythonpath .venv/bin/python
