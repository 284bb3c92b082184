#!/usr/bin/env bash
# Trains on this host: on all of its GPUs in one process, or in several processes on its CPU to try that out.
#
#   one_host.sh -- cifar10_rotation --method jtds --out out/jtds-0                 all GPUs of this host
#   one_host.sh --devices 2 -- cifar10_rotation --method jtds --out out/jtds-0     two of them
#   one_host.sh --processes 2 --devices-per-process 2 -- digits_noise --method jtds --out out/jtds-0     CPU only
#
# Settings
#   --devices N               devices of the one process (default: all GPUs, else 1); every batch is split over them
#   --shared                  other programs use these GPUs, too: take memory as it is needed, not most of it at once
#   --processes P             P processes on the CPU, as on P hosts: a test of --distributed without any
#   --devices-per-process D   with --processes: how many devices each of them pretends to have (default 1)
#   --port PORT               with --processes: a free port of this host (default: a random one)
#   --python PYTHON           default: .venv/bin/python if there is one, else python
#   --dry-run                 print the commands instead of running them
#
# Environment
#   CUDA_VISIBLE_DEVICES             which GPUs: 0,1
#   XLA_PYTHON_CLIENT_MEM_FRACTION   share of a GPU's memory taken at the start (here 0.9; jax by itself takes 0.75)
#   JAX_PLATFORMS=cpu                leave the GPUs alone
#
# SIGTERM saves and ends with status 143; so does Ctrl-C with --processes. Repeating the command goes on, from the
# newest checkpoint. See docs/launch.md.

set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

devices="" shared=false processes="" per_process="" port=$((20000 + RANDOM % 20000)) python=""
while [ $# -gt 0 ]; do
  case $1 in
    --devices) devices=$(value "$@"); shift 2 ;;
    --shared) shared=true; shift ;;
    --processes) processes=$(value "$@"); shift 2 ;;
    --devices-per-process) per_process=$(value "$@"); shift 2 ;;
    --port) port=$(value "$@"); shift 2 ;;
    --python) python=$(value "$@"); shift 2 ;;
    --dry-run) dry_run=true; shift ;;
    -h | --help) show_help "$0"; exit 0 ;;
    --) shift; break ;;
    *) fail "unknown setting '$1'; --help lists them, and what is for experiments.run comes after --" ;;
  esac
done
check_training "$@"
[ -z "$devices" ] || whole_number "$devices" --devices
[ -z "$processes" ] || whole_number "$processes" --processes
[ -z "$per_process" ] || whole_number "$per_process" --devices-per-process
whole_number "$port" --port
[ -z "$devices" ] || [ -z "$processes" ] || fail "--devices is for one process: else say --devices-per-process"
[ -z "$per_process" ] || [ -n "$processes" ] || fail "--devices-per-process needs --processes"
if [ -z "$python" ]; then
  python=python
  [ ! -x .venv/bin/python ] || python=.venv/bin/python
fi

installed() { # what jax was installed for; nothing of it is imported
  "$python" -c '
import importlib.util as u
kinds = {"jax_cuda13_plugin": "cuda13", "jax_cuda12_plugin": "cuda12", "jax_rocm7_plugin": "rocm7", "libtpu": "tpu"}
print(next((kind for module, kind in kinds.items() if u.find_spec(module)), "cpu"))'
}

gpus() { # how many NVIDIA GPUs this process may use
  if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
    printf '%s' "$CUDA_VISIBLE_DEVICES" | tr ',' '\n' | grep -c . || true
  elif command -v nvidia-smi >/dev/null; then
    nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true
  else
    echo 0
  fi
}

one_process() {
  local command=(env) kind count
  kind=$(installed)
  count=$(gpus)
  if [ "${JAX_PLATFORMS:-}" = cpu ]; then
    kind=cpu
  elif [ "$kind" = cpu ] && [ "$count" -gt 0 ]; then
    fail "$count GPUs here, but jax for CPU only: $python -m pip install 'jax[cuda13]', or set JAX_PLATFORMS=cpu"
  fi
  case $kind in
    cuda* | rocm*)
      [ -n "$devices" ] || [ "$count" -eq 0 ] || devices=$count
      if $shared; then
        command+=(XLA_PYTHON_CLIENT_PREALLOCATE=false)
      else
        command+=("XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.9}")
      fi
      ;;
    cpu) command+=("JAX_NUM_CPU_DEVICES=${devices:-1}") ;;
  esac
  command+=("$python" -m experiments.run "$@" --devices "${devices:-1}")
  echo "jax for $kind, ${devices:-1} device(s)" >&2
  if $dry_run; then quoted "${command[@]}"; else exec "${command[@]}"; fi
}

several_processes() {
  local logs index command status seen signals=0 result=0 pids=""
  logs=out/launch/$(hostname)
  $dry_run || mkdir -p "$logs"
  set -m # a process group each: Ctrl-C reaches this shell alone, which sends every process one SIGTERM
  trap 'signals=$((signals + 1)); kill -TERM $pids 2>/dev/null || true' INT TERM HUP
  for ((index = 0; index < processes; index++)); do
    command=(env JAX_PLATFORMS=cpu "JAX_NUM_CPU_DEVICES=${per_process:-1}" JAX_CPU_COLLECTIVES_IMPLEMENTATION=gloo
      "$python" -m experiments.run "$@" --distributed "127.0.0.1:$port,$processes,$index")
    if $dry_run; then
      quoted "${command[@]}"
    elif [ "$index" -eq 0 ]; then
      "${command[@]}" &
      pids="$pids $!"
    else
      "${command[@]}" >"$logs/process-$index.log" 2>&1 &
      pids="$pids $!"
    fi
  done
  $dry_run && return
  echo "processes:$pids; all but the first write to $logs" >&2
  for index in $pids; do
    while # a signal ends `wait`, not the process: wait again
      seen=$signals status=0
      wait "$index" || status=$?
      [ "$signals" -ne "$seen" ]
    do :; done
    [ "$status" -eq 0 ] || result=$status
  done
  return "$result"
}

if [ -n "$processes" ]; then several_processes "$@"; else one_process "$@"; fi
