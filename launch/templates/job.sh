#!/bin/bash
# A training run that is requeued until it has finished, made by launch/submit.py. It was submitted with this command,
# which also submits it again:
#   {{command}}
{{options}}

# SLURM sends TERM to the ranks and to this shell when the job is preempted or out of time. The ranks save and exit; the
# shell stays and decides whether to requeue.
trap : TERM USR1

python={{python}}
repository={{repository}}
run={{run}}
arguments=(--config {{config}} --output "$run"{{arguments}})
max_restarts={{max_restarts}}
doctor={{doctor}}

# These may be set in the submitting shell; the ranks take their place from SLURM's variables (launch/ranks.py).
unset RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT
export PYTHONUNBUFFERED=1
# Prefix of the files in which the ranks report their exit codes; srun's exit code may differ from them.
export CAT_VERDICT_FILE="$run/logs/verdict_$SLURM_JOB_ID"
{{environment}}
set +eu  # which the setup commands may have set: a failed command does not end this script

# Return the answer of requeue.py. While it cannot run, because Python's files cannot be read, try again for a minute;
# then requeue the job, at most $max_restarts times: another node may have them.
ask() {
  local answer pause job="${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}"
  job="${job:-$SLURM_JOB_ID}"
  for pause in 1 2 4 8 16 32 0; do
    answer=$("$python" "$repository/launch/requeue.py" "$@" "$run" --max-restarts "$max_restarts")
    [ -n "$answer" ] && return "$answer"
    sleep $pause
  done
  echo "$repository/launch/requeue.py cannot be run by $python on $SLURMD_NODENAME (see above)"
  if [ "${SLURM_RESTART_COUNT:-0}" -lt "$max_restarts" ] && [ "$(squeue -h -j "$job" -o %T)" = RUNNING ]; then
    scontrol requeue "$job"
  fi
  return 74
}

# Count the starts. End the job after $max_restarts restarts in a row without a newer checkpoint.
ask begin || exit

# With --doctor: check the nodes, until they have been fit once. If they are not fit (78), the job ends. The exit code of
# the doctor is not reported as the run's.
if [ "$doctor" = yes ] && [ ! -e "$run/logs/fit_$SLURM_JOB_ID" ]; then
  srun --kill-on-bad-exit=0{{srun_options}} env -u CAT_VERDICT_FILE \
    "$python" "$repository/launch/doctor.py" "${arguments[@]}"
  code=$?
  [ $code -eq 78 ] && exit 78
  if [ $code -ne 0 ]; then
    ask end --code "$code"
    exit
  fi
  touch "$run/logs/fit_$SLURM_JOB_ID"
fi

# One task per rank. The first that fails ends the others. Training continues from the newest checkpoint.
srun --kill-on-bad-exit=1 --open-mode=append --output="$run/logs/rank_%t.log"{{srun_options}} \
  "$python" "$repository/launch/train.py" "${arguments[@]}"
code=$?

# If all nodes finished, or all report bad data, failed training or bad configuration (0, 65, 70, 78), the job ends.
# Otherwise it is requeued.
ask end --code "$code"
