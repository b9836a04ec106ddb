"""Training: what runs inside a training process. Read `trainer.py` first."""

from train.run import run

__all__ = ["run"]
