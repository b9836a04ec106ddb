#!/usr/bin/env python
"""Show that the code computes what an earlier commit did, to the bit: python benchmarks/same_bits.py COMMIT

Needs the demo's dataset (make demo, or launch/prepare.py). For fp32 and bf16 and ZeRO 0, 1 and 3 it runs quickstart on
two CPU ranks with the commit's code and with this one, and compares losses, sample ids and all tensors of the last
checkpoint. It also continues here a run that was begun with the commit's code.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
CASES = [(precision, stage) for precision in ("fp32", "bf16") for stage in (0, 1, 3)]


def main(arguments: argparse.Namespace) -> int:
    """0 if everything is equal, else 1."""
    dataset, steps = Path(arguments.data).resolve(), arguments.steps
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        before = check_out(arguments.commit, scratch / "before")
        found = {}
        for precision, stage in CASES:
            name = f"{precision}, ZeRO {stage}"
            old, new, begun = (scratch / f"{kind}-{precision}-{stage}" for kind in ("old", "new", "begun"))
            for tree, output, last in (
                (before, old, steps),
                (ROOT, new, steps),
                (before, begun, steps // 2),
                (ROOT, begun, steps),
            ):
                train(tree, output, dataset, precision, stage, last)
            found[name] = {"same run": differences(old, new), "begun before, continued here": differences(old, begun)}
            print(name, found[name], flush=True)
    equal = not any(lines for case in found.values() for lines in case.values())
    if arguments.json:
        command = f"python benchmarks/same_bits.py {arguments.commit} --steps {steps}"
        about = {"command": command, "date": date.today().isoformat()}
        document = {**about, "commit": arguments.commit, "steps": steps, "equal": equal, "differences": found}
        Path(arguments.json).write_text(json.dumps(document, indent=1) + "\n")
    print("equal to the bit" if equal else "NOT equal")
    return int(not equal)


def check_out(commit: str, folder: Path) -> Path:
    """The commit's files, with its compiled decoder."""
    folder.mkdir()
    archive = subprocess.run(["git", "-C", str(ROOT), "archive", commit], check=True, capture_output=True).stdout
    subprocess.run(["tar", "-x", "-C", str(folder)], input=archive, check=True)
    subprocess.run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], cwd=folder, check=True)
    return folder


def train(tree: Path, output: Path, dataset: Path, precision: str, stage: int, last: int) -> None:
    """Train quickstart with the code in `tree` until step `last`."""
    settings = [
        f"data.path={dataset}",
        f"train.precision={precision}",
        f"zero.stage={stage}",
        f"train.max_steps={last}",
    ]
    settings += ["train.log_every=1", "train.evaluate_every=0", "monitor.record_samples=true"]
    settings += [f"checkpoint.every_steps={last}"]
    launcher = [str(Path(sys.executable).with_name("torchrun")), "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, "launch/train.py", "--config", "configs/quickstart.yaml", "--output", str(output), *settings]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(tree)}
    subprocess.run(command, cwd=tree, env=environment, check=True, stdout=subprocess.DEVNULL)


def differences(one: Path, other: Path) -> list[str]:
    """What differs between two runs, in sentences; empty if nothing does."""
    import torch

    from train.telemetry.goodput import read_lines

    found = []
    losses = [
        {
            line["step"]: (line["loss"], line["grad_norm"])
            for line in read_lines(run / "metrics.jsonl")
            if "loss" in line
        }
        for run in (one, other)
    ]
    for step, (loss, norm) in losses[0].items():
        other_loss, other_norm = losses[1].get(step, (torch.nan, torch.nan))
        if (loss, norm) != (other_loss, other_norm):
            found.append(f"the loss of step {step} by {abs(other_loss / loss - 1):.0e}")
    for path in sorted((one / "samples").iterdir()):
        if path.read_text() != (other / "samples" / path.name).read_text():
            found.append(f"samples/{path.name}")
    tensors = [tensors_of(max((run / "checkpoints").glob("step_*"))) for run in (one, other)]
    if tensors[0].keys() != tensors[1].keys():
        found.append("the names of the tensors")
    return found + [key for key in tensors[0] if not torch.equal(tensors[0][key], tensors[1].get(key))]


def tensors_of(checkpoint: Path) -> dict:
    """The whole weights, averages and moments in a checkpoint, whichever ranks wrote their pieces."""
    import torch

    from train.checkpoint.info import read_info
    from train.checkpoint.pieces import Wanted, fill, pieces_of

    info = read_info(checkpoint)
    shards = [checkpoint / name for name in sorted(info.shards)]
    shapes = {key: info.shapes.get(key.partition("/")[2]) for key in pieces_of(shards)}
    found = {key: torch.empty(shape) for key, shape in shapes.items() if shape is not None}
    fill(shards, [Wanted(key, 0, tensor.view(-1)) for key, tensor in found.items()])
    return found


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("commit", metavar="COMMIT")
    parser.add_argument("--data", default="datasets/shapes", metavar="PATH", help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=40, metavar="N", help="default: %(default)s")
    parser.add_argument("--json", metavar="FILE", help="write the result there too")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main(parse_arguments()))
