# shellcheck shell=bash
# What gke.sh and gke_sweep.sh share: settings of a cluster, and subcommands. Sourced, never run; `render` is theirs.
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
for name in JOB_NAME IMAGE TPU_ACCELERATOR TPU_TOPOLOGY GPU_ACCELERATOR JAX_COMPILATION_CACHE_DIR; do
  setting "$name"
done
setting DEVICES tpu
setting CHIPS_PER_HOST 4
setting SPOT 0
setting NAMESPACE default
setting SERVICE_ACCOUNT default
setting GRACE 300
setting RETRIES 3
MTP_JAX_CACHE=${MTP_JAX_CACHE:-/tmp/mtp_jax}

subcommands() { # WORD...: those that there are; checks what was given
  local word
  whole GRACE RETRIES CHIPS_PER_HOST
  one_of SPOT 0 1
  one_of DEVICES tpu gpu
  ((${#WORDS[@]} == 1)) || dry || die 2 "give one subcommand: $*."
  for word in "${WORDS[@]}"; do
    [[ " $* " == *" $word "* ]] || die 2 "there is no subcommand '$word'; there are $*."
  done
}

devices() { # NAME...: what there must be for DEVICES, these for GPUs; HOSTS of a TPU slice; the lines that the manifest KEEPs
  KEEP=("$DEVICES")
  [[ $SPOT == 0 ]] || KEEP+=(spot)
  if [[ $DEVICES == tpu ]]; then
    need TPU_ACCELERATOR TPU_TOPOLOGY
    hosts_of_topology
  else
    need "$@"
  fi
}

hosts_of_topology() {
  local chips=1 side
  if [[ $TPU_TOPOLOGY == '<TPU_TOPOLOGY>' ]]; then HOSTS='<HOSTS>' && return; fi
  [[ $TPU_TOPOLOGY =~ ^[0-9]+(x[0-9]+){1,2}$ ]] || die 2 "TPU_TOPOLOGY is '$TPU_TOPOLOGY'; it must be like 4x4 or 2x2x4."
  for side in ${TPU_TOPOLOGY//x/ }; do ((chips *= side)); done
  ((CHIPS_PER_HOST && chips % CHIPS_PER_HOST == 0)) ||
    die 2 "TPU_TOPOLOGY $TPU_TOPOLOGY has $chips chips, which are no multiple of CHIPS_PER_HOST, $CHIPS_PER_HOST."
  # shellcheck disable=SC2034  # the scripts and gke.yaml have it
  HOSTS=$((chips / CHIPS_PER_HOST))
}

in_bucket() { # NAME: this directory is one that all pods see
  [[ ${!1} == *://* ]] || dry || die 2 "$1 is '${!1}'; pods share no file system, so it must be gs://..."
}

json() { # WORD...: a list of strings
  local word text=''
  for word; do
    word=${word//\\/\\\\}
    text+=", \"${word//\"/\\\"}\""
  done
  echo "[${text#, }]"
}

fill() { # FILE NAME...: its lines with ${SETTINGS} and ${NAME}s filled in, without those that are marked for other jobs
  local line name
  while IFS= read -r line; do
    [[ $line != '#'* ]] || continue
    if [[ $line =~ \ \#\ (tpu|gpu|spot|after)$ ]]; then
      [[ " ${KEEP[*]} " == *" ${BASH_REMATCH[1]} "* ]] || continue
      line=${line% # *}
    fi
    for name in "${SETTINGS[@]}" "${@:2}"; do line=${line//"\${$name}"/"${!name}"}; done
    printf '%s\n' "$line"
  done <"$here/$1"
}

label=jobset.sigs.k8s.io/jobset-name
kube() { run kubectl --namespace="$NAMESPACE" "$@"; }

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
    *) "$1" ;;
  esac
}

perform_all() { # WORD...: the subcommand that was given, or these in a dry run
  local word
  ((${#WORDS[@]})) || WORDS=("$@")
  for word in "${WORDS[@]}"; do
    ! dry || [[ $word == render ]] || echo "# $word"
    perform "$word"
  done
}
