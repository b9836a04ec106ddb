#!/usr/bin/env python
"""Use a trained model on images: python launch/predict.py photo.jpg holidays/ --run runs/cat_b"""

import argparse
import inspect
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from launch.cli import Parser, add_choice_of_weights, check_output, number, run
from train import exit_codes

OPTIONS = ("top", "output", "min_score")  # of some tasks only: arguments of their `predict`


class Unreadable(Exception):
    """Some images could not be read; the message has their number."""

    exit_code = exit_codes.BAD_DATA


def main(arguments: argparse.Namespace) -> None:
    from data_pipeline.preparation.listing import find_images
    from train.checkpoint.trained_model import check_target, read_trained
    from train.config import ConfigError

    target, paths = check_target(arguments.run, arguments.best), find_images(arguments.images)
    if arguments.output:
        check_output("--output", f"{arguments.output}/")

    import torch

    trained = read_trained(target, arguments.weights, best=arguments.best)
    for note in trained.notes:
        print(note, file=sys.stderr)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    task, bad = trained.task(), 0
    options = {name: value for name in OPTIONS if (value := getattr(arguments, name)) is not None}
    for name in options:
        if name not in inspect.signature(task.predict).parameters:
            raise ConfigError(f"--{name.replace('_', '-')} is no option of the task {trained.config.task.name}")
    for found in task.predict(trained.model().to(device), paths, device, arguments.batch, **options):
        if found.problem:
            bad += 1
            print(f"left out: {found.path}: {found.problem}", file=sys.stderr, flush=True)
            continue
        print(json.dumps(found.json()) if arguments.json else found.text(), flush=True)
    if bad:
        raise Unreadable(f"{bad} of {len(paths)} images could not be read")


def parse_arguments() -> argparse.Namespace:
    parser = Parser(
        description="Print the most probable classes of each image; of a segmentation the classes' shares of its "
        "pixels; of a detection its objects, with boxes as left, top: width x height. Images are cropped and scaled as "
        "in evaluation.",
        epilog="exit codes: 0 all images predicted, 65 some images could not be read (they are listed, the others "
        "predicted), 78 bad arguments",
    )
    parser.add_argument(
        "images", nargs="+", metavar="IMAGE", help="image files, or folders that are searched for images"
    )
    parser.add_argument(
        "--run",
        required=True,
        metavar="RUN_OR_CHECKPOINT",
        help="the folder of a run (then its newest sound checkpoint is used) or of a checkpoint",
    )
    add_choice_of_weights(parser)
    parser.add_argument(
        "--top", type=number(int, 1), metavar="N", help="of a classification: classes per image (default: 5)"
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FOLDER",
        help="of a segmentation: write there each photograph under its classes' colours, NAME_overlay.jpg, and the "
        "classes' numbers as gray values, NAME_labels.png; of a detection: each photograph with boxes, NAME_boxes.jpg",
    )
    parser.add_argument(
        "--min-score",
        type=number(float, 0, 1),
        metavar="SCORE",
        help="of a detection: leave out objects with a lower score, 0 to 1 (default: 0.3)",
    )
    parser.add_argument(
        "--batch", type=number(int, 1), default=64, metavar="N", help="images per forward pass (default: 64)"
    )
    parser.add_argument("--json", action="store_true", help="print one line of JSON per image, unrounded")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(run(main, parse_arguments()))
