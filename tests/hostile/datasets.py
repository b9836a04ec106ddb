"""Helpers that read and damage a small prepared dataset."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.backends import open_backend
from data_pipeline.split import Split

SAMPLES = 12
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="becoming another user needs root")


def rewrite(dataset: Path, change) -> None:
    document = json.loads((dataset / "manifest.json").read_text())
    change(document)
    (dataset / "manifest.json").write_text(json.dumps(document))


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def everything(split: Split) -> list[bytes]:
    """The bytes of all samples, none of which may be bad."""
    encoded, failures = open_backend("webdataset", split).stored.read(np.arange(split.samples))
    assert failures == {}
    return encoded


def split_entry(**fields):
    return lambda document: document["splits"]["train"].update(fields)


def flip_a_bit(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)
