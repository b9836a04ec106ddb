"""Pascal VOC's layout, as COCO's dicts: `JPEGImages/x.jpg`, `Annotations/x.xml`, and the names of each split's images
in `ImageSets/Main/<split>.txt`; in a folder or a tar, with or without folders around (VOCdevkit/VOC2007).
"""

import re
from collections.abc import Collection
from typing import NamedTuple
from xml.etree import ElementTree

from data_pipeline.formatting import counted
from data_pipeline.preparation.image_source import Annotations, Files
from data_pipeline.preparation.labels import lines_of
from data_pipeline.preparation.tars import check_name
from data_pipeline.split import DataError
from data_pipeline.validate import shortened

VOC_FILE = re.compile(r"(.*/)?(?:ImageSets/Main/(train|val|trainval|test)\.txt|Annotations/.+\.xml)")
WITH_FLAG = re.compile(r"(.*\S)\s+(-1|0|1)")


class _Image(NamedTuple):
    """An annotated image. objects: (class, [xmin, ymin, xmax, ymax], whether it is difficult)."""

    file_name: str
    width: int | float
    height: int | float
    objects: list[tuple[str, list[int | float], bool]]


def find_voc(files: Files) -> list[Annotations] | None:
    """The boxes of each split, or None if `files` has another layout.

    Train is train.txt and val is val.txt. With a test.txt that has annotations, as in VOC2007, train is trainval.txt
    and val is test.txt. Raises DataError.
    """
    found: dict[str, dict[str, str]] = {}
    for name in files.texts:
        if (match := VOC_FILE.fullmatch(name)) and match[2]:
            found.setdefault(match[1] or "", {})[match[2]] = name
    if not found:
        boxes = next((name for name in files.texts if VOC_FILE.fullmatch(name)), None)
        if boxes and any("JPEGImages/" in name for name in files.names):
            raise DataError(
                f"{files.source.path} has boxes, as in {boxes}, and no list of the images: write "
                "ImageSets/Main/train.txt, with the name of an image, without suffix, on each line."
            )
        return None
    if len(found) > 1:
        raise DataError(f"{files.source.path} has several sets of Pascal VOC ({', '.join(sorted(found))}): give one.")
    [(prefix, lists)] = found.items()
    folder = f"{prefix}JPEGImages/"
    names: dict[str, str] = {}
    for name in (name.removeprefix(folder) for name in files.names if name.startswith(folder)):
        if (other := names.setdefault(name.rpartition(".")[0], name)) != name:
            raise DataError(f"{files.source.path} has two images of one name, {folder}{other} and {name}: remove one.")
    wanted = {name: _read_list(files, prefix, path, names.keys()) for name, path in lists.items()}
    if "trainval" in wanted and any(_xml(prefix, stem) in files.texts for stem in wanted.get("test", ())):
        chosen = {"train": "trainval", "val": "test"}
    else:
        chosen = {"train": "train" if "train" in wanted else "trainval", "val": "val"}
    chosen = {split: name for split, name in chosen.items() if name in wanted}
    if not chosen:
        raise DataError(f"{files.source.path} has test.txt alone in ImageSets/Main: add train.txt or trainval.txt.")
    if len(chosen) == 2 and (both := sorted(set(wanted[chosen["train"]]) & set(wanted[chosen["val"]]))):
        raise DataError(
            f"{lists[chosen['train']]} and {lists[chosen['val']]} in {files.source.path} have "
            f"{counted(len(both), 'name')} in common, the first is {both[0]}: take each out of one of them."
        )
    images = {
        split: [_read_xml(files, _xml(prefix, stem), names.get(stem, f"{stem}.jpg")) for stem in wanted[name]]
        for split, name in chosen.items()
    }
    classes = sorted({name for each in images.values() for image in each for name, *_ in image.objects})
    return [
        Annotations(
            split, lists[name], [folder], lambda split=split: _as_coco(images[split], classes), 1 + len(images[split])
        )
        for split, name in chosen.items()
    ]


def _xml(prefix: str, stem: str) -> str:
    return f"{prefix}Annotations/{stem}.xml"


def _read_list(files: Files, prefix: str, name: str, images: Collection[str]) -> list[str]:
    """The names of a list, one a line, without suffix; sorted. A name that is there twice counts once.

    A name may have spaces. If -1, 0 or 1 follows every name, as in the lists of a class, it is not part of them.
    images: the names of all images.
    """
    lines = [line for line in lines_of(files.texts[name].decode("utf-8-sig", "replace")) if line]
    flagged = [WITH_FLAG.fullmatch(line) for line in lines]
    if all(flagged) and not any(line in images or _xml(prefix, line) in files.texts for line in lines):
        lines = [found[1] for found in flagged]
    stems = sorted(set(lines))
    for stem in stems:
        check_name(name, stem)
    return stems


def _read_xml(files: Files, name: str, file_name: str) -> _Image:
    if name not in files.texts:
        raise DataError(f"{files.source.path} has no {name}, though a list in ImageSets/Main names it: add it.")
    try:
        tree = ElementTree.fromstring(files.texts[name])
    except (ElementTree.ParseError, LookupError, ValueError) as error:
        raise DataError(f"{name} in {files.source.path} cannot be read ({shortened(str(error))}).") from error
    objects = [
        (
            each.findtext("name", "").strip(),
            [_number(each.findtext(f"bndbox/{side}")) for side in ("xmin", "ymin", "xmax", "ymax")],
            _number(each.findtext("difficult", "0")) > 0,
        )
        for each in tree.findall("object")
    ]
    return _Image(file_name, _number(tree.findtext("size/width")), _number(tree.findtext("size/height")), objects)


def _as_coco(images: list[_Image], classes: list[str]) -> dict:
    """COCO's dict. Numbers count from 1. Difficult objects are crowds: neither learnt nor counted.

    A box reaches from one pixel to another, both of which belong to it; they count from 1.
    """
    numbers = {name: number for number, name in enumerate(classes, start=1)}
    entries, annotations = [], []
    for image_id, image in enumerate(images, start=1):
        size = {"width": image.width, "height": image.height}
        entries.append({"id": image_id, "file_name": image.file_name, **size})
        for name, (left, top, right, bottom), difficult in image.objects:
            box = [left - 1, top - 1, right - left + 1, bottom - top + 1]
            annotation = {"id": len(annotations) + 1, "image_id": image_id, "category_id": numbers[name], "bbox": box}
            annotations.append({**annotation, "area": box[2] * box[3], "iscrowd": int(difficult)})
    categories = [{"id": number, "name": name} for name, number in numbers.items()]
    return {"images": entries, "annotations": annotations, "categories": categories}


def _number(text: str | None) -> int | float:
    """NaN, which is the place of no box, if it is no number."""
    try:
        value = float(text)
    except (TypeError, ValueError):
        return float("nan")
    return int(value) if value.is_integer() else value
