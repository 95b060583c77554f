#!/usr/bin/env bash
# Train on Google Kubernetes Engine, TPUs or GPUs: fill in gke.yaml (a JobSet), apply, follow, delete.
#
#   launch/gke.sh SUBCOMMAND [settings] [-- options of mtp-jax train]
#
#   build     make the image of this checkout (launch/Dockerfile) and push it
#   render    print the JobSet            apply     start it; Kubernetes starts it again from then on
#   logs      follow the pods' output     status    the JobSet and its pods
#   delete    delete it, which stops the pods; the run stays in its bucket. NODES COST MONEY WHILE THEY ARE THERE
#   --dry-run what would run, for one subcommand or for all
#
# Each setting is a flag (--run-dir DIR) and an environment variable (RUN_DIR=DIR); the flag wins.
#
#   JOB_NAME         name of the JobSet, and so of its pods                              required
#   IMAGE            the image, with its registry                       required by build, render
#   EXPERIMENT       the experiment file, as it lies in the image               required by apply
#   RUN_DIR          gs://...; the run is resumed if it is there                required by apply
#   DEVICES          tpu or gpu                                                               tpu
#   TPU_ACCELERATOR  e.g. tpu-v5-lite-podslice, tpu-v6e-slice                  required with tpu
#   TPU_TOPOLOGY     e.g. 4x4; with CHIPS_PER_HOST it gives the number of pods  required with tpu
#   CHIPS_PER_HOST   TPU chips of a node                                                        4
#   GPU_ACCELERATOR  e.g. nvidia-h100-80gb                                     required with gpu
#   HOSTS            number of pods                                            required with gpu
#   GPUS_PER_HOST    GPUs of a node                                                             8
#   PORT             of pod 0, where the others find it (gpu)                                8476
#   SPOT             1: only on spot nodes                                                      0
#   NAMESPACE        Kubernetes namespace                                                 default
#   SERVICE_ACCOUNT  Kubernetes service account, which may read and write the bucket      default
#   GRACE            seconds from SIGTERM to SIGKILL, for saving                              300
#   RETRIES          failed tries in all that are repeated (after status 75: without limit)     3
#   TRAIN_OPTIONS    options of mtp-jax train, separated by spaces; those after -- come after them
#   JAX_COMPILATION_CACHE_DIR  compiled functions       xla_cache, beside RUN_DIR in its bucket
#   MTP_JAX_CACHE    prepared data, in each pod                                    /tmp/mtp_jax
#   MTP_JAX_PROGRAM  the program                                                        mtp-jax
#   DRY_RUN          1 is --dry-run                                                           0
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
# shellcheck source=gke_common.sh
source "$(dirname "${BASH_SOURCE[0]}")/gke_common.sh"
trains
setting HOSTS
setting GPUS_PER_HOST 8
setting PORT 8476
parse "$@"
whole PORT GPUS_PER_HOST
subcommands build render apply status logs delete

render() {
  local program
  need JOB_NAME IMAGE EXPERIMENT RUN_DIR
  devices GPU_ACCELERATOR HOSTS
  whole HOSTS
  in_bucket RUN_DIR
  beside_run
  read -ra program <<<"$MTP_JAX_PROGRAM"
  # shellcheck disable=SC2034  # gke.yaml has it
  ARGV=$(json "${program[@]}" train "$EXPERIMENT" --run-dir "$RUN_DIR" --auto-resume "${EXTRA[@]}")
  fill gke.yaml ARGV
}

perform_all build apply status logs delete
