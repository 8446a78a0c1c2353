#!/usr/bin/env bash
# Lint, format and types, as a change must pass them: pinned ruff and pyright.
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh" locked
"$VENV/bin/ruff" check .
"$VENV/bin/ruff" format --check .
"$VENV/bin/pyright" --pythonpath "$VENV/bin/python"
