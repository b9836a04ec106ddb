"""Torchvision's datasets as a source of images: only this file imports torchvision."""

import functools

import numpy as np

from data_pipeline.image_source import SPLITS, Items, Listing, Source
from data_pipeline.manifest import DataError, UsageError
from data_pipeline.validate import encode_jpeg, to_pixels


def class_named(name: str) -> str | None:
    """The torchvision dataset of that name, whatever its case."""
    import torchvision.datasets

    matches = [known for known in torchvision.datasets.__all__ if known.lower() == name.lower()]
    return matches[0] if matches else None


def list_images(source: Source) -> Listing:
    """Every image with its label, as listing.list_source gives it."""
    splits, classes = {}, None
    for split in SPLITS:
        dataset = _open(source, split)
        labels = next((getattr(dataset, name) for name in ("targets", "labels", "_labels") if hasattr(dataset, name)), None)
        if labels is None:
            labels = [dataset[i][1] for i in range(len(dataset))]
        labels = np.asarray(labels)
        if labels.shape != (len(dataset),) or not np.issubdtype(labels.dtype, np.integer):
            raise UsageError(f"torchvision's {source.dataset} is no classification dataset: its targets are not one integer per image.")
        if classes is None:
            classes = [str(name) for name in getattr(dataset, "classes", range(int(labels.max()) + 1))]
        # Class names are sorted here as everywhere; torchvision's own order of labels may be another.
        rank = np.argsort(np.argsort(classes))
        # The encoded size is known only after encoding; the mean of a few images is good enough to plan shards of about a size.
        some = range(0, len(dataset), max(1, len(dataset) // 16))
        size = sum(len(encode_jpeg(to_pixels(dataset[i][0]))) for i in some) // len(some)
        names = [f"{split}/{i}" for i in range(len(dataset))]
        splits[split] = Items(source, names, rank[labels], np.zeros(len(dataset), np.int64), np.full(len(dataset), size, np.int64))
    return Listing(tuple(sorted(classes)), splits)


def read_image(source: Source, name: str) -> bytes:
    """The image `name` ("train/17") as a JPEG."""
    split, _, position = name.partition("/")
    return encode_jpeg(to_pixels(_open(source, split)[int(position)][0]))


@functools.lru_cache(maxsize=2)  # a worker reads from one split, then from the other
def _open(source: Source, split: str):
    """`split` of the dataset, downloaded into its root where it is not there and torchvision can. Raises DataError in one sentence."""
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
        raise UsageError(f"torchvision's {source.dataset} has neither train= nor split=: save its images as train/<class>/<image> instead.")
    first_error = None
    for choice in choices:
        try:
            return cls(**arguments, **choice)
        except Exception as error:  # each torchvision class has its own way to say "not there"
            first_error = first_error or error
    if "download" in known:
        for choice in choices:
            try:
                return cls(**arguments, **choice, download=True)
            except Exception as error:
                first_error = error
    reason = " ".join(str(first_error).split())
    raise DataError(f"torchvision cannot open or download {source.dataset} at {source.path} ({type(first_error).__name__}: {reason}).")
