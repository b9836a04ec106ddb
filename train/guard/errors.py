"""The errors by which a run ends, with their exit codes."""

REMEDY = "lower optimizer.lr or optimizer.clip_grad, or use train.precision=bf16 instead of fp16"


class TrainingFailed(Exception):
    """Training cannot go on: gradients that are not finite, again and again."""

    exit_code = 70


class NotSaved(Exception):
    """The run is over, but its last checkpoint could not be written."""

    exit_code = 74


class Stopped(Exception):
    """The run was asked to stop, and has: started again it goes on."""

    exit_code = 75
