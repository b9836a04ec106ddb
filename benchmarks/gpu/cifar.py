"""Whole runs on CIFAR-10: parts `cifar10_300` and `cifar10_100` of `make gpu`, beside the other parts."""

import shutil
import subprocess
import sys
import time

from benchmarks.gpu.record import ROOT, Record, Session
from benchmarks.gpu.runs import lines_of

AIM = 95.0  # % top-1
SMALL = (  # an epoch of 260 images
    *("train.micro_batch=20", "train.global_batch=20", "train.max_steps=13", "train.evaluate_every=1"),
    *("train.precision=fp32", "train.compile=false", "model.embed_dim=16", "model.depths=[1,1,1]"),
)


def whole(session: Session, record: Record, config: str) -> None:
    """A row per evaluation, as soon as it is there, with the seconds since the start, pauses included."""
    output, began = session.work / config, time.monotonic()
    settings = [f"data.path={session.cifar}", *session.size((), SMALL)]
    command = [sys.executable, "launch/train.py", "--config", f"configs/{config}.yaml", "--output", str(output)]
    process, known, going = subprocess.Popen([*command, *settings], cwd=ROOT), 0, True
    while going:
        going = process.poll() is None  # asked before the file is read, so that nothing is missed
        lines = lines_of(output)
        found = [line for line in lines if line["kind"] == "eval"]
        for line in found[known:]:
            name = f"step {line['step']}, {line['weights']}"
            record.add(name=name, step=line["step"], top1=line["top1"], seconds=round(time.monotonic() - began, 1))
        if len(found) > known:
            shutil.copy(output / "metrics.jsonl", session.output / f"train-{config}-metrics.jsonl")
        known = len(found)
        time.sleep(0.2)
    if process.returncode:
        raise RuntimeError(f"the run ended with {process.returncode}")


def judge(rows: list[dict]) -> tuple[bool, str]:
    """The better weights of the last evaluation."""
    last = max(row["step"] for row in rows)
    best = max((row for row in rows if row["step"] == last), key=lambda row: row["top1"])
    return True, f"{best['name']}: {best['top1']:.2f} % top-1 (aim {AIM:g}) after {best['seconds']:.0f} s"
