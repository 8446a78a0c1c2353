# Sourced by the scripts beside it: makes an environment with the newest supported Python and
# installs the project into it. Set-up is skipped when nothing has changed since the last.
#
#   . launch/environment.sh          .venv: the newest versions that pyproject.toml allows, and
#                                    CUDA builds where an NVIDIA driver answers
#   . launch/environment.sh locked   .venv-locked, for tests and checks: exactly what
#                                    launch/locked/ lists, checked by hash; CPU builds
#
# VENV is the environment's folder afterwards. PADIM_JAX_PYTHON names an interpreter to use
# instead of the newest one found.

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

make_environment() {  # [--clear]
  local python
  python="$(find_python)"
  echo "creating $VENV with $("$python" --version) ($python)"
  if "$python" -c "import ensurepip" 2>/dev/null; then
    "$python" -m venv "$@" "$VENV"
  else  # Debian's Python without python3-venv: its pip fills the environment
    "$python" -m venv --without-pip "$@" "$VENV"
    "$python" -m pip --python "$VENV/bin/python" install --quiet pip
  fi
}

install() {
  "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check "$@"
}

install_newest() {
  local extras=""
  if [ -e /proc/driver/nvidia/version ] || nvidia-smi -L >/dev/null 2>&1; then
    extras="[cuda12]"
  fi
  # Its pip, and not only its Python: making it may have been interrupted.
  "$VENV/bin/python" -m pip --version >/dev/null 2>&1 || make_environment
  once "$(cat pyproject.toml; echo "$extras")" install --upgrade -e ".$extras"
}

install_locked() {
  once "$(cat pyproject.toml launch/locked/*.txt)" make_locked
}

make_locked() {
  make_environment --clear  # nothing else is in it
  # Without isolation, or a build would fetch a setuptools of its own; so that comes first.
  # Wheels only, which run nothing when they are installed; promise has none.
  install --require-hashes --only-binary=:all: -r launch/locked/build.txt
  install --require-hashes --only-binary=:all: --no-binary=promise --no-deps \
    --no-build-isolation -r launch/locked/test.txt
  # As for pip: setuptools warns of editable installations in a dozen lines.
  PYTHONWARNINGS=ignore install --no-deps --no-build-isolation -e .
  "$VENV/bin/python" -m pip check --disable-pip-version-check
}

once() {  # WHAT_FOR COMMAND...
  # The stamp holds what was installed for; an interrupted installation leaves none.
  local stamp="$VENV/installed" wanted="$1"
  shift
  if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
    echo "installing padim_jax into $VENV (once)"
    rm -f "$stamp"
    "$@"
    printf '%s\n' "$wanted" > "$stamp"
  fi
}

if [ "${1:-}" = locked ]; then
  VENV=.venv-locked
  install_locked
else
  VENV=.venv
  install_newest
fi
