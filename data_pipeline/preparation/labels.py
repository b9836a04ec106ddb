"""Class names, and label files for a flat validation folder in the formats that exist for ImageNet."""

import unicodedata
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from data_pipeline.split import DataError

KAGGLE_HEADER = "ImageId,PredictionString"
FORMS = (
    "a class name per line, in the order of the files' names; `file class` per line; or Kaggle's LOC_val_solution.csv"
)


LONGEST_NAME = 500  # characters


def fault_of_name(name: str) -> str | None:
    """Why `name` is not allowed as a class name, or None. Class names are shown in logs, reports and terminals."""
    if not name:
        return "is empty"
    if len(name) > LONGEST_NAME:
        return f"has {len(name)} characters, more than {LONGEST_NAME}"
    if any(unicodedata.category(character) in ("Cc", "Cs") and character != "\t" for character in name):
        return "has control characters, or is not UTF-8"
    return None


def check_names(where: str | Path, names: Iterable[str]) -> None:
    """Raise DataError if a class name is not allowed, or two are different and look the same."""
    found: dict[str, str] = {}
    for name in names:
        if fault := fault_of_name(name):
            raise DataError(f"{where}: the class name {name[:LONGEST_NAME]!r} {fault}: rename the class.")
        if found.setdefault(unicodedata.normalize("NFC", name), name) != name:
            raise DataError(
                f"{where}: the class name {name!r} is there twice, in Unicode's two forms of the same letters (NFC, "
                "and NFD as macOS writes it): give it one form everywhere."
            )


def class_names(where: str | Path, lines: list[str]) -> tuple[str, ...]:
    """The names in the lines of a file, in label order. Raises DataError."""
    if "" in lines:
        line = lines.index("") + 1
        raise DataError(f"{where}, line {line} is empty: every line must name a class, in the order of the labels.")
    check_names(where, lines)
    return tuple(lines)


def read_lines(path: Path) -> list[str]:
    """The stripped lines of a text file. Raises DataError if it cannot be read."""
    try:
        return lines_of(path.read_text("utf-8-sig"))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}: {error}.") from error


def lines_of(text: str) -> list[str]:
    """The stripped lines of `text`, without empty ones at the end.

    Lines end at newlines only. str.splitlines would also split at U+0085, U+2028 and others, which a name may contain.
    """
    lines = [line.strip() for line in text.split("\n")]
    while lines and not lines[-1]:
        lines.pop()
    return lines


def read_labels(path: Path, files: list[str], classes: tuple[str, ...]) -> np.ndarray:
    """The labels of `files` (sorted names with folders), int32 [n], from the label file `path` in one of FORMS.

    A class is given by its name or, next to a file's name, by its number in the sorted class names, from 0. Raises
    DataError if the file has another form, or has no label or two labels for an image.
    """
    lines = [line for line in read_lines(path) if line]
    numbers = {name: number for number, name in enumerate(classes)}
    if not lines:
        raise DataError(f"the label file {path} is empty.")
    if lines[0] == KAGGLE_HEADER:
        pairs = [line.partition(",")[::2] for line in lines[1:]]
        return _by_name(path, files, [(name, boxes.split(" ")[0]) for name, boxes in pairs], numbers)
    if lines[0] in numbers:
        return _in_order(path, files, lines, numbers)
    if lines[0].isdecimal():
        raise DataError(
            f"{path} has numbers without names, like the ground truth in ImageNet's devkit: "
            f"they are not the numbers of the sorted classes. Give a file with {FORMS}."
        )
    separator = next((separator for separator in (",", "\t", " ") if separator in lines[0]), None)
    if separator is None:
        check_names(path, [*classes, lines[0]])
        raise DataError(f"{path}, line 1: there is no class {lines[0]!r} in train. A label file has {FORMS}.")
    pairs = [tuple(part.strip() for part in line.partition(separator)[::2]) for line in lines]
    return _by_name(path, files, pairs, {str(number): number for number in numbers.values()} | numbers)


def _in_order(path: Path, files: list[str], lines: list[str], numbers: dict[str, int]) -> np.ndarray:
    if len(lines) != len(files):
        raise DataError(
            f"{path} has {len(lines)} labels for {len(files)} images: give one per image, in the order of their names."
        )
    for row, name in enumerate(lines, start=1):
        if name not in numbers:
            check_names(path, [*numbers, name])
            raise DataError(f"{path}, line {row}: there is no class {name!r} in train.")
    return np.array([numbers[name] for name in lines], np.int32)


def _by_name(path: Path, files: list[str], pairs: list[tuple[str, str]], numbers: dict[str, int]) -> np.ndarray:
    """Match images by file name without folder, and without suffix if the label file gives none."""
    labels = {}
    for name, class_name in pairs:
        if class_name not in numbers:
            check_names(path, [*numbers, class_name])
            raise DataError(f"{path}: {name} has the class {class_name!r}, which train does not have.")
        if labels.setdefault(name, numbers[class_name]) != numbers[class_name]:
            raise DataError(f"{path} has two labels for {name}.")
    result, used = np.zeros(len(files), np.int32), set()
    for i, file in enumerate(files):
        name = file.rpartition("/")[2]
        name = name if name in labels else name.rpartition(".")[0]
        if name not in labels:
            raise DataError(f"{path} has no label for {file}.")
        if name in used:
            raise DataError(
                f"{file}: there are two images of this name, and {path} does not distinguish them: rename one."
            )
        used.add(name)
        result[i] = labels[name]
    if len(used) < len(labels):
        missing = next(name for name in labels if name not in used)
        raise DataError(
            f"{path} has labels for {len(labels) - len(used)} images that are not there; the first is {missing}."
        )
    return result
