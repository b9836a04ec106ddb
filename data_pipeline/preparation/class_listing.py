"""Sources of classification: take split and class of every image from the folders that it lies in."""

import dataclasses
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from data_pipeline.formatting import first_five
from data_pipeline.preparation.image_source import SPLIT_NAMES, SPLITS, Files, Items, Listing
from data_pipeline.preparation.label_map_listing import OTHER_FOLDERS, check_no_label_maps
from data_pipeline.preparation.labels import check_names
from data_pipeline.preparation.object_listing import misnamed
from data_pipeline.preparation.ownership import MARK
from data_pipeline.split import DataError, UsageError

FEW_CLASSES = 8  # up to which their folders are compared; a layout that is not understood gives few
NAMES_OF_SPLITS = {*SPLIT_NAMES, *OTHER_FOLDERS}


def sort_into_splits(files: Files) -> Listing:
    """Take split and class of every image from its path: [one folder/][train|val/]class/…/image."""
    if files.unread:
        raise misnamed(files, files.unread[0])
    root, names, skip = files.source.path, files.names, 0
    tops = _top_folders(names, skip)
    if len(tops) == 1:
        [(top, (shallowest, _))] = tops.items()
        if shallowest > 1 and top.lower() not in SPLIT_NAMES:
            skip = len(top) + 1
            tops = _top_folders(names, skip)
    split_of_folder = _split_folders(files, skip, tops)

    labels, split_of = np.zeros(len(names), np.int32), np.full(len(names), -1, np.int8)
    found = {split: {} for split in SPLITS}  # class name → its number, in the order of appearance
    for i, name in enumerate(names):
        split, rest = "train", name[skip:]
        if split_of_folder:
            folder, _, rest = rest.partition("/")
            split = split_of_folder.get(folder)
            if split is None:
                continue
        class_name, slash, _ = rest.partition("/")
        if not slash:
            raise DataError(
                f"{name} in {root} is not in a class folder; expected train/<class>/<image> or <class>/<image>."
            )
        labels[i] = found[split].setdefault(class_name, len(found[split]))
        split_of[i] = SPLITS.index(split)
    _check_folders_have_images(files, skip, split_of_folder, found)
    if found["train"] and found["val"]:
        check_same_classes(root, found["train"], found["val"])
    classes = tuple(sorted(found["train"] or found["val"]))
    check_names(root, classes)
    if len(classes) == 1:
        unread = f" ({files.beside} is not read)" if files.beside else ""
        raise DataError(
            f"all images of {root} are of one class, the folder {classes[0]!r}: for a classification, put the images "
            f"of each class into a folder of their own; for a detection, the boxes must be in "
            f"annotations/instances_train.json{unread}, and the images in train/."
        )
    if len(classes) <= FEW_CLASSES:
        depth = 1 + bool(split_of_folder)
        check_no_label_maps(root, (names[i][skip:].split("/", depth)[-2:] for i in np.flatnonzero(split_of >= 0)))
    everything = Items(files.source, names, labels, files.offsets, files.sizes)
    splits = {}
    for number, split in enumerate(SPLITS):
        if found[split]:
            chosen = everything.take(np.flatnonzero(split_of == number))
            rank = np.argsort(np.argsort(list(found[split])))
            splits[split] = dataclasses.replace(chosen, labels=rank[chosen.labels].astype(np.int32))
    return Listing(classes, splits, files.others + int(np.sum(split_of < 0)))


def _check_folders_have_images(
    files: Files, skip: int, split_of_folder: dict[str, str], found: dict[str, dict[str, int]]
) -> None:
    """Raise DataError for a class folder without images: without its class, those behind it would get other labels.
    Raise UsageError if it is the folder of the dataset that is being made.
    """
    around = files.names[0][:skip]
    for folder in files.folders:
        split, rest = "train", folder[skip:]
        if split_of_folder:
            top, _, rest = rest.partition("/")
            split = split_of_folder.get(top)
        class_name, slash, _ = rest.partition("/")
        if folder.startswith(around) and split and slash and class_name not in found[split]:
            if mark := next(Path(files.source.path, folder).rglob(MARK), None):
                raise UsageError(
                    f"DEST {mark.parents[1]} lies in SOURCE {files.source.path}, where its folder would be a class: "
                    "give a DEST outside of SOURCE."
                )
            raise DataError(
                f"{files.source.path}/{folder.rstrip('/')} has no images, but lies where a class does: "
                "add some, or move it away."
            )


def check_same_classes(what: str | Path, train: Iterable[str], val: Iterable[str]) -> None:
    only = {"train": set(train) - set(val), "val": set(val) - set(train)}
    check_names(what, only["train"] | only["val"])
    if any(only.values()):
        odd = " and ".join(f"only {split} has {first_five(sorted(names))}" for split, names in only.items() if names)
        raise DataError(f"{what}: train and val must have the same classes, but {odd}.")


def _top_folders(names: list[str], skip: int) -> dict[str, tuple[int, int]]:
    """The first folder of each name after `skip` characters ("" if none), with the least and the greatest depth of its
    names.
    """
    tops = {}
    for name in names:
        top, slash, _ = name[skip:].partition("/")
        depth = name.count("/", skip)
        top = top if slash else ""
        least, greatest = tops.get(top, (depth, depth))
        tops[top] = min(depth, least), max(depth, greatest)
    return tops


def _split_folders(files: Files, skip: int, tops: dict[str, tuple[int, int]]) -> dict[str, str]:
    """The split of each top folder that is a split's; {} if the top folders are classes.

    A class may also be named "train": beside other names, a folder is that of a split only if all its images lie in
    subfolders. Raises DataError where one image or name would turn splits into classes.
    """
    root = f"{files.source.path}/{files.names[0][:skip]}".rstrip("/")
    folders = {top: SPLIT_NAMES[top.lower()] for top in sorted(tops) if top.lower() in SPLIT_NAMES}
    by_split = {split: folder for folder, split in folders.items()}
    only_words, has_both = {top.lower() for top in tops} <= NAMES_OF_SPLITS, len(by_split) == len(SPLITS)
    if only_words and all(greatest == 1 for _, greatest in tops.values()):
        raise DataError(
            f"the images of {root} lie in {first_five(sorted(tops))}, without class folders: put them into "
            "train/<class>/ and val/<class>/ or, for detection, add annotations/instances_train.json and "
            "annotations/instances_val.json."
        )
    if has_both and tops[by_split["train"]][0] > 1 and tops[by_split["val"]][1] == 1:
        train, val = (f"{root}/{by_split[split]}" for split in SPLITS)
        raise DataError(
            f"the images of {val} do not lie in class folders: "
            f"give {train} as the source, with --val {val} and --val-labels FILE."
        )
    if strays := [folder for folder in folders if tops[folder][0] == 1]:
        if only_words or (has_both and any(tops[folder][1] > 1 for folder in folders)):
            start = f"{strays[0]}/"
            stray = next(name for name in files.names if name.startswith(start, skip) and name.count("/", skip) == 1)
            raise DataError(f"{files.source.path}/{stray} lies in no class folder, as others do: move it away.")
        return {}
    if len(by_split) < len(folders):
        raise DataError(f"{root} has several folders of one split, {first_five(sorted(folders))}: rename all but one.")
    if len(tops) > 1 and folders and not has_both:
        advice = ""
        if others := sorted(tops.keys() - folders.keys() - {""}):
            train, val = (by_split.get(split, others[0]) for split in SPLITS)
            advice = (
                f"; if {train} is for training and {val} for validation, give {root}/{train} as the source, with "
                f"--val {root}/{val}"
            )
        raise DataError(
            f"{root} has the folders {first_five(sorted(tops))}; expected train and val, or class folders only{advice}."
        )
    return folders
