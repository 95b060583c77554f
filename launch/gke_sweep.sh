#!/usr/bin/env bash
# Run a sweep on Google Kubernetes Engine: a pod for each run, on one node. Fills in gke_sweep.yaml (a JobSet).
#
#   launch/gke_sweep.sh SUBCOMMAND [settings]
#
#   build     make the image of this checkout (launch/Dockerfile) and push it
#   render    print the JobSet            apply     start it: those runs that are not done, first what others begin from
#   logs      follow the pods' output     status    the JobSet and its pods
#   collect   write the results file, here, of the runs in the bucket that have ended
#   delete    delete it, which stops the pods; the runs stay in their bucket. NODES COST MONEY WHILE THEY ARE THERE
#   --dry-run what would run, for one subcommand or for all
#
# render, apply and collect run mtp-jax here too, which reads the bucket: pip install -e '.[gcs]', and
# gcloud auth application-default login. Each setting is a flag (--sweep-dir DIR) and an environment variable
# (SWEEP_DIR=DIR); the flag wins.
#
#   JOB_NAME         name of the JobSet, and so of its pods                              required
#   IMAGE            the image, with its registry                       required by build, render
#   EXPERIMENT       FILE.py@SIZE, as it lies in the image and here  required by apply and collect
#   SWEEP_DIR        gs://...; where the runs go                     required by apply and collect
#   OUT              the results file        results/FILE-SIZE.json beside the experiment file
#   MAX_PARALLEL     runs at once                                                               8
#   DEVICES          tpu or gpu                                                               tpu
#   TPU_ACCELERATOR  e.g. tpu-v5-lite-podslice, tpu-v6e-slice                  required with tpu
#   TPU_TOPOLOGY     that of one node, e.g. 2x2                                required with tpu
#   CHIPS_PER_HOST   TPU chips of a node                                                        4
#   GPU_ACCELERATOR  e.g. nvidia-h100-80gb                                     required with gpu
#   GPUS_PER_RUN     GPUs of a run                                                              1
#   SPOT             1: only on spot nodes                                                      0
#   NAMESPACE        Kubernetes namespace                                                 default
#   SERVICE_ACCOUNT  Kubernetes service account, which may read and write the bucket      default
#   GRACE            seconds from SIGTERM to SIGKILL, for saving                              300
#   RETRIES          failures of a run that are repeated (status 75 and evictions: without limit)  3
#   JAX_COMPILATION_CACHE_DIR  compiled functions                       xla_cache, in SWEEP_DIR
#   MTP_JAX_CACHE    prepared data, in each pod                                    /tmp/mtp_jax
#   MTP_JAX_PROGRAM  the program, here and in the pods                                  mtp-jax
#   DRY_RUN          1 is --dry-run                                                           0
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
# shellcheck source=gke_common.sh
source "$(dirname "${BASH_SOURCE[0]}")/gke_common.sh"
sweeps
setting GPUS_PER_RUN 1
parse "$@"
check_sweep
whole GPUS_PER_RUN
subcommands build render apply status logs collect delete

job() { # NAME NUMBER...: the manifest of a job of these runs
  local command exec COMPLETIONS=$(($# - 1)) ARGV
  # shellcheck disable=SC2034  # gke_sweep.yaml has it, and what follows
  local NAME=$1
  # shellcheck disable=SC2034
  [[ $2 != '<'* ]] || COMPLETIONS='<COMPLETIONS>'
  read -ra command <<<"$MTP_JAX_PROGRAM"
  exec=$(quoted exec "${command[@]}" sweep "$EXPERIMENT" --dir "$SWEEP_DIR")
  # Pod i of the job takes the i-th number.
  # shellcheck disable=SC2034
  ARGV=$(json sh -c "shift \"\$JOB_COMPLETION_INDEX\"; $exec --only \"\$1\"" sh "${@:2}")
  fill gke_sweep.yaml NAME ARGV COMPLETIONS
}

render() {
  local text=''
  need JOB_NAME IMAGE EXPERIMENT SWEEP_DIR
  devices GPU_ACCELERATOR
  [[ $DEVICES == gpu || $HOSTS == '<HOSTS>' || $HOSTS == 1 ]] ||
    die 2 "TPU_TOPOLOGY $TPU_TOPOLOGY has $HOSTS hosts of $CHIPS_PER_HOST chips; a run of a sweep is one process, on one host."
  in_bucket SWEEP_DIR
  JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$SWEEP_DIR/xla_cache}
  list_runs
  ((${#FIRST[@]} + ${#OTHERS[@]})) || die 2 "all runs of $EXPERIMENT in $SWEEP_DIR are done; collect writes their results file."
  if ((${#FIRST[@]})); then
    text=$(job first "${FIRST[@]}")
    KEEP+=(after)
  fi
  if ((${#OTHERS[@]})); then
    [[ ! $text ]] || printf '%s\n' "$text"
    text=$(job runs "${OTHERS[@]}")
    # A second job joins the JobSet of the first.
    ((!${#FIRST[@]})) || text=${text#*$'\n'  replicatedJobs:$'\n'}
  fi
  printf '%s\n' "$text"
}

collect() {
  local command
  need EXPERIMENT SWEEP_DIR
  read -ra command <<<"$MTP_JAX_PROGRAM"
  run "${command[@]}" sweep "$EXPERIMENT" --dir "$SWEEP_DIR" --collect ${OUT:+--out "$OUT"}
}

perform_all build apply status logs collect delete
