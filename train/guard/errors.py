"""The errors by which a run ends, with their exit codes."""

from train import exit_codes

REMEDY = "lower optimizer.lr or optimizer.clip_grad, or use train.precision=bf16 instead of fp16"


class TrainingFailed(Exception):
    """Training cannot continue, because gradients, or the state, are repeatedly not finite."""

    exit_code = exit_codes.FAILED


class StateLost(Exception):
    """The state is not finite, as after a memory fault, and there is no checkpoint yet. Another start begins anew."""

    exit_code = exit_codes.CRASHED


class NotSaved(Exception):
    """The run is over, but its last checkpoint could not be written."""

    def __init__(self, step: int, why: str | None):
        super().__init__(f"the last checkpoint, of step {step}, was not written ({why}): mend that, and start again")

    exit_code = exit_codes.IO_ERROR


class Stopped(Exception):
    """The run was stopped by a signal. Started again, it continues."""

    exit_code = exit_codes.STOPPED


def no_way_back(why: str, state_is_finite: bool) -> TrainingFailed | StateLost:
    """The error to raise if the run must go back, and has no checkpoint."""
    why += ", and there is no checkpoint to go back to"
    if state_is_finite:
        return TrainingFailed(f"{why}; {REMEDY}")
    return StateLost(f"{why}: start again, from the beginning; if it ends like this again, {REMEDY}")
