# shellcheck shell=bash
# shellcheck disable=SC2034 # some are read by those who source this
# What the scripts of this folder share; sourced by them. $clone is where diptych lies.

: "${clone:?is set by those who source this}"
readonly USAGE=2 REQUEUE=85 # pretrain.engine.preemption.EXIT_REQUEUE: saved, start the same command again

usage() { # SCRIPT'S WORDS: say what they are, and stop
  echo "usage: sbatch [sbatch options] slurm/$*" >&2
  exit "$USAGE"
}

in_a_job() { # INSTEAD: refuse to go on outside SLURM
  if [[ -n ${SLURM_JOB_ID:-} ]]; then return; fi
  echo "not in a SLURM job: use sbatch, or without SLURM: $*" >&2
  exit "$USAGE"
}

# Which Python: $PYTHON, or the clone's environment.
if [[ -z ${PYTHON:-} && -x $clone/.venv/bin/python ]]; then PYTHON=$clone/.venv/bin/python; fi
PYTHON=${PYTHON:-python}
HOST_PYTHON=${HOST_PYTHON:-$PYTHON} # for the launcher, where PYTHON leads into a container, which has no srun
export PYTHONPATH=$clone${PYTHONPATH:+:$PYTHONPATH}
start=$((${SLURM_RESTART_COUNT:-0} + 1))
# The last task of an array to start has the number of the whole array: by that, all tasks would be queued again.
job=${SLURM_ARRAY_TASK_ID:+${SLURM_ARRAY_JOB_ID:-}_$SLURM_ARRAY_TASK_ID}
job=${job:-${SLURM_JOB_ID:-}}

say() { echo "$(date +%FT%T) job $job, start $start: $*" >&2; }

# Run a command and pass signals on to it, as SIGNAL: USR1 of sbatch's --signal, TERM of scancel, preemption, time limit.
# Sets $code and $asked. A command that is `exec`ed gets them itself.
run_and_pass() { # SIGNAL COMMAND WORD ...
  local signal=$1
  shift
  asked=0 child=
  pass() {
    asked=1
    if [[ -n $child ]]; then kill -"$signal" "$child" 2>/dev/null || true; fi
  }
  trap pass USR1 TERM
  "$@" &
  child=$!
  if ((asked)); then pass; fi # it came before $child was known
  while true; do # a trapped signal ends `wait` early, with a code that is not the command's
    code=0
    wait "$child" || code=$?
    if ! kill -0 "$child" 2>/dev/null; then break; fi
  done
  trap - USR1 TERM
}

# Back to the queue; not if the job was cancelled, or if SLURM has given it to other nodes meanwhile and this is a node
# that was cut off: the job would end there. A slurmctld that is away has ten minutes to come back.
requeue() {
  local try found restarts
  for ((try = 0; try < 120; try++)); do
    if found=$(scontrol show job --oneliner "$job" 2>/dev/null); then
      restarts=${found#* Restarts=}
      restarts=${restarts%% *} # fewer than ours where a controller was killed before it had saved the last one
      if [[ $found != *" JobState=RUNNING "* ]] || ((restarts > start - 1)); then
        say "cancelled, or queued again already: not queued again"
        return
      fi
      if scontrol requeue "$job"; then return; fi
    fi
    sleep 5
  done
  say "could not be queued again; the same sbatch command goes on where it stopped"
}
