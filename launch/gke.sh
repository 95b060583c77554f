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
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
for name in JOB_NAME IMAGE EXPERIMENT RUN_DIR TPU_ACCELERATOR TPU_TOPOLOGY GPU_ACCELERATOR HOSTS \
  JAX_COMPILATION_CACHE_DIR; do setting "$name"; done
setting DEVICES tpu
setting CHIPS_PER_HOST 4
setting GPUS_PER_HOST 8
setting PORT 8476
setting SPOT 0
setting NAMESPACE default
setting SERVICE_ACCOUNT default
setting GRACE 300
setting RETRIES 3
MTP_JAX_CACHE=${MTP_JAX_CACHE:-/tmp/mtp_jax}
parse "$@"
whole GRACE RETRIES PORT CHIPS_PER_HOST GPUS_PER_HOST
one_of SPOT 0 1
one_of DEVICES tpu gpu
subcommands=(build render apply status logs delete)
((${#WORDS[@]} == 1)) || dry || die 2 "give one subcommand: ${subcommands[*]}."
for word in "${WORDS[@]}"; do
  [[ " ${subcommands[*]} " == *" $word "* ]] || die 2 "there is no subcommand '$word'; there are ${subcommands[*]}."
done

label=jobset.sigs.k8s.io/jobset-name
kube() { run kubectl --namespace="$NAMESPACE" "$@"; }

hosts_of_topology() { # HOSTS of a TPU slice
  local chips=1 side
  if [[ $TPU_TOPOLOGY == '<TPU_TOPOLOGY>' ]]; then HOSTS='<HOSTS>' && return; fi
  [[ $TPU_TOPOLOGY =~ ^[0-9]+(x[0-9]+){1,2}$ ]] || die 2 "TPU_TOPOLOGY is '$TPU_TOPOLOGY'; it must be like 4x4 or 2x2x4."
  for side in ${TPU_TOPOLOGY//x/ }; do ((chips *= side)); done
  ((CHIPS_PER_HOST && chips % CHIPS_PER_HOST == 0)) ||
    die 2 "TPU_TOPOLOGY $TPU_TOPOLOGY has $chips chips, which are no multiple of CHIPS_PER_HOST, $CHIPS_PER_HOST."
  # shellcheck disable=SC2034  # gke.yaml has it
  HOSTS=$((chips / CHIPS_PER_HOST))
}

json() { # WORD...: a list of strings
  local word text=''
  for word; do
    word=${word//\\/\\\\}
    text+=", \"${word//\"/\\\"}\""
  done
  echo "[${text#, }]"
}

render() {
  local name text line program
  need JOB_NAME IMAGE EXPERIMENT RUN_DIR
  if [[ $DEVICES == tpu ]]; then
    need TPU_ACCELERATOR TPU_TOPOLOGY
    hosts_of_topology
  else
    need GPU_ACCELERATOR HOSTS
    whole HOSTS
  fi
  [[ $RUN_DIR == *://* ]] || dry || die 2 "RUN_DIR is '$RUN_DIR'; pods share no file system, so it must be gs://..."
  beside_run
  read -ra program <<<"$MTP_JAX_PROGRAM"
  # shellcheck disable=SC2034  # likewise
  ARGV=$(json "${program[@]}" train "$EXPERIMENT" --run-dir "$RUN_DIR" --auto-resume "${EXTRA[@]}")
  while IFS= read -r line; do
    case $line in
      *' # tpu') [[ $DEVICES == tpu ]] || continue ;;
      *' # gpu') [[ $DEVICES == gpu ]] || continue ;;
      *' # spot') [[ $SPOT == 1 ]] || continue ;;
      '#'*) continue ;;
    esac
    for name in "${SETTINGS[@]}" ARGV; do line=${line//"\${$name}"/"${!name}"}; done
    text+=${line% # @(tpu|gpu|spot)}$'\n'
  done <"$here/gke.yaml"
  printf %s "$text"
}

perform() { # SUBCOMMAND
  case $1 in
    build)
      need IMAGE
      local extra=$DEVICES
      [[ $DEVICES == tpu ]] || extra=cuda
      run docker build --platform=linux/amd64 --file="$here/Dockerfile" --build-arg="DEVICES=$extra" --tag="$IMAGE" \
        "${here%/*}"
      run docker push "$IMAGE"
      ;;
    render) render ;;
    apply)
      local text
      text=$(render)
      if dry; then
        echo "kubectl apply --filename=- <<'EOF'"
        printf '%s\nEOF\n' "$text"
      else
        kubectl apply --filename=- <<<"$text"
      fi
      ;;
    status)
      need JOB_NAME
      kube get "jobset/$JOB_NAME"
      kube get pods "--selector=$label=$JOB_NAME" --output=wide
      ;;
    logs) need JOB_NAME && kube logs --follow --prefix --tail=200 --max-log-requests=512 "--selector=$label=$JOB_NAME" ;;
    delete) need JOB_NAME && kube delete "jobset/$JOB_NAME" ;;
  esac
}

((${#WORDS[@]})) || WORDS=(build apply status logs delete)
for word in "${WORDS[@]}"; do
  ! dry || [[ $word == render ]] || echo "# $word"
  perform "$word"
done
