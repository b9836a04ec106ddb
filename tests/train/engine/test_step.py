"""How often a step synchronises the host with the device."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.faults import NanLoss
from tests.runs import events, run

READS = {(stage, precision): int(stage == 3) for stage in range(4) for precision in ("fp32", "bf16")} | {(1, "fp16"): 0}


@dataclass(frozen=True)
class CountReads:
    """Rank 0 writes the sections that it enters, and where in the loop it has synchronised with the device so far.

    Counted are reads of a tensor's value, and calls of DeepSpeed's `synchronize`, which do nothing on a CPU.
    """

    path: Path

    def __call__(self, rank: int) -> None:
        if rank:
            return
        import traceback

        from deepspeed.accelerator import get_accelerator
        from torch.utils._python_dispatch import TorchDispatchMode

        from train.guard.watchdog import Watchdog
        from train.trainer import Run

        steps, places = [], []

        def note(*_: object) -> None:
            places.append([f"{Path(frame.filename).name}:{frame.lineno}" for frame in traceback.extract_stack()[-9:-1]])

        get_accelerator().synchronize = note

        class Count(TorchDispatchMode):
            def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
                if function.overloadpacket.__name__ in ("_local_scalar_dense", "equal", "nonzero"):
                    note()
                return function(*arguments, **(keywords or {}))

        train_from, enter = Run.train_from, Watchdog.enter

        def counted(run, start):
            with Count():
                return train_from(run, start)

        def entering(watchdog, section, step):
            enter(watchdog, section, step)
            steps.append((section, step, len(places)))
            self.path.write_text(json.dumps([steps, places]))

        Run.train_from, Watchdog.enter = counted, entering


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "precision"), READS)
def test_between_two_lines_of_metrics_the_host_does_not_wait(tiny_config, tmp_path, stage, precision):
    """Steps 2 to 5, of two micro-batches per rank. DeepSpeed's timers, if enabled, would synchronise from step 3 on."""
    settings = [
        f"zero.stage={stage}",
        f"train.precision={precision}",
        "train.log_every=6",
        "train.max_steps=6",
        "train.evaluate_every=0",
    ]
    options = {"world": 2, "allow_fp16": precision == "fp16", "before": CountReads(tmp_path / "reads.json")}
    run(tiny_config, tmp_path, *settings, "optimizer.clip_grad=1.0", **options)
    steps, places = json.loads((tmp_path / "reads.json").read_text())
    at = {step: count for section, step, count in steps if section in ("first_step", "step")}
    read = [at[step + 1] - at[step] for step in range(2, 6)]
    assert read == [READS[stage, precision]] * 4, places[at[2] : at[6]]


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_step_whose_flag_is_read_late_is_told_as_that_step(tiny_config, tmp_path, optimizer):
    """Steps skipped between two lines of metrics are reported in order, and the run goes back as if read at once."""
    settings = [
        "train.log_every=100",
        "checkpoint.every_steps=5",
        "train.evaluate_every=0",
        "guard.max_skipped=3",
        f"optimizer.name={optimizer}",
    ]
    run(tiny_config, tmp_path, *settings, world=2, before=NanLoss(1, steps=(2, 7, 8, 9)))
    assert [line["step"] for line in events(tmp_path, "skipped_step")] == [2, 7, 8, 9]
    (back,) = events(tmp_path, "rollback")
    assert (back["steps"], back["to"], back["step"]) == ([7, 8, 9], 5, 9)
