# shellcheck shell=bash
# What the launchers share: settings, dry runs, processes, and whether a run is started again. Sourced, never run.

if ((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] < 404)); then
  echo "${0##*/}: bash 4.4 or newer is needed, and this is $BASH_VERSION (on a Mac: brew install bash)." >&2
  exit 2
fi
shopt -s extglob

note() { printf '%s: %s\n' "${0##*/}" "$*" >&2; }
die() { # STATUS MESSAGE
  note "error: $2"
  exit "$1"
}

# Settings: each is a variable NAME_OF_IT, from the flag --name-of-it, the environment, or a default.

SETTINGS=() # their names
WORDS=()    # what was given and is no flag: the subcommand
EXTRA=()    # options for `mtp-jax train`: TRAIN_OPTIONS, then what follows `--`
setting() { # NAME [DEFAULT]
  SETTINGS+=("$1")
  [[ ${!1:-} ]] || printf -v "$1" %s "${2-}"
}
setting DRY_RUN 0

trains() { # the settings of a run
  setting EXPERIMENT
  setting RUN_DIR
  setting TRAIN_OPTIONS
}

flag_of() { local name=${1,,} && echo "--${name//_/-}"; }

usage() { sed -n '2,/^[^#]/{/^#SBATCH/d;s/^# \{0,1\}//p;}' "$0"; }

assign() { # FLAG VALUE
  local name=${1#--}
  name=${name^^}
  name=${name//-/_}
  [[ " ${SETTINGS[*]} " == *" $name "* ]] || die 2 "there is no setting $1; --help lists them."
  printf -v "$name" %s "$2"
}

parse() { # the arguments of the script
  while (($#)); do
    case $1 in
      -h | --help) usage && exit 0 ;;
      --dry-run) DRY_RUN=1 ;;
      --) EXTRA=("${@:2}") && break ;;
      --*=*) assign "${1%%=*}" "${1#*=}" ;;
      --*)
        [[ $# -gt 1 && $2 != --* ]] || { assign "$1" '' && die 2 "$1 needs a value: $1 VALUE, or $1=VALUE."; }
        assign "$1" "$2"
        shift
        ;;
      *) WORDS+=("$1") ;;
    esac
    shift
  done
  local before
  read -ra before <<<"${TRAIN_OPTIONS-}"
  EXTRA=("${before[@]}" "${EXTRA[@]}")
  [[ $DRY_RUN == [01] ]] || die 2 "DRY_RUN is '$DRY_RUN'; it must be 0 or 1."
}

no_words() { ((!${#WORDS[@]})) || die 2 "'${WORDS[0]}' is no option; options of mtp-jax train come after --."; }

dry() { [[ $DRY_RUN == 1 ]]; }

need() { # NAME...: refuse to go on without these; a dry run shows placeholders
  local name missing=''
  for name; do
    [[ ${!name} ]] && continue
    if dry; then printf -v "$name" %s "<$name>"; else missing+=", $(flag_of "$name") ($name)"; fi
  done
  [[ ! $missing ]] || die 2 "not set: ${missing#, }. Give the flag or the environment variable; --help explains them."
}

whole() { # NAME...: these are whole numbers
  local name
  for name; do
    [[ ${!name} == +([0-9]) || ${!name} == "<$name>" ]] || die 2 "$name is '${!name}'; it must be a whole number."
  done
}

one_of() { # NAME VALUE...
  [[ " ${*:2} " == *" ${!1} "* || ${!1} == "<$1>" ]] || die 2 "$1 is '${!1}'; it must be one of: ${*:2}."
}

# Dry runs

quoted() { # WORD...: a line that a shell reads as these words; <PLACEHOLDERS> stay as they are
  local word line='' apostrophe="'\\''"
  for word; do
    [[ ${word//<+([A-Z_])>/x} =~ ^[A-Za-z0-9_@%+=:,./-]+$ ]] || word="'${word//\'/"$apostrophe"}'"
    line+=" $word"
  done
  printf '%s\n' "${line# }"
}

run() { # COMMAND...: run it, or show it
  if dry; then quoted "$@"; else "$@"; fi
}

# The program

setting MTP_JAX_PROGRAM mtp-jax
setting MTP_JAX_CACHE

program_command() { # WORD...: COMMAND is how the program is started with these words
  # A process that JAX's runtime aborts (134) says where each of its threads was.
  local program variables=(PYTHONUNBUFFERED=1 PYTHONFAULTHANDLER=1 "JAX_COMPILATION_CACHE_DIR=$JAX_COMPILATION_CACHE_DIR")
  read -ra program <<<"$MTP_JAX_PROGRAM"
  [[ ! $MTP_JAX_CACHE ]] || variables+=("MTP_JAX_CACHE=$MTP_JAX_CACHE")
  COMMAND=(env "${variables[@]}" "${program[@]}" "$@")
}

train_command() { # [NAME=VALUE...]: COMMAND trains, with these in its environment
  program_command train "$EXPERIMENT" --run-dir "$RUN_DIR" --auto-resume "${EXTRA[@]}"
  COMMAND=(env "$@" "${COMMAND[@]:1}")
}

local_cache() { # the compilation cache, in a home directory
  setting JAX_COMPILATION_CACHE_DIR ~/.cache/mtp_jax/xla
}

beside_run() { # JAX_COMPILATION_CACHE_DIR is next to the run, never in it: a new run directory must be empty
  [[ $JAX_COMPILATION_CACHE_DIR ]] || JAX_COMPILATION_CACHE_DIR=${RUN_DIR%/*}/xla_cache
  [[ $RUN_DIR != '<RUN_DIR>' ]] || JAX_COMPILATION_CACHE_DIR='<RUN_DIR>/../xla_cache'
}

# Processes

PIDS=()
STOPPED='' # the signal that was forwarded: nothing is started again

forward() { # SIGNAL: to all processes
  local pid
  STOPPED=$1
  for pid in "${PIDS[@]}"; do kill -s "$1" "$pid" 2>/dev/null || true; done
}

forward_signals() {
  trap 'forward TERM' TERM HUP
  trap 'forward INT' INT
}

start() { # COMMAND...: start a process. Job control gives it a group of its own, and SIGINT, which `&` alone ignores
  set -m
  "$@" </dev/null &
  set +m
  PIDS+=("$!")
  [[ ! $STOPPED ]] || kill -s "$STOPPED" "$!" 2>/dev/null || true
}

finish() { # wait for PIDS. STATUS: 0, or 75 if the others ended with 0 or 75, or that of the first failure
  local -A ended=()
  local i code first_bad='' saved=''
  while ((${#ended[@]} < ${#PIDS[@]})); do
    for i in "${!PIDS[@]}"; do
      if [[ ${ended[$i]:-} ]] || kill -0 "${PIDS[$i]}" 2>/dev/null; then continue; fi
      code=0
      wait "${PIDS[$i]}" || code=$?
      ended[$i]=$code
      ((code)) || continue
      ((${#PIDS[@]} == 1)) || note "process $i ended with status $code"
      [[ $first_bad || $saved ]] || SECONDS=0 # the others have GRACE seconds from here
      if ((code == 75)); then saved=75; else first_bad=${first_bad:-$code}; fi
    done
    if [[ $first_bad || $saved ]] && ((SECONDS > GRACE && ${#ended[@]} < ${#PIDS[@]})); then
      for i in "${!PIDS[@]}"; do
        [[ ${ended[$i]:-} ]] && continue
        note "process $i has not ended in $GRACE s (GRACE): killed"
        kill -s KILL -- "-${PIDS[$i]}" 2>/dev/null || true
      done
    fi
    sleep 0.2
  done
  STATUS=${first_bad:-${saved:-0}}
}

# Starting again

restarting() { # RETRIES: its settings
  setting MAX_RESTARTS 1000
  setting RETRIES "$1"
  setting RESTART_DELAY 5
}

RESTARTS=0 # after status 75
FAILURES=0 # in a row; a new checkpoint begins a new row
PROGRESS='' # the newest checkpoint when the run was last started

latest_checkpoint() { # its step; nothing if there is none
  local list=(ls)
  [[ $RUN_DIR != *://* ]] || list=(gcloud storage ls)
  { "${list[@]}" "$RUN_DIR/checkpoints/" 2>/dev/null || true; } |
    sed -n 's,/*$,,; s,.*/,,; /^[0-9][0-9]*$/p' | sort -n | tail -n 1
}

again() { # STATUS: whether to start the run again; says why
  local step at
  step=$(latest_checkpoint)
  at=${step:+, newest checkpoint $step}
  [[ $step == "$PROGRESS" ]] || FAILURES=0
  PROGRESS=$step
  case $1 in
    0) return 1 ;;
    *) [[ ! $STOPPED ]] || return 1 ;;&
    75)
      ((++RESTARTS <= MAX_RESTARTS)) || { note "restarted $MAX_RESTARTS times$at (MAX_RESTARTS): stopped" && return 1; }
      note "restart $RESTARTS of $MAX_RESTARTS$at"
      ;;
    2 | 126 | 127 | 130 | 143) # a mistake in the command, no such program, stopped by hand: the same again is no use
      note "ended with status $1: not started again" && return 1
      ;;
    *)
      ((++FAILURES <= RETRIES)) || { note "failed with status $1, failure $FAILURES in a row$at (RETRIES = $RETRIES): stopped" && return 1; }
      note "failed with status $1: retry $FAILURES of $RETRIES$at"
      ;;
  esac
}

pause() { sleep "$RESTART_DELAY"; }

supervise() { # LAUNCH [BETWEEN]: LAUNCH starts the processes; ends with the last launch's status
  whole MAX_RESTARTS RETRIES GRACE RESTART_DELAY
  PROGRESS=$(latest_checkpoint)
  while :; do
    PIDS=()
    "$1"
    finish
    again "$STATUS" || exit "$STATUS"
    "${2:-pause}"
    [[ ! $STOPPED ]] || exit "$STATUS"
  done
}

# SLURM

requeue() {
  ((STATUS == 75)) || { pause && return; }
  scontrol requeue "$JOB"
  exit 75
}
launch_step() { start "${COMMAND[@]}"; }

supervise_in_slurm() { # JOB: COMMAND, which is a step of it; JOB is requeued after status 75
  JOB=$1
  RESTARTS=${SLURM_RESTART_COUNT:-0}
  # SLURM takes the job away (scancel, preemption) and tells the processes itself: nothing is forwarded, or requeued here.
  trap 'STOPPED=TERM' TERM
  supervise launch_step requeue
}

# Sweeps

sweeps() { # the settings of a sweep
  setting EXPERIMENT
  setting SWEEP_DIR
  setting OUT
  setting MAX_PARALLEL 8
}

check_sweep() {
  ((!${#EXTRA[@]})) || die 2 "'${EXTRA[0]}' follows --, and a sweep takes no options: its file says what is trained."
  whole MAX_PARALLEL
  [[ $MAX_PARALLEL == *[1-9]* ]] || die 2 "MAX_PARALLEL is $MAX_PARALLEL; it must be 1 or more."
}

sweep_command() { # WORD...: COMMAND is `mtp-jax sweep` with these
  program_command sweep "$EXPERIMENT" --dir "$SWEEP_DIR" "$@"
}

list_runs() { # RUNS are all names by number, FIRST and OTHERS the numbers of those that are not done
  local program text number kind name state
  RUNS=() FIRST=() OTHERS=()
  read -ra program <<<"$MTP_JAX_PROGRAM"
  if dry && [[ $EXPERIMENT$SWEEP_DIR == *'<'* || ! $(command -v "${program[0]}") ]]; then
    FIRST=('<FIRST>') OTHERS=('<OTHERS>') # there is nothing to ask
    return
  fi
  text=$("${program[@]}" sweep "$EXPERIMENT" --list --dir "$SWEEP_DIR") ||
    die 2 "the runs of $EXPERIMENT are not known; see above."
  while IFS=$'\t' read -r number kind name state; do
    [[ $number == +([0-9]) && $state ]] || die 2 "$MTP_JAX_PROGRAM sweep $EXPERIMENT --list printed no list of runs: '$text'."
    # shellcheck disable=SC2034  # sweep.sbatch reads it
    RUNS[number]=$name
    case $kind.$state in
      *.done) ;;
      first.*) FIRST+=("$number") ;;
      *) OTHERS+=("$number") ;;
    esac
  done <<<"$text"
}
