#!/usr/bin/env python
"""Accuracy of the networks of cifar10.yaml and cifar10_300.yaml after an equal small budget on a CPU:

    python benchmarks/cifar_budget.py cifar10.tar.xz [--json docs/results/cifar-budget.json]

Both train with the recipe of cifar10.yaml: 3 epochs of the first 1,000 images of each class, one seed, evaluated on the
first 200 test images of each class. About a quarter of an hour on two cores. With 2,000 test images, one standard error
of an accuracy of 50 % is 1.1 %.
"""

import argparse
import json
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from benchmarks.environment import machine, versions

IMAGES = {"train": 1000, "val": 200}  # of each class
EPOCHS = 3
LARGE = ["model.embed_dim=64", "model.num_heads=[2,4,8]", "model.depths=[1,3,3]"]  # as in cifar10_300.yaml
SHIFTED = "model.shifted_windows=true"  # in cifar10_300.yaml, too
NETWORKS = {"cat_nano": [SHIFTED], "cifar10_300.yaml's": [SHIFTED, *LARGE]}


def extract(archive: Path, folder: Path) -> None:
    """The first images of each class, by name, from a tar of SPLIT/CLASS/*.jpg."""
    with tarfile.open(archive) as tar:
        members = sorted((member for member in tar if member.isfile()), key=lambda member: member.name)
        taken: Counter[tuple[str, ...]] = Counter()
        for member in members:
            *_, split, name = place = Path(member.name).parts[:-1]
            taken[place] += 1
            if taken[place] <= IMAGES[split]:
                target = folder / split / name / Path(member.name).name
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(tar.extractfile(member).read())


def main(arguments: argparse.Namespace) -> None:
    result = {"command": "python benchmarks/cifar_budget.py cifar10.tar.xz", "epochs": EPOCHS}
    result |= {"images": IMAGES, "date": date.today().isoformat(), "machine": machine(), "versions": versions()}
    with tempfile.TemporaryDirectory() as scratch:
        images, dataset = Path(scratch, "images"), Path(scratch, "dataset")
        extract(arguments.archive, images)
        python = [sys.executable, "-W", "ignore"]
        subprocess.run([*python, str(ROOT / "launch/prepare.py"), str(images), str(dataset)], check=True)
        result["networks"] = {}
        for number, (name, overrides) in enumerate(NETWORKS.items()):
            output = Path(scratch, str(number))
            settings = [*overrides, f"data.path={dataset}", f"train.epochs={EPOCHS}", f"train.evaluate_every={EPOCHS}"]
            command = [*python, str(ROOT / "launch/train.py"), "--config", str(ROOT / "configs/cifar10.yaml")]
            subprocess.run([*command, "--output", str(output), *settings], check=True)
            lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
            scores = {line["weights"]: line["top1"] for line in lines if line["kind"] == "eval"}
            result["networks"][name] = {"overrides": overrides, "top1": scores}
    arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result["networks"], indent=1))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("archive", type=Path, metavar="CIFAR10", help="a tar of train/CLASS/*.jpg, val/CLASS/*.jpg")
    parser.add_argument("--json", type=Path, default=ROOT / "docs/results/cifar-budget.json", metavar="FILE")
    main(parser.parse_args())
