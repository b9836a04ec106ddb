"""Image files outside of a dataset: given to the decoder as `launch/prepare.py` would have stored them."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import TypeVar

from data_pipeline.jpeg import read_header
from data_pipeline.validate import MAX_PIXELS, BadImage, check_image
from train.config import ConfigError

Item, Read = TypeVar("Item"), TypeVar("Read")


def ahead(read: Callable[[Item], Read], items: Iterable[Item], count: int) -> Iterator[Read]:
    """`read(item)` of each item, in order; threads, one for each core, read `count` items ahead of the one in use."""
    with ThreadPoolExecutor(len(os.sched_getaffinity(0)), thread_name_prefix="decode") as threads:
        items = iter(items)
        pending = deque(threads.submit(read, item) for item in islice(items, count))
        while pending:
            found = pending.popleft().result()
            pending.extend(threads.submit(read, item) for item in islice(items, 1))
            yield found


def check_names(paths: Sequence[Path], ending: str) -> None:
    """Raise ConfigError if two images would have the same file `<name><ending>` in the folder of predictions."""
    known: dict[str, Path] = {}
    for path in paths:
        if path.stem in known:
            raise ConfigError(
                f"{known[path.stem]} and {path} would both become {path.stem}{ending}: predict them into two folders"
            )
        known[path.stem] = path


def read_image(path: Path, decode: Callable[[bytes, tuple[int, int]], str | None]) -> str | None:
    """Read one image, and have it decoded by `decode` (bytes of a JPEG, its (width, height)) → a reason, or None.

    Returns why it cannot be decoded, or None. A JPEG goes straight to the decoder, which notices damage only inside the
    window that is cut out. An image that it refuses, and every other format, is converted first as `launch/prepare.py`
    would.
    """
    try:
        encoded = path.read_bytes()
        size = _size_of_jpeg(encoded)
        if size is None or decode(encoded, size):
            stored = check_image(encoded)
            return decode(stored.data, (stored.width, stored.height))
    except OSError as error:
        return error.strerror or str(error)
    except BadImage as error:
        return str(error)
    return None


def _size_of_jpeg(encoded: bytes) -> tuple[int, int] | None:
    """(width, height) of a JPEG that the decoder takes as it is, as far as its header tells."""
    if not encoded.startswith(b"\xff\xd8"):
        return None
    try:
        width, height, colorspace = read_header(encoded)
    except ValueError:
        return None
    return (width, height) if colorspace not in ("CMYK", "YCCK") and width * height <= MAX_PIXELS else None
