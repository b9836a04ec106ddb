"""List and read the images of a source: a folder, a tar, a tar of tars, or a torchvision dataset.

Classes are taken from the folders by class_listing.py; sources with label maps are recognised by label_map_listing.py,
those with boxes by object_listing.py.

A source is listed once (`list_source`) and then read image by image, in any order and from any process (`read_image`).
A listing is sorted by name, so the same images in a folder and in a tar give the same dataset. Only the listing grows
with the source: about 130 bytes per image, and half as much again while it is sorted.
"""

import array
import functools
import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from data_pipeline.faults import read_fully, retried
from data_pipeline.formatting import counted
from data_pipeline.preparation import torchvision_source
from data_pipeline.preparation.class_listing import check_same_classes, sort_into_splits
from data_pipeline.preparation.folders import walk
from data_pipeline.preparation.image_source import Files, Items, Listing, Source
from data_pipeline.preparation.label_map_listing import (
    CLASS_FILES,
    LONGEST_TEXT,
    NO_LABEL_OPTIONS,
    LabelOptions,
    find_label_maps,
    label_map_in,
)
from data_pipeline.preparation.labels import read_labels
from data_pipeline.preparation.object_listing import (
    BOX_FILE,
    COCO_FILE,
    NO_OBJECT_OPTIONS,
    ObjectOptions,
    find_objects,
)
from data_pipeline.preparation.ownership import DOWNLOAD
from data_pipeline.preparation.progress import Progress
from data_pipeline.preparation.tars import IMAGE_SUFFIXES, check_name, plain_tar, tar_files
from data_pipeline.preparation.voc_listing import VOC_FILE
from data_pipeline.split import DataError, UsageError
from data_pipeline.validate import check_size

ANNOTATION_SUFFIXES = (".csv", ".json", ".txt", ".xml")


def open_source(text: str, work: Path) -> Source:
    """The source that `text` names: a path, or `NAME` or `NAME:ROOT` of a torchvision dataset.

    A compressed tar is first decompressed into `work`. Raises UsageError if there is no such source, DataError if it
    cannot be read.
    """
    path = Path(text)
    if path.is_dir():
        return Source("folder", path.resolve())
    if path.is_file():
        return Source("tar", plain_tar(path.resolve(), work))
    name, _, root = text.partition(":")
    if name.lower() == "imagefolder":
        # Read as a folder, because torchvision's ImageFolder does not keep the original bytes and knows no train/ and
        # val/.
        if not Path(root).is_dir():
            raise UsageError(f"{text}: there is no folder {root!r}.")
        return Source("folder", Path(root).resolve())
    if "/" not in name:
        if dataset := torchvision_source.class_named(name):
            return Source("torchvision", Path(root).resolve() if root else work / DOWNLOAD, dataset)
    raise UsageError(f"{text} is neither a folder, nor a tar file, nor the name of a torchvision dataset.")


def list_source(
    source: Source, options: LabelOptions = NO_LABEL_OPTIONS, object_options: ObjectOptions = NO_OBJECT_OPTIONS
) -> Listing:
    """List every image with its split and its label, label map or objects.

    options: for sources with label maps. object_options: for those with boxes. Raises DataError if there are no images
    or the layout or an annotation is not understood, UsageError if the options do not fit the source.
    """
    if source.kind == "torchvision":
        listing = torchvision_source.list_images(source)
    else:
        files = _list_files(source)
        listing = find_objects(files, object_options)
        if listing and (label_map := label_map_in(files)):
            raise DataError(f"{source.path} has boxes and label maps, as {label_map}: take one of the two away.")
        listing = listing or find_label_maps(files, options) or sort_into_splits(files)
    if listing.coding is None and options != NO_LABEL_OPTIONS:
        raise UsageError(
            f"{source.path} has no label maps in a known layout: "
            f"leave {options.flags()} out, or arrange it as images/<split>/ and annotations/<split>/."
        )
    if listing.category_ids is None and (given := object_options.given()):
        raise UsageError(
            f"{source.path} has no boxes in a known layout: leave --{next(iter(given)).replace('_', '-')} out, or "
            "arrange it as COCO, with annotations/instances_<split>.json."
        )
    return listing


def add_val(listing: Listing, source: Source, labels: Path | None) -> Listing:
    """`listing` with the images of `source` as its val split.

    labels: a label file for images in arbitrary folders; None if they lie in class folders. Raises UsageError if
    `listing` has a val split already, DataError if the classes differ or a label is missing.
    """
    if "val" in listing.splits:
        raise UsageError("the source has a val split of its own: leave --val out.")
    if listing.coding or listing.category_ids:
        beside = "label maps" if listing.coding else "annotations"
        raise UsageError(f"--val is for classification: put these images and their {beside} into the val folders.")
    if source.kind == "torchvision":
        raise UsageError("--val takes a folder or a tar; a torchvision dataset has its own val split.")
    if labels is None:
        other = sort_into_splits(_list_files(source))
        if len(other.splits) > 1:
            raise UsageError(f"{source.path} has the splits {', '.join(other.splits)}: give one of them to --val.")
        check_same_classes(source.path, listing.classes, other.classes)
        [val], ignored = other.splits.values(), other.ignored
    else:
        files = _list_files(source)
        ignored = files.others
        val = Items(source, files.names, read_labels(labels, files.names, listing.classes), files.offsets, files.sizes)
    return Listing(listing.classes, {**listing.splits, "val": val}, listing.ignored + ignored)


def read_image(source: Source, name: str, offset: int, size: int) -> bytes:
    """The encoded bytes of one image: those in the source or, from torchvision, a JPEG.

    Raises DataError if it cannot be read, StorageError if a later attempt may succeed, BadImage if it is too large.
    """
    if source.kind == "torchvision":
        return torchvision_source.read_image(source, name)
    check_size(size)
    return _read(source, name, offset, size)


def _read(source: Source, name: str, offset: int, size: int) -> bytes:
    """The bytes of a file of a folder or tar."""
    try:
        data = retried(lambda: _read_once(source, name, offset, size), f"{name} in {source.path}")
    except OSError as error:
        raise DataError(f"cannot read {name} from {source.path}: {error.strerror}.") from error
    if len(data) != size:
        raise DataError(
            f"{name} in {source.path} has {len(data)} bytes, not {size} as when it was listed: the source has changed."
        )
    return data


def _read_once(source: Source, name: str, offset: int, size: int) -> bytes:
    """The `size` bytes at `offset` of the tar, or a file of a folder, with one byte more if the file has grown."""
    if source.kind == "folder":
        with open(source.path / name, "rb") as file:
            return file.read(size + 1)
    try:
        return read_fully(_descriptor(source.path), size, offset)
    except OSError:
        _descriptor.cache_clear()  # the next attempt opens the file again
        raise


def find_images(names: Sequence[str]) -> list[Path]:
    """The files in `names`, and for each folder all images below it, sorted by name, without hidden files.

    Raises UsageError for missing files and folders without images, DataError for folders that cannot be read.
    """
    found = []
    for name in names:
        path = Path(name)
        if path.is_dir():
            inside = sorted(file for file, _, _ in walk(path) if file.lower().endswith(IMAGE_SUFFIXES))
            if not inside:
                raise UsageError(f"{path} contains no images; their names end in {', '.join(IMAGE_SUFFIXES)}")
            found += [path / file for file in inside]
        elif path.exists():
            found.append(path)
        else:
            raise UsageError(f"there is no image or folder {path}")
    return found


# --- folders and tars ------------------------------------------------------------------------------------------------


def _list_files(source: Source) -> Files:
    """The files of the source. If a tar has a name twice, the last member counts."""
    return retried(lambda: _list_once(source), str(source.path))


def _list_once(source: Source) -> Files:
    names, offsets, sizes, folders = [], array.array("q"), array.array("q"), set()
    others, texts, unread, beside = 0, {}, [], ""
    with Progress("files", "listing") as progress:
        for name, offset, size in walk(source.path) if source.kind == "folder" else _tar_members(source.path):
            if name.lower().endswith(IMAGE_SUFFIXES):
                check_name(source.path, name)
                names.append(name)
                offsets.append(offset)
                sizes.append(size)
                progress.show(len(names))
                continue
            folders.add(name[: name.rfind("/") + 1])
            if not name.endswith("/"):
                others += 1
                if _may_be_read(name, size):
                    texts[name] = (offset, size)
                elif BOX_FILE.fullmatch(name):
                    unread.append(name)
                if name.lower().endswith(ANNOTATION_SUFFIXES):
                    beside = min(beside or name, name)
    if not names:
        raise DataError(f"{source.path} contains no images ({counted(others, 'other file')}).")
    order = np.argsort(np.array(names, dtype=object), kind="stable")
    names = [names[i] for i in order]
    keep = np.array([*(name != following for name, following in itertools.pairwise(names)), True])
    if not keep.all():
        names, order = list(itertools.compress(names, keep)), order[keep]
    return Files(
        source,
        names,
        np.array(offsets)[order],
        np.array(sizes)[order],
        others,
        _Texts(source, texts),
        tuple(sorted(unread)),
        tuple(sorted(folders)),
        beside,
    )


def _may_be_read(name: str, size: int) -> bool:
    """Whether a file that is no image may name classes or hold annotations."""
    if name.endswith(".json"):
        return bool(COCO_FILE.fullmatch(name))
    return (name.rpartition("/")[2] in CLASS_FILES or bool(VOC_FILE.fullmatch(name))) and size <= LONGEST_TEXT


class _Texts(Mapping):
    """The contents of files by name. places: name → (offset, size)."""

    def __init__(self, source: Source, places: dict[str, tuple[int, int]]):
        self._source, self._places = source, places

    def __getitem__(self, name: str) -> bytes:
        return _read(self._source, name, *self._places[name])

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._places))

    def __len__(self) -> int:
        return len(self._places)


def _tar_members(path: Path) -> Iterator[tuple[str, int, int]]:
    """(name, offset, size) of every regular file in a plain tar, and of every folder, whose name ends in a slash.

    A tar inside it (ImageNet's n01440764.tar) is a folder.
    """
    with open(path, "rb") as file:
        for name, offset, size in tar_files(path, file, 0, path.stat().st_size):
            if name.lower().endswith(".tar"):
                yield f"{name[:-4]}/", offset, 0
                for inner, *place in tar_files(f"{name} in {path}", file, offset, offset + size):
                    yield f"{name[:-4]}/{inner}", *place
            else:
                yield name, offset, size


@functools.lru_cache(maxsize=1)
def _descriptor(path: Path) -> int:
    return os.open(path, os.O_RDONLY)
