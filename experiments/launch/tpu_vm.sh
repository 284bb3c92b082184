#!/usr/bin/env bash
# Trains on a Google Cloud TPU VM slice, with as many hosts as it has.
#
#   tpu_vm.sh create --name my-tpu --zone us-west4-a --accelerator-type v5litepod-16 --spot
#   tpu_vm.sh setup  --name my-tpu --zone us-west4-a --bucket my-bucket
#   tpu_vm.sh run    --name my-tpu --zone us-west4-a -- cifar10_rotation --method jtds --out bucket/jtds-0
#   tpu_vm.sh log    --name my-tpu --zone us-west4-a
#   tpu_vm.sh fetch  --name my-tpu --zone us-west4-a --from bucket/jtds-0 --to out
#   tpu_vm.sh delete --name my-tpu --zone us-west4-a
#
# Subcommands
#   create   makes the slice; from then on it costs money, until it is deleted
#   setup    copies the last commit of this repository to all hosts (or clones a revision), installs it with jax[tpu],
#            and prints the version of jax on every host; repeat it to bring the hosts up to date
#   run      starts the training on all hosts; it goes on when the ssh connection is lost, and repeating it resumes
#   log      whether it runs, and the last lines of its log
#   stop     SIGTERM on all hosts: the run saves and ends; `run` goes on from there
#   fetch    copies a folder of results from host 0
#   ssh      opens a shell on host 0, or runs what stands behind --
#   delete   deletes the slice and all that lies on its disks; asks first
#
# Settings (or the variable in brackets)
#   --name NAME                [TPU_NAME]     name of the slice
#   --zone ZONE                [TPU_ZONE]     its zone, such as us-west4-a
#   --project PROJECT          [TPU_PROJECT]  default: that of gcloud
#   --accelerator-type TYPE    [TPU_TYPE]     create: such as v5litepod-16, v6e-8, v4-32
#   --version VERSION          [TPU_VERSION]  create: the machine's software; default: what suits the type
#   --spot                                    create: cheaper, may be taken away at any time
#   --bucket BUCKET            [TPU_BUCKET]   setup: mounts the Cloud Storage bucket as bucket/ in the repository; hosts
#                                             of one slice share no disk, so several hosts need it for --out
#   --repository URL, --revision REV          setup: clone these instead; a branch, a tag or a whole hash
#   --jax VERSION                             setup: such as 0.10.2; default: the newest
#   --env NAME=VALUE                          run: sets a variable on the hosts; may be repeated
#   --from PATH, --to PATH                    fetch: folder on the host (in the repository), folder here
#   --worker W                                log, ssh: host number, or all (default 0)
#   --yes                                     delete: do not ask
#   --dry-run                                 print the commands instead of running them
#
# Needs gcloud, logged in, with the Cloud TPU API switched on. See docs/launch.md.

set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

FOLDER=auxjax # of the repository on the hosts, in the home folder

case ${1:-} in
  create | setup | run | log | stop | fetch | ssh | delete) subcommand=$1; shift ;;
  -h | --help) show_help "$0"; exit 0 ;;
  *) fail "'${1:-}' is not a subcommand: expected create, setup, run, log, stop, fetch, ssh or delete; --help tells more" ;;
esac

name=${TPU_NAME:-} zone=${TPU_ZONE:-} project=${TPU_PROJECT:-}
type=${TPU_TYPE:-} version=${TPU_VERSION:-} spot=false
bucket=${TPU_BUCKET:-} repository="" revision="" jax=""
from="" to="" worker=0 yes=false
while [ $# -gt 0 ]; do
  case $1 in
    --name) name=$(value "$@"); shift 2 ;;
    --zone) zone=$(value "$@"); shift 2 ;;
    --project) project=$(value "$@"); shift 2 ;;
    --accelerator-type) type=$(value "$@"); shift 2 ;;
    --version) version=$(value "$@"); shift 2 ;;
    --spot) spot=true; shift ;;
    --bucket) bucket=$(value "$@"); shift 2 ;;
    --repository) repository=$(value "$@"); shift 2 ;;
    --revision) revision=$(value "$@"); shift 2 ;;
    --jax) jax=$(value "$@"); shift 2 ;;
    --env) pair=$(value "$@"); add_environment "$pair"; shift 2 ;;
    --from) from=$(value "$@"); shift 2 ;;
    --to) to=$(value "$@"); shift 2 ;;
    --worker) worker=$(value "$@"); shift 2 ;;
    --yes) yes=true; shift ;;
    --dry-run) dry_run=true; shift ;;
    -h | --help) show_help "$0"; exit 0 ;;
    --) shift; break ;;
    *) fail "unknown setting '$1'; --help lists them, and what is for experiments.run comes after --" ;;
  esac
done
needed "$name" "which slice? --name NAME or TPU_NAME"
needed "$zone" "in which zone? --zone ZONE or TPU_ZONE"

tpu() { # tpu VERB ARGUMENTS...
  local verb=$1
  shift
  local command=(gcloud compute tpus tpu-vm "$verb" "$@" "--zone=$zone")
  [ -z "$project" ] || command+=("--project=$project")
  $dry_run || command -v gcloud >/dev/null || fail "gcloud is not installed: https://cloud.google.com/sdk/docs/install"
  run "${command[@]}"
}

on_hosts() { # on_hosts WORKER COMMAND: the command is read by a shell there
  tpu ssh "$name" "--worker=$1" "--command=$2"
}

software() { # the runtime version that Google names for JAX on this type
  case $type in
    v6e-*) echo v2-alpha-tpuv6e ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v2-* | v3-* | v4-*) echo tpu-ubuntu2204-base ;;
    *) fail "no --version is known for --accelerator-type $type: see https://cloud.google.com/tpu/docs/runtimes" ;;
  esac
}

create() {
  needed "$type" "which kind of slice? --accelerator-type TYPE or TPU_TYPE, such as v5litepod-16"
  [ -n "$version" ] || version=$(software)
  local arguments=("$name" "--accelerator-type=$type" "--version=$version")
  ! $spot || arguments+=(--spot)
  tpu create "${arguments[@]}"
}

# uv brings a Python of its own: the machines' Ubuntu 22.04 has 3.10, and auxjax needs 3.11.
installation() {
  cat <<END
cd $FOLDER
export PATH="\$HOME/.local/bin:\$PATH"
command -v uv >/dev/null || curl -LsSf https://astral.sh/uv/install.sh | sh
[ -d .venv ] || uv venv --python 3.12 .venv
uv pip install --python .venv/bin/python -e '.[experiments]' $(quoted "jax[tpu]${jax:+==$jax}")
.venv/bin/python -c 'import jax, platform; print(platform.node(), "has jax", jax.__version__)'
END
}

# A checkpoint is complete when its folder gets its name, so folders must be renamable; and every host must see at once
# what another one wrote.
mounted_bucket() {
  cat <<END
if ! command -v gcsfuse >/dev/null; then
  packages=https://packages.cloud.google.com/apt key=/usr/share/keyrings/cloud.google.asc
  curl -fsSL \$packages/doc/apt-key.gpg | sudo tee \$key >/dev/null
  echo "deb [signed-by=\$key] \$packages gcsfuse-\$(lsb_release -c -s) main" |
    sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
  sudo apt-get update -qq
  sudo apt-get install -qq -y fuse gcsfuse
fi
mkdir -p bucket
mountpoint -q bucket ||
  gcsfuse --implicit-dirs --rename-dir-limit=100000 --metadata-cache-ttl-secs=0 $(quoted "$bucket") bucket
END
}

setup() {
  local command="set -e" root
  if [ -n "$repository" ]; then
    needed "$revision" "which revision of $repository? --revision REV"
    command="$command
[ -d $FOLDER/.git ] || git clone $(quoted "$repository") $FOLDER
git -C $FOLDER fetch origin $(quoted "$revision")
git -C $FOLDER checkout --detach FETCH_HEAD"
  else
    [ -z "$revision" ] || fail "--revision needs --repository URL; without them the last commit here is copied"
    archive=${TMPDIR:-/tmp}/auxjax-$$.tar.gz
    root=$(dirname "${BASH_SOURCE[0]}")/../..
    trap 'rm -f "$archive"' EXIT
    run git -C "$root" archive --format=tar.gz "--output=$archive" HEAD
    tpu scp "$archive" "$name:auxjax.tar.gz" --worker=all
    command="$command
mkdir -p $FOLDER
tar -xzf auxjax.tar.gz -C $FOLDER"
  fi
  command="$command
$(installation)"
  [ -z "$bucket" ] || command="$command
$(mounted_bucket)"
  on_hosts all "$command"
}

start() {
  check_training "$@"
  local command=("${environment[@]}" .venv/bin/python -m experiments.run "$@" --distributed auto)
  on_hosts all "$(remote_start "$FOLDER" "${command[@]}")"
}

fetch() {
  needed "$from" "which folder? --from PATH, relative to the repository on the host, such as out/jtds-0"
  needed "$to" "where to? --to PATH, a folder here"
  run mkdir -p "$to"
  tpu scp --recurse "$name:$FOLDER/$from" "$to" --worker=0
}

delete() {
  local answer=""
  if ! $yes && ! $dry_run; then
    printf 'This deletes %s in %s with all that lies on its disks. Type its name to go on: ' "$name" "$zone"
    read -r answer || true
    echo
    [ "$answer" = "$name" ] || fail "the answer was '$answer', not '$name': nothing is deleted"
  fi
  tpu delete "$name" --quiet
}

case $subcommand in
  create) create ;;
  setup) setup ;;
  run) start "$@" ;;
  log) on_hosts "$worker" "$(remote_log "$FOLDER")" ;;
  stop) on_hosts all "$(remote_stop "$FOLDER")" ;;
  fetch) fetch ;;
  ssh) if [ $# -gt 0 ]; then on_hosts "$worker" "$(quoted "$@")"; else tpu ssh "$name" "--worker=$worker"; fi ;;
  delete) delete ;;
esac
