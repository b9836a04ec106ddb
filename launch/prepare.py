"""Pack images into a prepared dataset, or verify one.

    python launch/prepare.py SOURCE DEST [--workers N] [--shard-size MB] [--val-fraction F] [--seed N]
    python launch/prepare.py verify DEST

Exit codes: 0 finished, 65 bad data, 70 failed otherwise (a full disk, a killed worker), 78 bad arguments, 130 interrupted.
"""

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from launch.cli import EXIT_DATA, EXIT_FAILED, Parser, fail

EXIT_INTERRUPTED = 130  # as a shell says it

DESCRIPTION = "Pack images into WebDataset shards with an index; start it again to go on after an interruption."
SOURCE_HELP = (
    "a folder [train|val/]<class>/<image>; a tar of one, compressed or not; imagefolder:PATH; "
    "or a torchvision dataset, NAME or NAME:ROOT, such as cifar10:downloads"
)


def main(arguments: list[str]) -> int:
    verifying = arguments[:1] == ["verify"]
    parser = _verify_parser() if verifying else _prepare_parser()
    options = parser.parse_args(arguments[1:] if verifying else arguments)

    from concurrent.futures.process import BrokenProcessPool

    from data_pipeline.manifest import DataError
    from data_pipeline.sources import UsageError

    try:
        return run_verify(options.dest) if verifying else run_prepare(options)
    except (UsageError, DataError) as error:
        return fail(error.exit_code, error)
    except BrokenProcessPool:
        return fail(EXIT_FAILED, "a worker process was killed (out of memory?): start the same command again, finished shards are kept.")
    except OSError as error:
        return fail(EXIT_FAILED, f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}.")
    except KeyboardInterrupt:
        return fail(EXIT_INTERRUPTED, "interrupted; the same command goes on from here.")


def run_prepare(options: argparse.Namespace) -> int:
    import json

    from data_pipeline.prepare import REPORT_NAME, prepare

    fresh = prepare(
        options.source,
        options.dest,
        workers=options.workers,
        shard_bytes=max(1, round(options.shard_size * 1e6)),
        val_fraction=options.val_fraction,
        seed=options.seed,
    )
    print(f"{options.dest} {'is prepared' if fresh else 'is already prepared'}:")
    report = json.loads((options.dest / REPORT_NAME).read_text())
    for name, split in report["splits"].items():
        excluded, transcoded = len(split["excluded"]), len(split["transcoded"])
        print(f"  {name}: {split['samples']} images, {transcoded} of them transcoded to RGB JPEG; {excluded} corrupt ones left out")
    if any(split["excluded"] or split["transcoded"] for split in report["splits"].values()):
        print(f"  {options.dest / REPORT_NAME} lists the images that were transcoded or left out")
    if report["ignored_files"]:
        print(f"  {report['ignored_files']} files that are no images of these splits were ignored")
    return 0


def run_verify(dest: Path) -> int:
    from data_pipeline.verify import verify

    faults = verify(dest)
    for fault in faults:
        fail(EXIT_DATA, fault)
    if faults:
        return EXIT_DATA
    print(f"{dest} is whole: every shard, index and image has its checksum.")
    return 0


def _prepare_parser() -> Parser:
    parser = Parser(description=DESCRIPTION, epilog="To check a prepared dataset: python launch/prepare.py verify DEST")
    parser.add_argument("source", metavar="SOURCE", help=SOURCE_HELP)
    parser.add_argument("dest", metavar="DEST", type=Path, help="folder of the prepared dataset")
    parser.add_argument("--workers", type=_positive(int), default=_cpus(), metavar="N", help="processes (default: the CPUs, %(default)s)")
    parser.add_argument("--shard-size", type=_positive(float), default=128.0, metavar="MB", help="size of a shard (default: %(default)s)")
    parser.add_argument(
        "--val-fraction", type=_fraction, default=0.0, metavar="F", help="part of a source without val that becomes val (default: none)"
    )
    parser.add_argument("--seed", type=_seed, default=0, metavar="N", help="of the shuffle and of --val-fraction (default: %(default)s)")
    return parser


def _verify_parser() -> Parser:
    parser = Parser(prog="prepare.py verify", description="Check every shard, index and image of a prepared dataset.")
    parser.add_argument("dest", metavar="DEST", type=Path)
    return parser


def _positive(kind: type):
    def parse(text: str):
        value = kind(text)
        if not 0 < value < float("inf"):
            raise argparse.ArgumentTypeError(f"{text} is not a positive number")
        return value

    parse.__name__ = kind.__name__  # what argparse calls the type in its message
    return parse


def _fraction(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value


def _seed(text: str) -> int:
    value = int(text)
    if not 0 <= value < 2**63:
        raise argparse.ArgumentTypeError(f"{text} is not an integer between 0 and 2^63")
    return value


def _cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
