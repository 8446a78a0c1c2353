#!/usr/bin/env bash
# Runs the program as N processes of this machine, which talk over loopback:
#
#   bash launch/local_processes.sh N [ARGUMENTS OF padim_jax.main]
#   bash launch/local_processes.sh 2 --config=configs/demo.py
#
# DEVICES=K gives each K devices of the CPU (default: 1). GPUs are shared out evenly where
# CUDA_VISIBLE_DEVICES names them, as in CUDA_VISIBLE_DEVICES=0,1,2,3. PYTHON names the
# interpreter; otherwise .venv is set up as by launch/demo.sh.
#
# SIGTERM and Ctrl-C reach every process. Messages of processes other than 0 carry their
# number. The exit code is 0 if all end well, otherwise that of the process that failed first;
# others that still run 10 seconds later are killed, as srun and mpirun do.

set -euo pipefail

usage() {
  echo "usage: bash launch/local_processes.sh N [ARGUMENTS], N from 1" >&2
  exit 2
}

count="${1:-}"
[[ "$count" =~ ^[1-9][0-9]*$ ]] || usage
shift

if [ -n "${PYTHON:-}" ]; then
  cd "$(dirname "${BASH_SOURCE[0]}")/.."
else
  . "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
  PYTHON="$VENV/bin/python"
fi

IFS=, read -ra gpus <<< "${CUDA_VISIBLE_DEVICES:-}"
if [ "${#gpus[@]}" -gt 0 ] && [ $(( ${#gpus[@]} % count )) -ne 0 ]; then
  echo "error: CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES: ${#gpus[@]} GPUs cannot be shared out to $count processes evenly" >&2
  exit 2
fi
share=$(( ${#gpus[@]} / count ))

# Below those that the system hands out to connections; free if nobody answers.
port=$(( 20000 + (RANDOM << 15 | RANDOM) % 10000 ))
while (exec 3<> "/dev/tcp/127.0.0.1/$port") 2> /dev/null; do
  port=$(( port + 1 ))
done

pids=()
send() {
  local pid
  for pid in "${pids[@]}"; do
    kill "-$1" "$pid" 2> /dev/null || true
  done
}
trap 'send KILL' EXIT
trap 'send TERM' TERM
trap 'send INT' INT

start() {
  local id="$1"
  shift
  if [ "$share" -gt 0 ]; then
    CUDA_VISIBLE_DEVICES="$(IFS=,; echo "${gpus[*]:id * share:share}")"
    export CUDA_VISIBLE_DEVICES
  fi
  export JAX_NUM_CPU_DEVICES="${DEVICES:-1}"
  exec "$PYTHON" -m padim_jax.main "$@" \
    --coordinator="127.0.0.1:$port" --processes="$count" --process_id="$id"
}

set -m # or the processes, being in the background, would not notice Ctrl-C
for (( id = 0; id < count; id++ )); do
  if [ "$id" -eq 0 ]; then
    start "$id" "$@" < /dev/null &
  else
    start "$id" "$@" < /dev/null 2> >(exec sed "s/^/[$id] /" >&2) &
  fi
  pids+=("$!")
done
set +m

code=0
failed_at=0
while [ "${#pids[@]}" -gt 0 ]; do
  running=()
  for pid in "${pids[@]}"; do
    if kill -0 "$pid" 2> /dev/null; then
      running+=("$pid")
      continue
    fi
    status=0
    wait "$pid" || status=$?
    if [ "$status" -ne 0 ] && [ "$code" -eq 0 ]; then
      failed_at="$SECONDS"
      code="$status"
    fi
  done
  pids=("${running[@]}")
  if [ "${#pids[@]}" -gt 0 ] && [ "$code" -ne 0 ] && [ $(( SECONDS - failed_at )) -ge 10 ]; then
    echo "error: a process failed; killed the ${#pids[@]} that waited for it" >&2
    break
  fi
  sleep 0.1
done
exit "$code"
