#!/usr/bin/env python
"""What a trained model sees in images: python launch/predict.py photo.jpg holidays/ --run runs/cat_b"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from launch.cli import EXIT_DATA, Parser, run


class Unreadable(Exception):
    exit_code = EXIT_DATA


def main(arguments: argparse.Namespace) -> None:
    from data_pipeline.listing import find_images
    from train.checkpoint.trained_model import check_target, read_trained

    target, paths = check_target(arguments.run, arguments.best), find_images(arguments.images)

    import torch

    trained = read_trained(target, arguments.weights, best=arguments.best)
    for note in trained.notes:
        print(note, file=sys.stderr)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bad = 0
    for found in trained.task().predict(trained.model().to(device), paths, device, arguments.batch, top=arguments.top):
        if found.problem:
            bad += 1
            print(f"left out: {found.path}: {found.problem}", file=sys.stderr, flush=True)
            continue
        print(json.dumps(found.json()) if arguments.json else found.text(), flush=True)
    if bad:
        raise Unreadable(f"{bad} of {len(paths)} images could not be read")


def parse_arguments() -> argparse.Namespace:
    parser = Parser(
        description="The most probable classes of images, in their order; images are cropped and scaled as in evaluation.",
        epilog="exit codes: 0 all predicted, 65 some images could not be read (they are named, the others predicted), 78 bad arguments",
    )
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files, or folders: all images below them")
    parser.add_argument(
        "--run", required=True, metavar="RUN_OR_CHECKPOINT", help="a run's folder (newest sound checkpoint) or a checkpoint's"
    )
    parser.add_argument("--best", action="store_true", help="of a run: the checkpoint with the best top-1 in its evaluations (the EMA's)")
    parser.add_argument("--weights", choices=["ema", "model"], help="which weights (default: ema where the run has it)")
    parser.add_argument("--top", type=_positive, default=5, metavar="N", help="classes per image (default: 5)")
    parser.add_argument("--batch", type=_positive, default=64, metavar="N", help="images per forward pass (default: 64)")
    parser.add_argument("--json", action="store_true", help="a line of JSON for each image, unrounded")
    return parser.parse_args()


def _positive(text: str) -> int:
    if int(text) < 1:
        raise ValueError
    return int(text)


if __name__ == "__main__":
    sys.exit(run(main, parse_arguments()))
