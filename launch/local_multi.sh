#!/usr/bin/env bash
# Train on this machine in several processes: on the CPU, or with one GPU each. Goes on where the run stopped.
#
#   launch/local_multi.sh --processes 2 --experiment experiments/code_cpu.py --run-dir runs/mine [-- options]
#   launch/local_multi.sh --dry-run             what would run
#
# Each setting is a flag (--run-dir DIR) and an environment variable (RUN_DIR=DIR); the flag wins.
#
#   EXPERIMENT     the experiment file                                            required
#   RUN_DIR        where the run goes; it is resumed if it is there               required
#   PROCESSES      how many                                                                 2
#   DEVICES        cpu, or gpu: process i has GPU i alone                                 cpu
#   PORT           of process 0, where the others find it          a free one, for each try
#   LOG_DIR        process-<i>.log, appended to; process 0 is on the terminal too
#                                                             logs/<the name of the run directory>
#   GRACE          seconds that the others have to end, after one ended other than with 0  120
#   TRAIN_OPTIONS  options of mtp-jax train, separated by spaces; those after -- come after them
#   MAX_RESTARTS   how often to start again after status 75, "saved, start me again"     1000
#   RETRIES        failures in a row, without a new checkpoint, that are repeated       3
#   RESTART_DELAY  seconds between two tries                                                5
#   JAX_COMPILATION_CACHE_DIR  compiled functions                        ~/.cache/mtp_jax/xla
#   MTP_JAX_CACHE  prepared data                                     the program's own default
#   MTP_JAX_PROGRAM  the program                                                      mtp-jax
#   DRY_RUN        1 is --dry-run                                                           0
#
# SIGTERM, SIGINT and SIGHUP reach every process; after them nothing is started again. Ends with 0 if all processes
# did, with 75 if the others ended with 75, "saved", and else with the status of the first that failed.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
trains
setting PROCESSES 2
setting DEVICES cpu
setting PORT
setting LOG_DIR
setting GRACE 120
restarting 3
local_cache
parse "$@"
no_words
whole PROCESSES
((PROCESSES > 0)) || die 2 "PROCESSES is 0; it must be 1 or more."
one_of DEVICES cpu gpu
[[ ! $PORT ]] || whole PORT
need EXPERIMENT RUN_DIR
name=${RUN_DIR%/}
LOG_DIR=${LOG_DIR:-logs/${name##*/}}

free_port() { # below the range that systems give out by themselves
  local port
  while port=$((20000 + RANDOM % 10000)) && (: <>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; do :; done
  echo "$port"
}

process_command() { # I PORT
  local variables=(
    "MTP_JAX_COORDINATOR=127.0.0.1:$2" "MTP_JAX_NUM_PROCESSES=$PROCESSES" "MTP_JAX_PROCESS_ID=$1"
  )
  if [[ $DEVICES == gpu ]]; then variables+=("CUDA_VISIBLE_DEVICES=$1"); else variables+=(JAX_PLATFORMS=cpu); fi
  train_command "${variables[@]}"
}

launch() {
  local i port=${PORT:-$(free_port)}
  for ((i = 0; i < PROCESSES; i++)); do
    process_command "$i" "$port"
    if ((i == 0)); then
      start "${COMMAND[@]}" > >(exec tee -ia "$LOG_DIR/process-0.log") 2>&1
    else
      start "${COMMAND[@]}" >>"$LOG_DIR/process-$i.log" 2>&1
    fi
  done
}

if dry; then
  for ((i = 0; i < PROCESSES; i++)); do
    process_command "$i" "${PORT:-<FREE_PORT>}"
    echo "$(quoted "${COMMAND[@]}") >> $(quoted "$LOG_DIR/process-$i.log") 2>&1 &"
  done
  exit 0
fi
mkdir -p "$LOG_DIR"
forward_signals
supervise launch
