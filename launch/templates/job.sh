#!/bin/bash
# A training run that comes back by itself, made by launch/submit.py. Submitted, and to be submitted again, with:
#   {{command}}
{{options}}

# TERM comes to the ranks and to this shell when the job is preempted or out of time. The ranks save and leave; the shell stays, to decide.
trap : TERM USR1

python={{python}}
repository={{repository}}
run={{run}}
arguments=(--config {{config}} --output "$run"{{arguments}})
max_restarts={{max_restarts}}
doctor={{doctor}}

# What the submitting shell may have had: the ranks find their place from SLURM's variables (launch/ranks.py).
unset RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT
export PYTHONUNBUFFERED=1
export CAT_VERDICT_FILE="$run/logs/verdict_$SLURM_JOB_ID"  # beside it the ranks leave their exit codes: srun's may be another
{{environment}}
# Counts the starts; ends the job here after $max_restarts restarts that brought no newer checkpoint.
"$python" "$repository/launch/requeue.py" begin "$run" --max-restarts "$max_restarts" || exit

# With --doctor: the nodes are looked at, until they have been found fit once. Not fit (78): the job ends. Its exit code is not the run's.
if [ "$doctor" = yes ] && [ ! -e "$run/logs/fit_$SLURM_JOB_ID" ]; then
  srun --kill-on-bad-exit=0{{srun_options}} env -u CAT_VERDICT_FILE "$python" "$repository/launch/doctor.py" "${arguments[@]}"
  code=$?
  [ $code -eq 78 ] && exit 78
  [ $code -eq 0 ] || { "$python" "$repository/launch/requeue.py" end "$run" --max-restarts "$max_restarts" --code $code; exit; }
  touch "$run/logs/fit_$SLURM_JOB_ID"
fi

# One task per rank. The first that fails ends the others. Training goes on from the newest checkpoint.
srun --kill-on-bad-exit=1 --open-mode=append --output="$run/logs/rank_%t.log"{{srun_options}} \
  "$python" "$repository/launch/train.py" "${arguments[@]}"
code=$?

# Finished, bad data, failed or bad configuration (0, 65, 70, 78) on all nodes: the job ends. Anything else: scontrol requeue.
"$python" "$repository/launch/requeue.py" end "$run" --max-restarts "$max_restarts" --code "$code"
