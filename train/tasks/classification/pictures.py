"""The images that a run got wrong, as its network saw them, decoded from the dataset if it is still there."""

import base64
from collections.abc import Iterable
from io import BytesIO

import numpy as np

from data_pipeline.faults import StorageError
from data_pipeline.manifest import open_manifest
from data_pipeline.split import DataError, Split, UsageError


def pictures(config: dict, fingerprint: str, ids: Iterable[int]) -> tuple[dict[int, str], str]:
    """Images of the `val` split by sample id, as data URIs; and a sentence on why some or all are missing, or "".

    config: the run's, flat. fingerprint: of the split that was evaluated.
    """
    ids = list(ids)
    path = config["data.path"]
    if "://" in path:
        return {}, f"Pictures are not fetched from {path}: they are shown of datasets in a folder."
    try:
        split = open_manifest(path).split("val")
        if split.fingerprint != fingerprint:
            return {}, f"No pictures: {path} has been prepared anew since, and holds other images."
        pixels, failures = _decode(split, np.array(ids, dtype=np.int64), config)
    except (DataError, StorageError, UsageError, OSError) as error:
        return {}, f"No pictures: {error}"
    found = {
        number: _data_uri(image)
        for row, (number, image) in enumerate(zip(ids, pixels, strict=True))
        if row not in failures
    }
    return found, " ".join(failures.values())


def _decode(split: Split, ids: np.ndarray, config: dict) -> tuple[np.ndarray, dict[int, str]]:
    """The images, uint8 [n, S, S, 3], cropped as in evaluation, and the reason for each row that cannot be decoded.

    The files are read in place; nothing is staged.
    """
    from data_pipeline.backends import open_backend
    from data_pipeline.crop import evaluation_windows

    size, records = config["data.image_size"], split.records[ids]
    windows = evaluation_windows(records["width"], records["height"], config["data.eval_crop"])
    pixels = np.zeros((len(ids), size, size, 3), np.uint8)
    backend = open_backend("webdataset" if split.shards else "ffcv", split)
    return pixels, backend.decode_batch(ids, windows, (size, size), config["data.interpolation"], pixels)


def _data_uri(pixels: np.ndarray) -> str:
    from PIL import Image

    file = BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=92, subsampling=0)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
