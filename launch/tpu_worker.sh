#!/usr/bin/env bash
# What tpu_vm.sh has each worker do. The files of the job are in ~/mtp_jax_job: pid, log, and status when it has ended.
#
#   tpu_worker.sh start COMMAND...    start it in the checkout, detached from the connection
#   tpu_worker.sh stop SECONDS        SIGTERM; SIGKILL if it has not ended after so long
#   tpu_worker.sh state               none, running, ended STATUS, or gone (killed, or the machine was restarted)
#   tpu_worker.sh log                 the output, from its last lines on
set -euo pipefail
job=~/mtp_jax_job
mkdir -p "$job"

running() { [[ -f $job/pid && ! -f $job/status ]] && kill -0 "$(<"$job/pid")" 2>/dev/null; }
fail() {
  echo "$(uname -n): $1" >&2
  exit 1
}

# It names the processes that hold the TPU and kills none: one may be a notebook.
holders() { sudo -n fuser /dev/accel* /dev/vfio/* 2>/dev/null | xargs || true; }

case ${1:-} in
  start)
    ! running || fail "the program runs already, as process $(<"$job/pid"); stop it first."
    held=$(holders)
    [[ ! $held ]] || fail "the TPU is held by process $held; end it (ps -fp ${held// /,}), then start again."
    rm -f "$job/pid" "$job/status"
    # Left behind by an earlier slice, they make JAX wait for slices that are no more.
    unset "${!MEGASCALE_@}"
    cd "$(dirname "${BASH_SOURCE[0]}")/.."
    # shellcheck disable=SC2016  # for the inner shell
    setsid nohup bash -c '
      job=$1 && shift
      "$@" & echo $! >"$job/pid.new" && mv "$job/pid.new" "$job/pid"
      status=0 && wait $! || status=$?
      echo "$status" >"$job/status.new" && mv "$job/status.new" "$job/status"
    ' tpu_worker "$job" "${@:2}" >>"$job/log" 2>&1 </dev/null &
    until [[ -f $job/pid ]]; do sleep 0.1; done
    echo "$(uname -n): started as process $(<"$job/pid")"
    ;;
  stop)
    for ((waited = 0; waited <= $2; waited++)); do
      running || break
      ((waited)) || kill -s TERM "$(<"$job/pid")"
      sleep 1
    done
    ! running || kill -s KILL "$(<"$job/pid")"
    ;;
  state)
    if [[ -f $job/status ]]; then
      echo "ended $(<"$job/status")"
    elif running; then
      echo running
    elif [[ -f $job/pid ]]; then
      echo gone
    else
      echo none
    fi
    ;;
  log) exec tail -n 200 -F "$job/log" ;;
  *) fail "'${1:-}' is none of start, stop, state, log." ;;
esac
