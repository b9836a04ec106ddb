"""Sources with boxes (detection): recognise COCO's layout, check the annotations, and pair them with the images.

`annotations/instances_<split>.json` with images in `<split>/` or `images/<split>/`, where <split> is train or val, with
a year behind it or not; in a folder or a tar, with or without folders around. voc_listing.py knows Pascal VOC's layout.
"""

import json
import re
from collections import Counter
from dataclasses import dataclass, replace

import numpy as np

from data_pipeline.object_json import fault_of_box, is_learnt, is_partly_outside, is_whole, write_objects
from data_pipeline.preparation.image_source import SPLITS, Annotations, Files, Items, Listing, Objects
from data_pipeline.preparation.labels import check_names
from data_pipeline.preparation.tars import check_name
from data_pipeline.preparation.voc_listing import find_voc
from data_pipeline.split import DataError
from data_pipeline.validate import shortened

COCO_FILE = re.compile(r"(.*/)?annotations/instances_(train|val)(\d{4})?\.json")
BOX_FILE = re.compile(r"(.*/)?(annotations/[^/]*|_annotations\.coco)\.json")  # whether or not it has COCO's name
OTHER_SPLIT = re.compile(r"(.*/)?annotations/instances_(?!test)[^/]*\.json")
OBJECT_OPTIONS = ("bad_boxes", "empty_images")
NEEDS = {
    "category": "an id that is a whole number, and a name",
    "image": "an id, a width and a height that are whole numbers, no side of 0, and a file_name",
}
# Outcomes in the report.
PARTLY_OUTSIDE, NOT_LEARNT, DROPPED, EMPTY = "partly_outside", "not_learnt", "dropped", "empty"


@dataclass(frozen=True)
class ObjectOptions:
    """Options for sources with boxes. bad_boxes: what to do about boxes that cannot be right: "stop" or "drop".

    empty_images: whether to "keep" or to "exclude" images of train without any object but crowds.
    """

    bad_boxes: str = "stop"
    empty_images: str = "exclude"

    def given(self) -> dict[str, str]:
        """The options that differ from the defaults, named as in OBJECT_OPTIONS."""
        return {
            name: getattr(self, name)
            for name in OBJECT_OPTIONS
            if getattr(self, name) != getattr(NO_OBJECT_OPTIONS, name)
        }


NO_OBJECT_OPTIONS = ObjectOptions()


def find_objects(files: Files, options: ObjectOptions) -> Listing | None:
    """The listing of a source with boxes; None if `files` has no such layout.

    Raises DataError if the annotations are not understood, name images that are not there, or have boxes that cannot be
    right and options.bad_boxes is "stop".
    """
    sources = _find_coco(files) or find_voc(files)
    if sources is None:
        return None
    everything = Items(files.source, files.names, np.zeros(len(files.names), np.int32), files.offsets, files.sizes)
    splits, notes, categories = {}, [], None
    for source in sources:
        annotated = _Annotated(source.split, source.where, options)
        annotated.read(source.read())
        if categories is not None and annotated.categories != categories:
            raise DataError(f"{source.where} has other categories than {sources[0].where}: make them equal.")
        categories = annotated.categories
        positions = _positions(files, annotated, source.folders)
        splits[source.split] = replace(everything.take(positions), objects=annotated.objects())
        files_of = [image["file_name"] for image in annotated.images.values()]
        paths = dict(zip(files_of, splits[source.split].names, strict=True))
        notes += [(split, paths.get(image, image), *note) for split, image, *note in annotated.notes]
    used = sum(source.files + len(splits[source.split].names) for source in sources)
    ignored = files.others + len(files.names) - used
    ids, names = zip(*sorted(categories.items()), strict=True)
    check_names(files.source.path, names)
    return Listing(names, splits, ignored, category_ids=ids, notes=tuple(notes))


def without_empty(listing: Listing, options: ObjectOptions) -> Listing:
    """The listing without the images of train that have no object but crowds, unless the options keep them."""
    if not listing.category_ids or options.empty_images == "keep" or "train" not in listing.splits:
        return listing
    train = listing.splits["train"]
    empty = train.objects.counts == 0
    if empty.all():
        raise DataError("no image of train has an object: add annotations, or give --empty-images keep.")
    notes = [("train", train.names[i], EMPTY, "no object but crowds") for i in np.flatnonzero(empty)]
    splits = {**listing.splits, "train": train.take(np.flatnonzero(~empty))}
    return replace(listing, splits=splits, notes=(*listing.notes, *notes))


def _find_coco(files: Files) -> list[Annotations] | None:
    found = {}
    for name in files.texts:
        if match := COCO_FILE.fullmatch(name):
            prefix, split, year = match[1] or "", match[2], match[3] or ""
            if split in found:
                raise DataError(
                    f"{files.source.path} has two files of annotations for {split}, {found[split].where} and {name}: "
                    "leave one."
                )
            folders = [f"{prefix}{top}{folder}/" for folder in (split + year, split) for top in ("", "images/")]
            found[split] = Annotations(split, name, folders, lambda name=name: _parsed(files, name), 1)
    if found and (unread := [name for name in files.unread if OTHER_SPLIT.fullmatch(name)]):
        raise misnamed(files, unread[0])
    return [found[split] for split in SPLITS if split in found] or None


def misnamed(files: Files, name: str) -> DataError:
    """For a file that looks as if it held boxes."""
    return DataError(
        f"{name} in {files.source.path} is not read, because of its name: for detection, call the annotations "
        "annotations/instances_train.json and annotations/instances_val.json, with the images in train/ and val/; else "
        "take it away."
    )


def _parsed(files: Files, name: str) -> dict:
    try:
        return json.loads(files.texts[name])
    except (ValueError, RecursionError) as error:
        raise DataError(f"{name} in {files.source.path} is not JSON ({shortened(str(error))}).") from error


def _positions(files: Files, annotated: "_Annotated", folders: list[str]) -> np.ndarray:
    """The places of the images in `files`. folders: the first that holds images is used."""
    folder = next((folder for folder in folders if any(name.startswith(folder) for name in files.names)), None)
    if folder is None:
        raise DataError(f"{annotated.where} has no images beside it: put them into {' or '.join(folders)}.")
    places = {name: i for i, name in enumerate(files.names) if name.startswith(folder)}
    wanted = [folder + image["file_name"] for image in annotated.images.values()]
    if missing := [name for name in wanted if name not in places]:
        raise DataError(
            f"{len(missing)} of the {len(wanted)} images that {annotated.where} names are not in "
            f"{files.source.path}: add them, or take them out of it; the first is {missing[0]}."
        )
    return np.array([places[name] for name in wanted], np.int64)


class _Annotated:
    """The annotations of one split.

    categories: {number: name}. images: {id: {"image_id", "file_name", "width", "height"}} in the order of the source.
    notes: see Listing.
    """

    def __init__(self, split: str, where: str, options: ObjectOptions):
        self.split, self.where, self._options = split, where, options
        self.categories: dict[int, str] = {}
        self.images: dict[int, dict] = {}
        self.notes: list[tuple[str, str, str, str]] = []
        self._objects: dict[int, list[dict]] = {}

    def read(self, document: dict) -> None:
        """Check COCO's dict. Raises DataError."""
        try:
            for category in document["categories"]:
                name = category["name"]
                self._add("category", self.categories, category, name, isinstance(name, str))
            self._check_names()
            for image in document["images"]:
                size = image["width"], image["height"]
                sound = isinstance(image["file_name"], str) and all(is_whole(side) and side > 0 for side in size)
                kept = {name: image[name] for name in ("file_name", "width", "height")}
                self._add("image", self.images, image, {"image_id": image["id"], **kept}, sound)
                check_name(self.where, image["file_name"])
            files = Counter(image["file_name"] for image in self.images.values())
            if twice := [name for name, count in files.items() if count > 1]:
                raise DataError(f"{self.where} has two images with the file_name {twice[0]}: leave one of them.")
            if not self.categories or not self.images:
                raise DataError(f"{self.where} has no {'categories' if self.images else 'images'}: add them.")
            self._read_annotations(document["annotations"])
        except KeyError as error:
            raise DataError(f"{self.where} is not as COCO's: a field {error} is missing.") from error
        except TypeError as error:
            raise DataError(f"{self.where} is not as COCO's ({error}).") from error

    def objects(self) -> Objects:
        """Of the images, in their order. The annotations are given up on the way, to save memory."""
        documents, counts = [], []
        for number, image in self.images.items():
            found = self._objects.pop(number, [])
            documents.append(write_objects(image, found))
            counts.append(sum(not each["iscrowd"] for each in found))
        return Objects(documents, np.array(counts, np.int64))

    def _check_names(self) -> None:
        named: dict[str, int] = {}
        for number, name in self.categories.items():
            if (other := named.setdefault(name, number)) != number:
                raise DataError(
                    f"{self.where} names {name!r:.100} twice, as the categories {other} and {number}: rename one, or "
                    "take it out if it has no boxes."
                )

    def _add(self, what: str, table: dict, entry: dict, value: object, sound: bool) -> None:
        number = entry["id"]
        if not sound or not is_whole(number):
            raise DataError(f"{self.where}: each {what} needs {NEEDS[what]}; one is {shortened(repr(entry))}.")
        if number in table:
            raise DataError(f"{self.where} has two {what} entries with the id {number}: give each an id of its own.")
        table[number] = value

    def _read_annotations(self, annotations: list[dict]) -> None:
        labels = {number: label for label, number in enumerate(sorted(self.categories))}
        bad, seen, objects, learnt = [], set(), 0, 0
        for each in annotations:
            number, image_id = each["id"], each["image_id"]
            if not is_whole(number) or number in seen:
                raise DataError(
                    f"{self.where}: the annotation id {number!r:.100} is no whole number, or another annotation has "
                    "it: give each an id of its own."
                )
            seen.add(number)
            image = self.images.get(image_id) if is_whole(image_id) else None
            box = each["bbox"]
            if fault := self._fault(each, image, labels):
                bad.append((image["file_name"] if image else self.where, number, fault))
                continue
            if is_partly_outside(box, image["width"], image["height"]):
                why = f"annotation {number}: its box {box} lies partly outside of the image: training cuts it off"
                self.notes.append((self.split, image["file_name"], PARTLY_OUTSIDE, why))
            kept = {
                "id": number,
                "label": labels[each["category_id"]],
                "bbox": box,
                "area": each.get("area", box[2] * box[3]),
                "iscrowd": int(bool(each.get("iscrowd"))),
            }
            if "segmentation" in each:
                kept["segmentation"] = each["segmentation"]
            if not kept["iscrowd"]:
                objects += 1
                if is_learnt(box, kept["area"], image["width"], image["height"]):
                    learnt += 1
                else:
                    why = f"annotation {number}: box {box}, area {kept['area']}: too small, training leaves it out"
                    self.notes.append((self.split, image["file_name"], NOT_LEARNT, why))
            self._objects.setdefault(image_id, []).append(kept)
        if bad and self._options.bad_boxes == "stop":
            name, number, fault = bad[0]
            raise DataError(
                f"{len(bad)} of the {len(seen)} boxes in {self.where} cannot be right: correct them, or leave them out "
                f"with --bad-boxes drop; the first is annotation {number} of {name}: {fault}."
            )
        if objects and not learnt:
            raise DataError(
                f"{self.where} has {objects} objects, and training would leave out all of them, because their areas "
                "are 0 or their boxes smaller than a pixel: a box is [left, top, width, height] in pixels, and an area "
                "may be left out."
            )
        self.notes += [(self.split, name, DROPPED, f"annotation {number}: {fault}") for name, number, fault in bad]

    def _fault(self, each: dict, image: dict | None, labels: dict[int, int]) -> str | None:
        if image is None:
            return f"there is no image {each['image_id']!r:.100}"
        category, box = each["category_id"], each["bbox"]
        if not is_whole(category) or category not in labels:
            return f"there is no category {category!r:.100}"
        if (crowd := each.get("iscrowd")) not in (None, 0, 1):
            return f"its iscrowd {crowd!r:.100} is neither 0 nor 1"
        fault = fault_of_box(box, 0, image["width"], image["height"])
        return fault or fault_of_box(box, each.get("area", box[2] * box[3]), image["width"], image["height"])
