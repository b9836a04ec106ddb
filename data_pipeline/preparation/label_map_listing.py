"""Sources with label maps (segmentation): recognise the layout, pair images with their labels, and name the classes.

Two layouts are known, both in a folder or a tar, with or without folders around them:

- `images/<split>/…/x.jpg` with `annotations/<split>/…/x.png`, and `classes.txt`, or ADE20K's `objectInfo150.txt`;
- Cityscapes': `leftImg8bit/<split>/<city>/x_leftImg8bit.png` with `gtFine/<split>/<city>/x_gtFine_labelIds.png`.
"""

import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from data_pipeline.formatting import counted
from data_pipeline.label_png import MAX_CLASSES, LabelCoding, ignored_value, stored_coding
from data_pipeline.preparation.image_source import SPLIT_NAMES, SPLITS, Files, Items, Listing
from data_pipeline.preparation.labels import class_names, lines_of, read_lines
from data_pipeline.split import DataError, UsageError

CLASSES_NAME, ADE20K_NAME = CLASS_FILES = ("classes.txt", "objectInfo150.txt")
LONGEST_TEXT = 1 << 24  # bytes of such a file
LABEL_OPTIONS = ("classes", "ignore_value", "reduce_zero_label")
# Folders in other layouts.
IMAGE_FOLDER = re.compile(r"(?i)(images?|imgs?|img_dir|jpegimages|leftimg8bit.*|train)")
LABEL_FOLDER = re.compile(r"(?i)(annotations?|ann_dir|masks?|labels?|gtfine.*|segmentation(class|object).*|trainannot)")
OTHER_FOLDERS = ("test", "testing", "train_extra")  # known splits that are not used


@dataclass(frozen=True)
class LabelOptions:
    """Options for sources with label maps. classes: a file in place of the source's classes.txt.

    ignore_value: the value of ignored pixels; None means that of stored label maps. reduce_zero: 0 is ignored, too, and
    k is class k - 1.
    """

    classes: Path | None = None
    ignore_value: int | None = None
    reduce_zero: bool = False

    def given(self) -> dict[str, str | int | bool]:
        """The options that differ from the defaults, named as in LABEL_OPTIONS."""
        values = (self.classes and str(self.classes.resolve()), self.ignore_value, self.reduce_zero or None)
        return {name: value for name, value in zip(LABEL_OPTIONS, values, strict=True) if value is not None}

    def flags(self) -> str:
        """The given options as on the command line, for a sentence."""
        return " and ".join(f"--{name.replace('_', '-')}" for name in self.given())


NO_LABEL_OPTIONS = LabelOptions()


@dataclass(frozen=True)
class _Layout:
    """Patterns of names, each with the groups split and key. label_name: the name of the label that belongs to an image
    of a split and key.
    """

    image: str
    label: str
    label_name: str


USUAL = _Layout(r"images/([^/]+)/(.+)\.\w+", r"annotations/([^/]+)/(.+)\.(?i:png)", "annotations/{}/{}.png")
CITYSCAPES = _Layout(
    r"leftImg8bit/([^/]+)/(.+)_leftImg8bit\.png",
    r"gtFine/([^/]+)/(.+)_gtFine_labelIds\.png",
    "gtFine/{}/{}_gtFine_labelIds.png",
)
CITYSCAPES_TRAIN_IDS = _Layout(
    CITYSCAPES.image,
    r"gtFine/([^/]+)/(.+)_gtFine_labelTrainIds\.png",
    "gtFine/{}/{}_gtFine_labelTrainIds.png",
)
# Cityscapes' classes of the evaluation, and their ids. The other ids, 0 to 33, are ignored; 255 is "no label".
CITYSCAPES_CLASSES = {
    "road": 7,
    "sidewalk": 8,
    "building": 11,
    "wall": 12,
    "fence": 13,
    "pole": 17,
    "traffic light": 19,
    "traffic sign": 20,
    "vegetation": 21,
    "terrain": 22,
    "sky": 23,
    "person": 24,
    "rider": 25,
    "car": 26,
    "truck": 27,
    "bus": 28,
    "train": 31,
    "motorcycle": 32,
    "bicycle": 33,
}
CITYSCAPES_IDS = 34


def find_label_maps(files: Files, options: LabelOptions) -> Listing | None:
    """The listing of a source with label maps; None if `files` has none of the layouts.

    Raises DataError if an image has no label or the classes have no names, UsageError if `options` do not fit.
    """
    prefix = _folder_around(files.names)
    layout = _layout_of(files, prefix)
    if layout is None:
        return None
    root = f"{files.source.path}/{prefix}".rstrip("/")
    if layout is USUAL:
        classes, coding = _usual_coding(files, prefix, root, options)
    else:
        if options != NO_LABEL_OPTIONS:
            raise UsageError(
                f"{root} has Cityscapes' layout, which fixes classes and values: leave {options.flags()} out."
            )
        classes = tuple(CITYSCAPES_CLASSES)
        coding = _cityscapes_coding() if layout is CITYSCAPES else stored_coding(len(classes))
    images, maps = [], {}  # (folder of the split, key, position), and (folder of the split, key) → position
    for position, name in enumerate(files.names):
        if match := re.fullmatch(layout.label, name[len(prefix) :]):
            if (other := maps.setdefault(match.groups(), position)) != position:
                raise DataError(f"{root} has two label maps of one image, {files.names[other]} and {name}: remove one.")
        elif match := re.fullmatch(layout.image, name[len(prefix) :]):
            images.append((*match.groups(), position))
    _check_folders(root, layout, {folder for folder, *_ in images})
    images = [image for image in images if image[0] in SPLIT_NAMES]
    places = {}
    for folder, key, position in images:
        if (other := places.setdefault((folder, key), position)) != position:
            one, two = files.names[other], files.names[position]
            raise DataError(f"{root} has two images of one name, {one} and {two}, and a label map for one: remove one.")
    missing = [image for image in images if image[:2] not in maps]
    if missing:
        folder, key, position = missing[0]
        raise DataError(
            f"{len(missing)} of {len(images)} images of {root} have no label map: add it, or move the image away; the "
            f"first is {files.names[position]}, without {prefix}{layout.label_name.format(folder, key)}."
        )
    everything = Items(files.source, files.names, np.zeros(len(files.names), np.int32), files.offsets, files.sizes)
    splits = {}
    for split in SPLITS:
        pairs = [(image[2], maps[image[:2]]) for image in images if SPLIT_NAMES[image[0]] == split]
        if pairs:
            positions, positions_of_maps = np.array(pairs).T
            splits[split] = replace(everything.take(positions), maps=everything.take(positions_of_maps))
    lone = len({key for key in maps if key[0] in SPLIT_NAMES} - {image[:2] for image in images})
    others = files.others - sum(f"{prefix}{name}" in files.texts for name in CLASS_FILES)
    ignored = others + len(files.names) - len(images) - len({image[:2] for image in images}) - lone
    return Listing(classes, splits, ignored, coding, lone)


def label_map_in(files: Files) -> str | None:
    """The name of a label map in the usual layout, if there is one."""
    prefix = _folder_around(files.names)
    pattern = USUAL.label.replace("([^/]+)", f"({'|'.join(SPLIT_NAMES)})", 1)
    return next((name for name in files.names if re.fullmatch(pattern, name[len(prefix) :])), None)


def check_no_label_maps(root: Path, names: Iterable[tuple[str, str]]) -> None:
    """Raise DataError if a class folder seems to hold the label maps of the images in another one.

    names: of the images, as (class, the rest).
    """
    stems, endings = defaultdict(set), defaultdict(set)
    for folder, name in names:
        stem, _, ending = name.rpartition(".")
        stems[folder].add(stem)
        endings[folder].add(ending.lower())
    for images, maps in itertools.permutations(stems, 2):
        same = endings[maps] == {"png"} and "png" not in endings[images] and stems[maps] <= stems[images]
        if same or (IMAGE_FOLDER.fullmatch(images) and LABEL_FOLDER.fullmatch(maps)):
            raise DataError(
                f"{root}: {maps} seems to have label maps of the images in {images}. For segmentation, arrange them as "
                f"images/<split>/ and annotations/<split>/, with a {CLASSES_NAME}; for classification, give the "
                "folders and the files in them other names."
            )


def _folder_around(names: list[str]) -> str:
    """The folders, one in another, that hold all images, with a slash at the end, or ""."""
    prefix = ""
    while True:
        tops = {name[len(prefix) :].partition("/")[:2] for name in names}
        top, slash = tops.pop()
        if tops or not slash or top in ("images", "leftImg8bit"):
            return prefix
        prefix += f"{top}/"


def _layout_of(files: Files, prefix: str) -> _Layout | None:
    def any_name(pattern: str) -> bool:
        return any(re.match(pattern, name[len(prefix) :]) for name in files.names)

    tops = {name[len(prefix) :].partition("/")[0] for name in files.names}
    if "leftImg8bit" in tops:
        only_train_ids = any_name(CITYSCAPES_TRAIN_IDS.label) and not any_name(CITYSCAPES.label)
        return CITYSCAPES_TRAIN_IDS if only_train_ids else CITYSCAPES
    # A folder that is misspelt must not make another one a class, so one of the two and the names are enough.
    has_names = any(f"{prefix}{name}" in files.texts for name in CLASS_FILES)
    has_both = {"images", "annotations"} <= tops
    return USUAL if has_both or (has_names and any_name(rf"(images|annotations)/({'|'.join(SPLIT_NAMES)})/")) else None


def _check_folders(root: str, layout: _Layout, folders: set[str]) -> None:
    """folders: those that have images."""
    top = layout.image.partition("/")[0]
    if odd := sorted(folders - SPLIT_NAMES.keys() - set(OTHER_FOLDERS)):
        raise DataError(f"{root} has images in {top}/{odd[0]}; expected {top}/train and {top}/val.")
    if not folders & SPLIT_NAMES.keys():
        names = "" if layout is USUAL else ", named …_leftImg8bit.png"
        raise DataError(f"{root} has no images in {top}/train or {top}/val{names}.")


def _usual_coding(files: Files, prefix: str, root: str, options: LabelOptions) -> tuple[tuple[str, ...], LabelCoding]:
    """The class names, and what the pixels mean."""
    if options.classes:
        where, lines = options.classes, read_lines(options.classes)
    elif f"{prefix}{CLASSES_NAME}" in files.texts:
        where, lines = f"{root}/{CLASSES_NAME}", _lines(files, prefix + CLASSES_NAME)
    elif f"{prefix}{ADE20K_NAME}" in files.texts:
        if not options.reduce_zero:
            raise UsageError(f"{root} is ADE20K, whose classes count from 1: give --reduce-zero-label.")
        where = f"{root}/{ADE20K_NAME}"
        # A header; then the name is the last column, with its synonyms.
        lines = [line.split("\t")[-1].split(",")[0].strip() for line in _lines(files, prefix + ADE20K_NAME)[1:]]
    else:
        raise DataError(
            f"{root} has no {CLASSES_NAME}: write one, with the name of a class per line, or give --classes FILE."
        )
    classes = class_names(where, lines)
    if not 1 < len(classes) <= MAX_CLASSES:
        raise DataError(f"{where} names {counted(len(classes), 'class')}; a label map has 2 to {MAX_CLASSES}.")
    if twice := [name for name, count in Counter(classes).items() if count > 1]:
        raise DataError(f"{where} names {twice[0]!r} twice: give each class a name of its own.")
    ignored = ignored_value(len(classes)) if options.ignore_value is None else options.ignore_value
    first = int(options.reduce_zero)
    values = tuple(range(first, first + len(classes)))
    if ignored in values:
        name = classes[values.index(ignored)]
        raise UsageError(
            f"{ignored} is the value of class {name!r} and of ignored pixels: give another --ignore-value."
        )
    return classes, LabelCoding(values, (0, ignored) if options.reduce_zero else (ignored,))


def _lines(files: Files, name: str) -> list[str]:
    try:
        return lines_of(files.texts[name].decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"cannot read {name} in {files.source.path}: {error}.") from error


def _cityscapes_coding() -> LabelCoding:
    values = tuple(CITYSCAPES_CLASSES.values())
    return LabelCoding(values, (*sorted(set(range(CITYSCAPES_IDS)) - set(values)), 255))
