"""Torchvision's classification datasets as a source of images. No other file of data_pipeline imports torchvision."""

import functools

import numpy as np

from data_pipeline.preparation.image_source import SPLITS, Items, Listing, Source
from data_pipeline.split import DataError, UsageError
from data_pipeline.validate import encode_jpeg, to_pixels


def class_named(name: str) -> str | None:
    """The torchvision dataset with this name, ignoring case; None if there is none."""
    import torchvision.datasets

    matches = [known for known in torchvision.datasets.__all__ if known.lower() == name.lower()]
    return matches[0] if matches else None


def list_images(source: Source) -> Listing:
    """Every image with its label; see listing.list_source."""
    splits, classes = {}, None
    for split in SPLITS:
        dataset = _open(source, split)
        labels = next(
            (getattr(dataset, name) for name in ("targets", "labels", "_labels") if hasattr(dataset, name)), None
        )
        if labels is None:
            labels = [dataset[i][1] for i in range(len(dataset))]
        labels = np.asarray(labels)
        if labels.shape != (len(dataset),) or not np.issubdtype(labels.dtype, np.integer):
            raise UsageError(
                f"torchvision's {source.dataset} is not for classification: its targets are not one integer per image."
            )
        if classes is None:
            classes = [str(name) for name in getattr(dataset, "classes", range(int(labels.max()) + 1))]
        # Class names are sorted here as for all sources; torchvision's order of labels can differ.
        rank = np.argsort(np.argsort(classes))
        # The encoded size is known only after encoding. The mean of a few images suffices to plan shards of similar
        # size.
        some = range(0, len(dataset), max(1, len(dataset) // 16))
        size = sum(len(encode_jpeg(to_pixels(dataset[i][0]))) for i in some) // len(some)
        names = [f"{split}/{i}" for i in range(len(dataset))]
        offsets, sizes = np.zeros(len(dataset), np.int64), np.full(len(dataset), size, np.int64)
        splits[split] = Items(source, names, rank[labels], offsets, sizes)
    return Listing(tuple(sorted(classes)), splits)


def read_image(source: Source, name: str) -> bytes:
    """The image `name` ("train/17") as a JPEG."""
    split, _, position = name.partition("/")
    return encode_jpeg(to_pixels(_open(source, split)[int(position)][0]))


@functools.lru_cache(maxsize=2)  # a worker reads from one split, then from the other
def _open(source: Source, split: str):
    """Open `split` of the dataset, downloading it into its root if it is missing and torchvision can.

    Raises DataError.
    """
    import inspect

    import torchvision.datasets

    cls = getattr(torchvision.datasets, source.dataset)
    known = inspect.signature(cls.__init__).parameters
    arguments = {"root": str(source.path)}
    if "train" in known:
        choices = [{"train": split == "train"}]
    elif "split" in known:
        choices = [{"split": "train"}] if split == "train" else [{"split": "val"}, {"split": "test"}]
    else:
        raise UsageError(
            f"torchvision's {source.dataset} has neither train= nor split=: "
            "save its images as train/<class>/<image> instead."
        )
    first_error = None
    for choice in choices:
        try:
            return cls(**arguments, **choice)
        except Exception as error:  # each torchvision class has its own exception for missing files
            first_error = first_error or error
    if "download" in known:
        for choice in choices:
            try:
                return cls(**arguments, **choice, download=True)
            except Exception as error:
                first_error = error
    reason = " ".join(str(first_error).split())
    raise DataError(
        f"torchvision cannot open or download {source.dataset} at {source.path} ({type(first_error).__name__}: "
        f"{reason})."
    )
