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

job=$SLURM_JOB_ID
[ -n "$SLURM_ARRAY_JOB_ID" ] && job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID

# Run a command until it succeeds, for a minute. If it does not, requeue the job, at most $max_restarts times: the files
# may come back, and another node may have them. The job's comment, which needs none of them, says how often and why.
insist() {
  for pause in 1 2 4 8 16 32 0; do
    "$@" && return
    sleep $pause
  done
  read -r state comment <<< "$(squeue -h -j "$job" -o "%T %k")"
  [[ $comment =~ ^failed\ starts:\ ([0-9]+) ]]
  failed=$((BASH_REMATCH[1] + 1))
  comment="failed starts: $failed, the last on $SLURMD_NODENAME: the log, Python or the repository cannot be used"
  echo "$comment (see above)"
  scontrol update JobId="$job" Comment="$comment"
  [ "$state" = RUNNING ] && [ "$failed" -le "$max_restarts" ] && scontrol requeue "$job"
  exit 74
}

# SLURM would end a job for good if it had to open this file itself and could not.
open_log() {
  exec >> "$run/logs/job_$job.log" 2>&1
}

# Run requeue.py. Only a Python that could start gives an answer.
ask() {
  answer=$("$python" "$repository/launch/requeue.py" "$1" "$run" --max-restarts "$max_restarts" "${@:2}")
  [ -n "$answer" ]
}

insist open_log

# These may be set in the submitting shell; the ranks take their place from SLURM's variables (launch/ranks.py).
unset RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT
export PYTHONUNBUFFERED=1
# Prefix of the files in which the ranks report their exit codes; srun's exit code may differ from them.
export CAT_VERDICT_FILE="$run/logs/verdict_$SLURM_JOB_ID"
{{environment}}
set +eu  # which the setup commands may have set: a failed command does not end this script

# Count the starts. End the job after $max_restarts restarts in a row without a newer checkpoint.
insist ask begin
[ "$answer" -eq 0 ] || exit "$answer"

# With --doctor: check the nodes, until they have been fit once. If they are not fit (78), the job ends. The exit code of
# the doctor is not reported as the run's.
if [ "$doctor" = yes ] && [ ! -e "$run/logs/fit_$SLURM_JOB_ID" ]; then
  srun --kill-on-bad-exit=0{{srun_options}} env -u CAT_VERDICT_FILE \
    "$python" "$repository/launch/doctor.py" "${arguments[@]}"
  code=$?
  [ $code -eq 78 ] && exit 78
  if [ $code -ne 0 ]; then
    insist ask end --code "$code"
    exit "$answer"
  fi
  touch "$run/logs/fit_$SLURM_JOB_ID"
fi

# One task per rank. The first that fails ends the others. Training continues from the newest checkpoint.
srun --kill-on-bad-exit=1 --open-mode=append --output="$run/logs/rank_%t.log"{{srun_options}} \
  "$python" "$repository/launch/train.py" "${arguments[@]}"
code=$?

# If all nodes finished, or all report bad data, failed training or bad configuration (0, 65, 70, 78), the job ends.
# Otherwise it is requeued.
insist ask end --code "$code"
exit "$answer"
