"""The run: config, engine, loop, EMA, checkpoints, evaluation, monitoring. Read `trainer.py` first."""
