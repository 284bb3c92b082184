#!/usr/bin/env bash
# Trains on plain hosts that ssh reaches: one process on each, with all of its devices.
#
#   hosts.sh run  --hosts gpu1,gpu2 --folder /shared/auxjax -- cifar10_rotation --method jtds --out /shared/out/jtds-0
#   hosts.sh log  --hosts gpu1,gpu2 --folder /shared/auxjax
#   hosts.sh stop --hosts gpu1,gpu2 --folder /shared/auxjax
#
# Subcommands
#   run    starts the training on all hosts; it goes on when the ssh connection is lost, and repeating it resumes
#   log    whether it runs, and the last lines of its log, host by host
#   stop   SIGTERM on all hosts: the run saves and ends; `run` goes on from there
#
# Settings (or the variable in brackets)
#   --hosts A,B,...     [HOSTS]          what ssh takes: names or user@name; the first one coordinates
#   --folder FOLDER     [HOSTS_FOLDER]   the repository there, absolute or in the home folder (default auxjax)
#   --python PYTHON                      there, in the repository (default .venv/bin/python)
#   --coordinator NAME                   the first host as the others reach it (default: its name in --hosts)
#   --port PORT                          a free port of the first host that the others may reach (default 8476)
#   --env NAME=VALUE                     run: sets a variable on the hosts; may be repeated
#   --dry-run                            print the commands instead of running them
#
# ssh must get in without a password. The repository, the environment and the data must lie at the same place on every
# host, and --out on a disk they share. Logs are in FOLDER/out/launch/HOST/log. See docs/launch.md.

set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

case ${1:-} in
  run | log | stop) subcommand=$1; shift ;;
  -h | --help) show_help "$0"; exit 0 ;;
  *) fail "'${1:-}' is not a subcommand: expected run, log or stop; --help tells more" ;;
esac

hosts=${HOSTS:-} folder=${HOSTS_FOLDER:-auxjax} python=.venv/bin/python coordinator="" port=8476
while [ $# -gt 0 ]; do
  case $1 in
    --hosts) hosts=$(value "$@"); shift 2 ;;
    --folder) folder=$(value "$@"); shift 2 ;;
    --python) python=$(value "$@"); shift 2 ;;
    --coordinator) coordinator=$(value "$@"); shift 2 ;;
    --port) port=$(value "$@"); shift 2 ;;
    --env) pair=$(value "$@"); add_environment "$pair"; shift 2 ;;
    --dry-run) dry_run=true; shift ;;
    -h | --help) show_help "$0"; exit 0 ;;
    --) shift; break ;;
    *) fail "unknown setting '$1'; --help lists them, and what is for experiments.run comes after --" ;;
  esac
done
needed "$hosts" "which hosts? --hosts A,B,... or HOSTS"
whole_number "$port" --port
[ "$subcommand" != run ] || check_training "$@"

IFS=', ' read -r -a all <<<"$hosts"
[ -n "$coordinator" ] || coordinator=${all[0]##*@}

index=0
for host in "${all[@]}"; do
  case $subcommand in
    run)
      command=$(remote_start "$folder" "${environment[@]}" "$python" -m experiments.run "$@" \
        --distributed "$coordinator:$port,${#all[@]},$index")
      ;;
    log) command=$(remote_log "$folder") ;;
    stop) command=$(remote_stop "$folder") ;;
  esac
  # -n: ssh would read what is meant for this script.
  run ssh -n -o BatchMode=yes "$host" "$command"
  index=$((index + 1))
done
