# Sourced by the scripts beside it: makes .venv with the newest supported Python and
# installs the project into it. Set-up is skipped when nothing has changed since the last.
#
#   . launch/environment.sh [EXTRA]     EXTRA: an optional dependency group, e.g. test
#
# PADIM_JAX_PYTHON names an interpreter to use instead of the newest one found.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

find_python() {
  if [ -n "${PADIM_JAX_PYTHON:-}" ]; then
    command -v "$PADIM_JAX_PYTHON" && return
    echo "PADIM_JAX_PYTHON=$PADIM_JAX_PYTHON: no such interpreter" >&2
    return 1
  fi
  local version candidate
  for version in 3.13 3.12 3.11; do
    # On PATH, or installed by pyenv without being selected (its shims then fail).
    for candidate in "python$version" python3 "${PYENV_ROOT:-$HOME/.pyenv}"/versions/"$version".*/bin/python; do
      if "$candidate" -c "import sys, venv, pip; sys.exit('%d.%d' % sys.version_info[:2] != '$version')" 2>/dev/null; then
        "$candidate" -c "import sys; print(sys.executable)"
        return
      fi
    done
  done
  echo "no Python 3.11, 3.12 or 3.13 with venv and pip found; install one (Debian: python3-venv)" >&2
  return 1
}

install_project() {
  local extras="${1:-}" python
  # The CUDA build where an NVIDIA driver is loaded; the CPU build otherwise.
  if [ -e /proc/driver/nvidia/version ] || nvidia-smi -L >/dev/null 2>&1; then
    extras="${extras:+$extras,}cuda12"
  fi
  # Its pip, and not only its Python: making it may have been interrupted.
  if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
    python="$(find_python)"
    echo "creating .venv with $("$python" --version) ($python)"
    if "$python" -c "import ensurepip" 2>/dev/null; then
      "$python" -m venv .venv
    else  # Debian's Python without python3-venv: its pip fills the environment
      "$python" -m venv --without-pip .venv
      "$python" -m pip --python .venv/bin/python install --quiet pip
    fi
  fi
  # The stamp holds what was installed for; an interrupted installation leaves none.
  local stamp=".venv/installed" wanted
  wanted="$(cat pyproject.toml; echo "extras: $extras")"
  if [ "$(cat "$stamp${extras:+-$extras}" 2>/dev/null)" != "$wanted" ]; then
    echo "installing padim_jax${extras:+[$extras]} into .venv (once)"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --upgrade -e ".${extras:+[$extras]}"
    printf '%s\n' "$wanted" > "$stamp${extras:+-$extras}"
  fi
}

install_project "${1:-}"
