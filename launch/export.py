#!/usr/bin/env python
"""Export a checkpoint: python launch/export.py runs/cat_b --to cat_b.onnx"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from launch.cli import Parser, add_choice_of_weights, check_output, fail, run
from train import exit_codes


def main(arguments: argparse.Namespace) -> None:
    from catmodel import export
    from train.checkpoint.trained_model import check_target, read_trained

    try:
        export.check_target(arguments.to, arguments.features)
    except export.CannotExport as error:
        sys.exit(fail(exit_codes.BAD_CONFIG, f"--to {error}"))
    check_output("--to", arguments.to, parents=True)
    target = check_target(arguments.target, arguments.best)
    trained = read_trained(target, arguments.weights, best=arguments.best)
    for note in trained.notes:
        print(note, file=sys.stderr)
    model, about = trained.task().export(trained.state, arguments.features)
    try:
        difference = export.export(model, arguments.to, about)
    except export.CannotExport as error:
        sys.exit(fail(exit_codes.BAD_CONFIG, error))
    except export.ExportError as error:
        sys.exit(fail(exit_codes.FAILED, error))
    source = f"{trained.checkpoint} ({trained.weights})"
    print(f"{arguments.to}: {source}, within {difference:.1e} of the model on random images")


def parse_arguments() -> argparse.Namespace:
    parser = Parser(
        description="Export a trained model. The file is compared with the model on random images before it is named.",
        epilog="exit codes: 0 exported, 70 the file differs by more than 1e-4 and was removed, 78 bad arguments. See "
        "docs/export.md",
    )
    parser.add_argument(
        "target",
        metavar="RUN_OR_CHECKPOINT",
        help="the folder of a run (then its newest sound checkpoint is used) or of a checkpoint",
    )
    parser.add_argument(
        "--to",
        required=True,
        metavar="FILE",
        help="FILE.safetensors, FILE.onnx, FILE.pt2 (torch.export), or FOLDER/ for timm and the Hub",
    )
    add_choice_of_weights(parser)
    parser.add_argument(
        "--features",
        action="store_true",
        help="export the feature maps of all stages, for images of any size, instead of the logits",
    )
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(run(main, parse_arguments()))
