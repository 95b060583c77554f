#!/usr/bin/env bash
# Train on this machine in one process, and go on where the run stopped.
#
#   launch/local.sh --experiment experiments/code_cpu.py --run-dir runs/mine [-- options of mtp-jax train]
#   launch/local.sh --dry-run                   what would run
#
# Each setting is a flag (--run-dir DIR) and an environment variable (RUN_DIR=DIR); the flag wins.
#
#   EXPERIMENT     the experiment file                                            required
#   RUN_DIR        where the run goes; it is resumed if it is there               required
#   TRAIN_OPTIONS  options of mtp-jax train, separated by spaces; those after -- come after them
#   MAX_RESTARTS   how often to start again after status 75, "saved, start me again"     1000
#   RETRIES        failures in a row, without a new checkpoint, that are repeated       0
#   RESTART_DELAY  seconds between two tries                                                5
#   JAX_COMPILATION_CACHE_DIR  compiled functions                        ~/.cache/mtp_jax/xla
#   MTP_JAX_CACHE  prepared data                                     the program's own default
#   MTP_JAX_PROGRAM  the program                                                      mtp-jax
#   DRY_RUN        1 is --dry-run                                                           0
#
# SIGTERM, SIGINT and SIGHUP reach the program, which saves; after them nothing is started again. Ends with the status
# of the program: 0 done, 75 saved, 2 a mistake in the command, others a failure.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
trains
restarting 0
local_cache
GRACE=0 # there are no others to wait for
parse "$@"
no_words
need EXPERIMENT RUN_DIR
# shellcheck disable=SC2119
train_command
if dry; then
  quoted "${COMMAND[@]}"
  exit 0
fi
launch() { start "${COMMAND[@]}"; }
forward_signals
supervise launch
