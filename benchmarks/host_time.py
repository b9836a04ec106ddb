#!/usr/bin/env python
"""The host's time and the bytes of a step on two ranks, now and at an earlier commit: benchmarks/host_time.py COMMIT

The network has as many layers as cat_base, but so few channels that most of a step is the host's time: Python, torch's
dispatch, DeepSpeed. The ranks run in a network namespace of their own (Linux, as root), whose loopback counts the bytes
that both send. Needs the demo's dataset.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from benchmarks.same_bits import check_out  # noqa: E402

STAGES = (0, 1, 2)
STEPS = (40, 120)  # of the two runs whose difference is measured
MODEL = (
    "{name: cat_base, embed_dim: 16, num_heads: [1, 1, 1, 1], patch_size: 2, embed_patch_size: 2, drop_path_rate: 0}"
)


def main(arguments: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        trees = {arguments.commit: check_out(arguments.commit, Path(folder) / "before"), "here": ROOT}
        rows = {f"ZeRO {stage}": {name: [] for name in trees} for stage in STAGES}
        for number in range(arguments.rounds):
            for stage in STAGES:
                for name, tree in trees.items():
                    output = Path(folder) / f"{name}-{stage}-{number}"
                    rows[f"ZeRO {stage}"][name].append(measure(tree, output, Path(arguments.data).resolve(), stage))
                    print(f"ZeRO {stage}, {name}: {rows[f'ZeRO {stage}'][name][-1]}", flush=True)
    found = {
        stage: {
            name: {key: statistics.median(run[key] for run in runs) for key in runs[0]} for name, runs in of.items()
        }
        for stage, of in rows.items()
    }
    print(json.dumps(found, indent=1))
    if arguments.json:
        about = {
            "command": f"python benchmarks/host_time.py {arguments.commit} --rounds {arguments.rounds}",
            "here": subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, text=True).strip(),
            "date": date.today().isoformat(),
        }
        Path(arguments.json).write_text(json.dumps({**about, "model": MODEL, "rows": found}, indent=1) + "\n")


def measure(tree: Path, output: Path, dataset: Path, stage: int) -> dict[str, float]:
    """ "step_ms" of two micro-batches per rank, and "bytes" that both ranks send in a step."""
    sent = [train(tree, output.with_name(f"{output.name}-{steps}"), dataset, stage, steps) for steps in STEPS]
    lines = map(json.loads, (output.with_name(f"{output.name}-{STEPS[1]}") / "metrics.jsonl").read_text().splitlines())
    times = [line["step_ms"] for line in lines if line["kind"] == "train" and line["step"] > STEPS[0]]
    return {"step_ms": statistics.median(times), "bytes": (sent[1] - sent[0]) / (STEPS[1] - STEPS[0])}


def train(tree: Path, output: Path, dataset: Path, stage: int, steps: int) -> int:
    """Train `steps` steps; returns the bytes that went over loopback."""
    settings = [
        *(f"data.path={dataset}", f"zero.stage={stage}", f"train.max_steps={steps}", f"model={MODEL}"),
        *("train.precision=fp32", "train.global_batch=4", "train.micro_batch=1", "train.log_every=10"),
        *("train.evaluate_every=0", f"checkpoint.every_steps={steps}", "monitor.images=0", "data.workers=1"),
    ]
    launcher = [str(Path(sys.executable).with_name("torchrun")), "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, "launch/train.py", "--config", "configs/quickstart.yaml", "--output", str(output), *settings]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(tree)}
    script = 'ip link set lo up && "$@" > /dev/null && grep lo: /proc/net/dev'
    counted = subprocess.run(
        ["unshare", "-n", "sh", "-c", script, "sh", *command],
        cwd=tree,
        env=environment,
        check=True,
        capture_output=True,
    )
    return int(counted.stdout.split()[1])


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("commit", metavar="COMMIT")
    parser.add_argument("--data", default="datasets/shapes", metavar="PATH", help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="default: %(default)s")
    parser.add_argument("--json", metavar="FILE", help="write the result there too")
    return parser.parse_args()


if __name__ == "__main__":
    main(parse_arguments())
