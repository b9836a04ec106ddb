"""Pack images into a prepared dataset, verify one, or index existing WebDataset shards. See docs/data.md.

    python launch/prepare.py SOURCE DEST [--val SOURCE [--val-labels FILE]] [--classes FILE] [--ignore-value N]
    [--reduce-zero-label] [--bad-boxes stop|drop] [--empty-images keep|exclude] [--formats webdataset,ffcv]
    [--resize-short N] [--workers N] …
    python launch/prepare.py verify DEST
    python launch/prepare.py index DEST [--split NAME] [--label-key KEY]

Exit codes: 0 finished, 65 bad data, 70 no memory, or a worker was killed, 74 files cannot be read or written (a full
disk), 78 bad arguments, 130 interrupted.
"""

import argparse
import errno
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from launch.cli import Parser, fail, number, reader_left
from train import exit_codes

DESCRIPTION = """\
Pack images into WebDataset shards with an index. Every image is decoded; broken images are left out
and listed in DEST/report.jsonl. After an interruption, the same command continues.

  python launch/prepare.py verify DEST    check every shard, index and image of a prepared dataset
  python launch/prepare.py index DEST     make existing WebDataset shards usable as they are
"""
SOURCE_HELP = (
    "a folder [train|val/]<class>/<image>; a tar of such a folder, compressed or not; ImageNet's "
    "ILSVRC2012_img_train.tar; imagefolder:PATH; a torchvision dataset, NAME or NAME:ROOT, such as cifar10:downloads; "
    "for segmentation, a folder or tar with images/<split>/x.jpg, annotations/<split>/x.png and classes.txt, or in "
    "ADE20K's or Cityscapes' own layout; for detection, one in COCO's layout (annotations/instances_<split>.json) or "
    "in Pascal VOC's"
)
LABELS_HELP = (
    "labels for a --val without class folders: one class name per line, in the order of the file names; "
    "'file class' per line; or Kaggle's LOC_val_solution.csv"
)
INDEX_DESCRIPTION = """\
Write a manifest and an index beside existing WebDataset shards (every *.tar below DEST), which are not
changed. A sample is <key>.jpg with its label in <key>.cls or in a field of <key>.json. DEST/classes.txt
may name the classes, one per line in the order of the labels. Every image is decoded; images that are
not sound RGB or gray JPEGs are left out and listed in DEST/report.jsonl.
For segmentation a sample is <key>.jpg with <key>.png, gray pixels of which each is the number of a class, or
255 where ignored (with more than 255 classes: 16 bits, 65535); DEST/classes.txt must name the classes.
For detection it is <key>.jpg with <key>.json that has objects, in the form of docs/data.md; DEST/classes.txt
must name the classes.
"""


def main(arguments: list[str]) -> int:
    command, parser = {"verify": (run_verify, _verify_parser), "index": (run_index, _index_parser)}.get(
        arguments[0] if arguments else "", (run_prepare, _prepare_parser)
    )
    options = parser().parse_args(arguments if command is run_prepare else arguments[1:])

    from concurrent.futures.process import BrokenProcessPool

    from data_pipeline.faults import StorageError
    from data_pipeline.split import DataError, UsageError

    try:
        return command(options)
    except (UsageError, DataError, StorageError) as error:
        return fail(error.exit_code, error)
    except MemoryError:
        return fail(exit_codes.FAILED, "out of memory: give fewer --workers; the same command goes on from here.")
    except BrokenProcessPool:
        return fail(
            exit_codes.FAILED,
            "a worker process was killed (out of memory?): start the same command again, finished shards are kept.",
        )
    except OSError as error:
        if reader_left(error):
            return exit_codes.CLOSED
        code = exit_codes.FAILED if error.errno == errno.ENOMEM else exit_codes.IO_ERROR
        return fail(code, f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}.")
    except KeyboardInterrupt:
        return fail(exit_codes.INTERRUPTED, "interrupted; the same command goes on from here.")


def run_prepare(options: argparse.Namespace) -> int:
    from data_pipeline.preparation.label_map_listing import LabelOptions
    from data_pipeline.preparation.object_listing import ObjectOptions
    from data_pipeline.preparation.prepare import prepare
    from data_pipeline.split import UsageError
    from data_pipeline.validate import Encoding

    if options.val_labels and not options.val:
        raise UsageError("--val-labels belongs to --val: give the folder or tar of those images, too.")
    if options.ffcv_mode and "ffcv" not in options.formats:
        raise UsageError("--ffcv-mode belongs to --formats webdataset,ffcv.")
    fresh = prepare(
        options.source,
        options.dest,
        workers=options.workers,
        shard_bytes=max(1, round(options.shard_size * 1e6)),
        val_fraction=options.val_fraction,
        seed=options.seed,
        val=options.val,
        val_labels=options.val_labels,
        encoding=Encoding(options.resize_short, options.max_side, options.quality),
        label_options=LabelOptions(options.classes, options.ignore_value, options.reduce_zero_label),
        object_options=ObjectOptions(options.bad_boxes, options.empty_images),
        beton_mode=(options.ffcv_mode or "jpeg") if "ffcv" in options.formats else None,
    )
    again = "already prepared; the source is not read again (if it has changed, give another DEST)"
    print(f"{options.dest} is {'prepared' if fresh else again}:")
    _print_report(options.dest)
    return 0


def run_index(options: argparse.Namespace) -> int:
    from data_pipeline.preparation.foreign import index

    index(options.dest, workers=options.workers, split=options.split, label_key=options.label_key)
    print(f"{options.dest} is indexed:")
    _print_report(options.dest)
    return 0


def _print_report(dest: Path) -> None:
    """Print the summary, unless the report, which training does not need, has been deleted."""
    import json

    from data_pipeline.formatting import counted, first_five
    from data_pipeline.manifest import read_manifest
    from data_pipeline.preparation.finish import LIST_NAME, REPORT_NAME

    if not (dest / REPORT_NAME).exists():
        return
    report = json.loads((dest / REPORT_NAME).read_text())
    of_images = {
        "reencoded": "encoded again",
        "transcoded": "transcoded to JPEG",
        "repaired": "with a repaired header",
        "labels_rewritten": "with a label map that was encoded anew",
        "excluded": "left out, which cannot be used",
        "empty": "left out, without an object but crowds",
    }
    of_objects = {
        "objects": ("object", ""),
        "dropped": ("box", " left out, which cannot be right"),
        "partly_outside": ("box", " partly outside of the image"),
        "not_learnt": ("box", " without area or a whole pixel, which training leaves out"),
    }
    listed = boxes = False
    if segmentation := report.get("segmentation"):
        print(f"  segmentation: {counted(segmentation['classes'], 'class')}, a label map beside every image")
    if detection := report.get("detection"):
        print(f"  detection: {counted(detection['classes'], 'class')}")
    if not segmentation and not detection:
        classes = read_manifest(dest).classes
        print(f"  classification: {counted(len(classes), 'class')} ({first_five(classes)})")
    for name, split in report["splits"].items():
        parts = [
            counted(split["samples"], "image"),
            *(f"{split[outcome]:,} {words}" for outcome, words in of_images.items() if outcome in split),
            *(counted(split[what], noun) + words for what, (noun, words) in of_objects.items() if what in split),
        ]
        if absent := report.get("absent", {}).get(name):
            thing = "pixel" if segmentation else "object" if detection else "image"
            parts.append(f"no {thing} of {first_five(absent)}")
        print(f"  {name}: {'; '.join(parts)}")
        if first := report.get("first_excluded", {}).get(name):
            print(f"    the first of those that cannot be used: {first}", flush=True)
        if (excluded := split.get("excluded", 0)) > split["samples"]:
            total = excluded + split["samples"]
            print(f"warning: {excluded:,} of the {total:,} images of {name} cannot be used", file=sys.stderr)
        listed = listed or bool(split.keys() & {"transcoded", "repaired", "excluded", "empty"})
        boxes = boxes or bool(split.keys() & {"dropped", "partly_outside", "not_learnt"})
    if listed or boxes:
        what = {
            "images that were transcoded, repaired or left out": listed,
            "boxes left out or reaching outside": boxes,
        }
        said = " and the ".join(text for text, holds in what.items() if holds)
        print(f"  {dest / LIST_NAME} names the {said}, with the reason")
    if convertible := sum(split.get("convertible", 0) for split in report["splits"].values()):
        kinds, folders = "JPEGs", "COCO's layout" if detection else "class folders"
        if segmentation:
            kinds, folders = "JPEGs with gray PNGs", "images/<split>/ and annotations/<split>/"
        print(
            f"  sound, but not {kinds} that training can read: {convertible:,} of those left out. Existing shards are"
        )
        print(f"  not rewritten: to keep these images, unpack the shards into {folders} and prepare those")
    if segmentation and (lone := segmentation.get("labels_without_image")):
        print(f"  ignored: {counted(lone, 'label map')} without an image")
    if ignored := report.get("ignored_files"):
        print(f"  ignored: {counted(ignored, 'file')} besides the images of these splits")


def run_verify(options: argparse.Namespace) -> int:
    from data_pipeline.preparation.verify import verify

    faults = verify(options.dest, options.workers)
    for fault in faults:
        fail(exit_codes.BAD_DATA, fault)
    if faults:
        return exit_codes.BAD_DATA
    print(f"{options.dest} is whole: every file and every image has its checksum.")
    return 0


def _prepare_parser() -> Parser:
    parser = Parser(description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="SOURCE", help=SOURCE_HELP)
    parser.add_argument("dest", metavar="DEST", type=Path, help="folder of the prepared dataset")
    _add_workers(parser)

    source = parser.add_argument_group("source of the val split, if it is not in SOURCE")
    source.add_argument(
        "--val", metavar="SOURCE", help="a folder or tar, with class folders, or without them and with --val-labels"
    )
    source.add_argument("--val-labels", type=Path, metavar="FILE", help=LABELS_HELP)
    source.add_argument(
        "--val-fraction",
        type=number(float, 0, 1),
        default=0.0,
        metavar="F",
        help="fraction of SOURCE to use as val (default: none)",
    )

    labels = parser.add_argument_group("segmentation")
    labels.add_argument("--classes", type=Path, metavar="FILE", help="class names, one per line (default: classes.txt)")
    labels.add_argument(
        "--ignore-value",
        type=number(int, 0, 65_535),
        metavar="N",
        help="value of ignored pixels in the label maps (default: 255; with more than 255 classes 65535)",
    )
    labels.add_argument(
        "--reduce-zero-label", action="store_true", help="0 is ignored, too, and k is class k - 1, as in ADE20K"
    )

    boxes = parser.add_argument_group("detection")
    boxes.add_argument(
        "--bad-boxes",
        choices=("stop", "drop"),
        default="stop",
        help="what to do about boxes that cannot be right: stop with the first of them (default), or leave them out",
    )
    boxes.add_argument(
        "--empty-images",
        choices=("keep", "exclude"),
        default="exclude",
        help="what to do about images of train without any object but crowds (default: exclude)",
    )

    size = parser.add_argument_group("smaller images (without these options, the bytes of sound JPEGs are kept)")
    size.add_argument(
        "--resize-short", type=number(int, 1), metavar="N", help="shrink the short side to N pixels if it is longer"
    )
    size.add_argument(
        "--max-side", type=number(int, 1), metavar="N", help="shrink the long side to N pixels if it is longer"
    )
    size.add_argument(
        "--quality",
        type=number(int, 1, 100),
        metavar="Q",
        help="encode again as JPEG of this quality, 4:2:0 (default with the above: 90)",
    )

    output = parser.add_argument_group("output")
    output.add_argument(
        "--formats",
        type=_formats,
        default=("webdataset",),
        metavar="LIST",
        help="webdataset (default) or webdataset,ffcv",
    )
    output.add_argument(
        "--ffcv-mode",
        choices=("jpeg", "raw"),
        help="contents of FFCV files: jpeg (default), or raw pixels, which are faster and larger",
    )
    output.add_argument(
        "--shard-size",
        type=number(float, 0.001, 1_000_000),
        default=128.0,
        metavar="MB",
        help="size of a shard (default: %(default)s)",
    )
    output.add_argument(
        "--seed",
        type=number(int, 0, 2**63 - 1),
        default=0,
        metavar="N",
        help="seed of the shuffle and of --val-fraction (default: %(default)s)",
    )
    return parser


def _verify_parser() -> Parser:
    parser = Parser(
        prog="prepare.py verify", description="Check every shard, FFCV file, index and image of a prepared dataset."
    )
    parser.add_argument("dest", metavar="DEST", type=Path, help="folder of the dataset")
    _add_workers(parser)
    return parser


def _index_parser() -> Parser:
    parser = Parser(prog="prepare.py index", description=INDEX_DESCRIPTION)
    parser.add_argument("dest", metavar="DEST", type=Path, help="folder of the shards")
    parser.add_argument(
        "--split",
        choices=("train", "val"),
        help="the split of all shards (default: from their names: train-…, val-…, validation-…)",
    )
    parser.add_argument(
        "--label-key",
        metavar="KEY",
        help="the field of .json with the label (default: .cls, or else the field label, class or cls)",
    )
    _add_workers(parser)
    return parser


def _add_workers(parser: Parser) -> None:
    parser.add_argument(
        "--workers",
        type=number(int, 1),
        default=len(os.sched_getaffinity(0)),
        metavar="N",
        help="worker processes (default: one per CPU, %(default)s)",
    )


def _formats(text: str) -> tuple[str, ...]:
    formats = tuple(text.split(","))
    if unknown := set(formats) - {"webdataset", "ffcv"}:
        raise argparse.ArgumentTypeError(
            f"there is no format {', '.join(sorted(unknown))}: the formats are webdataset and ffcv"
        )
    if "webdataset" not in formats:
        raise argparse.ArgumentTypeError("FFCV files are made from the WebDataset shards: give webdataset,ffcv")
    return formats


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
