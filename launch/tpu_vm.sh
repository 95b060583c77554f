#!/usr/bin/env bash
# Train on a Cloud TPU pod slice: create it, install, run on all workers, follow, requeue after preemption, delete.
#
#   launch/tpu_vm.sh SUBCOMMAND [settings] [-- options of mtp-jax train]
#
#   create    queue the slice (queued resources)       install   copy this checkout to all workers and install it
#   run       start the program on all workers         stop      have it save and end, on all workers
#   logs      follow a worker's output                 status    the slice, and the program on each worker
#   watch     all of it: create, install and run what is missing, again after preemption, until the run is done
#   delete    delete the slice; the run stays in its bucket. A SLICE COSTS MONEY UNTIL IT IS DELETED
#   --dry-run what would run, for one subcommand or for all
#
# Each setting is a flag (--run-dir DIR) and an environment variable (RUN_DIR=DIR); the flag wins.
#
#   TPU_NAME       name of the slice, and of its request                                 required
#   ZONE           zone, e.g. us-east5-b                                                 required
#   PROJECT        Google Cloud project                                          gcloud's default
#   ACCELERATOR_TYPE  e.g. v5litepod-16, v6e-32                     required by create and watch
#   RUNTIME_VERSION   e.g. v2-alpha-tpuv5-lite, v2-alpha-tpuv6e     required by create and watch
#   SPOT           1: cheaper, and may be taken away at any time                                0
#   CREATE_FLAGS   more flags for `gcloud compute tpus queued-resources create`
#   SSH_FLAGS      more flags for gcloud's ssh and scp, such as --internal-ip
#   EXPERIMENT     the experiment file, relative to the checkout           required by run, watch
#   RUN_DIR        gs://...; the run is resumed if it is there             required by run, watch
#   TRAIN_OPTIONS  options of mtp-jax train, separated by spaces; those after -- come after them
#   INSTALL        what each worker runs in the checkout    uv, Python 3.11 and the package in .venv
#   SETUP          what each worker runs in the checkout after it, such as fetching data
#   WORKER         whose output `logs` follows: a number, or all                                0
#   COORDINATOR_PORT  port of worker 0 where the workers meet             JAX's own: 8482 in 0.10
#   GRACE          seconds that `stop` leaves for saving                                      300
#   POLL           seconds between two looks of `watch`                                        60
#   MAX_RESTARTS   how often `watch` starts again after status 75, or a preemption           1000
#   RETRIES        failures in a row, without a new checkpoint, that `watch` repeats        3
#   RESTART_DELAY  seconds before `watch` starts again                                          5
#   JAX_COMPILATION_CACHE_DIR  compiled functions         xla_cache, beside RUN_DIR in its bucket
#   MTP_JAX_CACHE  prepared data, on each worker                        the program's own default
#   MTP_JAX_PROGRAM  the program, on a worker                                   .venv/bin/mtp-jax
#   DRY_RUN        1 is --dry-run                                                               0
#
# create, install and watch take minutes to hours. Ctrl-C ends watch, and not the program: watch again picks it up.
set -euo pipefail
: "${MTP_JAX_PROGRAM:=.venv/bin/mtp-jax}"
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# The images have an older Python than the package wants, so uv brings one.
# shellcheck disable=SC2016  # the workers expand it
uv='curl -LsSf https://astral.sh/uv/install.sh | sh && export PATH="$HOME/.local/bin:$PATH"'
uv+=' && uv venv --quiet --allow-existing --python 3.11 .venv'
uv+=" && uv pip install --quiet --python .venv -c constraints.txt -e '.[tpu,gcs]'"
for name in TPU_NAME ZONE PROJECT ACCELERATOR_TYPE RUNTIME_VERSION CREATE_FLAGS SSH_FLAGS COORDINATOR_PORT \
  JAX_COMPILATION_CACHE_DIR; do setting "$name"; done
trains
setting SPOT 0
setting INSTALL "$uv"
setting SETUP
setting WORKER 0
setting GRACE 300
setting POLL 60
restarting 3
parse "$@"
whole GRACE POLL RETRIES MAX_RESTARTS RESTART_DELAY
one_of SPOT 0 1
subcommands=(create install run logs status stop watch delete)
((${#WORDS[@]} == 1)) || dry || die 2 "give one subcommand: ${subcommands[*]}."
for word in "${WORDS[@]}"; do
  [[ " ${subcommands[*]} " == *" $word "* ]] || die 2 "there is no subcommand '$word'; there are ${subcommands[*]}."
done
need TPU_NAME ZONE
read -ra more_create <<<"$CREATE_FLAGS"
read -ra more_ssh <<<"$SSH_FLAGS"
[[ $SPOT == 0 ]] || more_create+=(--spot)
where=("--zone=$ZONE")
[[ ! $PROJECT ]] || where+=("--project=$PROJECT")
worker_script=mtp_jax/launch/tpu_worker.sh

queue() { run gcloud compute tpus queued-resources "$1" "$TPU_NAME" "${where[@]}" "${@:2}"; }
on_workers() { # WORKERS COMMAND
  run gcloud compute tpus tpu-vm ssh "$TPU_NAME" "${where[@]}" "--worker=$1" "${more_ssh[@]}" --command="$2"
}

create_slice() {
  need ACCELERATOR_TYPE RUNTIME_VERSION
  queue create "--node-id=$TPU_NAME" "--accelerator-type=$ACCELERATOR_TYPE" "--runtime-version=$RUNTIME_VERSION" \
    "${more_create[@]}"
}

# What git knows or does not ignore: every worker gets the same code, with the changes that are not committed.
install_all() {
  local list=(git -C "$root" ls-files -co --exclude-standard -z) pack=(tar -C "$root" --null -T - -czf)
  local archive='<ARCHIVE>'
  if dry; then
    echo "$(quoted "${list[@]}") | $(quoted "${pack[@]}" "$archive")"
  else
    archive=$(mktemp)
    "${list[@]}" | "${pack[@]}" "$archive" || return
  fi
  run gcloud compute tpus tpu-vm scp "$archive" "$TPU_NAME:mtp_jax.tar.gz" "${where[@]}" --worker=all \
    "${more_ssh[@]}" || return
  dry || rm -f "$archive"
  on_workers all "mkdir -p mtp_jax && cd mtp_jax && tar -xzf ../mtp_jax.tar.gz && $INSTALL${SETUP:+ && $SETUP}"
}

prepare_run() { # what `run` starts, checked
  local variables=(MTP_JAX_COORDINATOR=auto)
  need EXPERIMENT RUN_DIR
  [[ $RUN_DIR == *://* ]] || dry || die 2 "RUN_DIR is '$RUN_DIR'; workers share no file system, so it must be gs://..."
  beside_run
  [[ ! $COORDINATOR_PORT ]] || variables+=("JAX_COORDINATOR_PORT=$COORDINATOR_PORT")
  train_command "${variables[@]}"
}

run_all() { on_workers all "bash $worker_script start $(quoted "${COMMAND[@]}")"; }
stop_all() { on_workers all "bash $worker_script stop $GRACE"; }

slice_state() { # of the request: ACTIVE, SUSPENDED, ...; nothing if there is none
  gcloud compute tpus queued-resources list "${where[@]}" "--filter=name ~ /$TPU_NAME\$" "--format=value(state.state)"
}
program_state() { # on worker 0: the others end within a minute of it
  on_workers 0 "if [ -e $worker_script ]; then bash $worker_script state; else echo none; fi" 2>/dev/null
}

again_or_end() { # STATUS
  again "$1" && pause && return
  note "the slice costs money until it is deleted: launch/tpu_vm.sh delete"
  exit "$1"
}

look() { # one look of `watch`: do what is to be done next
  local slice program
  slice=$(slice_state) || { note "gcloud does not answer" && return; }
  case $slice in
    '')
      note "no slice: creating it"
      create_slice
      ;;
    SUSPENDED | FAILED) # a request is used up with its slice
      note "the slice is $slice: deleting the request, and queueing another"
      again_or_end 75
      queue delete --force --quiet
      create_slice
      ;;
    ACTIVE)
      program=$(program_state) || program=unknown
      case $program in
        running) note "running; newest checkpoint: $(latest_checkpoint)" ;;
        none)
          note "the slice is ready: installing"
          if install_all && run_all; then note "started on all workers"; else again_or_end 1; fi
          ;;
        gone | ended\ *)
          [[ $program != gone ]] || program="ended 1" # killed with its machine, or by hand
          again_or_end "${program#ended }"
          if ! { stop_all && run_all; }; then note "not started on all workers"; fi
          ;;
        *) note "worker 0 does not answer" ;;
      esac
      ;;
    *) note "the slice is $slice" ;;
  esac
}

watch_slice() {
  need ACCELERATOR_TYPE RUNTIME_VERSION
  prepare_run
  PROGRESS=$(latest_checkpoint)
  while :; do
    look
    sleep "$POLL"
  done
}

perform() { # SUBCOMMAND
  case $1 in
    create) create_slice ;;
    install) install_all ;;
    run) prepare_run && run_all ;;
    logs) on_workers "$WORKER" "bash $worker_script log" ;;
    status) queue describe '--format=value(state.state)' && on_workers all "bash $worker_script state" ;;
    stop) stop_all ;;
    watch)
      if dry; then
        echo "# every $POLL s: what is missing of create, install and run; after a preemption delete, and create again"
      else
        watch_slice
      fi
      ;;
    delete) queue delete --force ;;
  esac
}

((${#WORDS[@]})) || WORDS=("${subcommands[@]}")
for word in "${WORDS[@]}"; do
  ! dry || echo "# $word"
  perform "$word"
done
