"""Ranges of tensors from the shards of a checkpoint: any cut, many buffers, short and failing reads."""

import errno
import json
import os
import random

import pytest
import torch
from safetensors.torch import save_file

from data_pipeline import faults
from train.checkpoint.pieces import AT_ONCE, Wanted, fill

COUNT = AT_ONCE + 300
WHOLE = {f"model/{number}": torch.randn(number % 37 + 3) for number in range(COUNT)}


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Two: the first elements of every tensor, and the others."""
    folder, parts = tmp_path_factory.mktemp("shards"), ({}, {})
    starts = {key: len(value) // 3 for key, value in WHOLE.items()}
    for key, value in WHOLE.items():
        parts[0][key], parts[1][key] = value[: starts[key]].clone(), value[starts[key] :].clone()
    for number, of in enumerate(({}, starts)):
        save_file(parts[number], folder / f"{number}", {"starts": json.dumps(of)})
    return [folder / "0", folder / "1"]


def wanted(kind: str) -> list[tuple[Wanted, torch.Tensor]]:
    """Requests in a random order, and what they ask for. Between them are tensors that are not wanted."""
    found = []
    for number in range(COUNT) if kind == "all" else range(0, COUNT, 3):
        whole = WHOLE[f"model/{number}"]
        first, end = (0, len(whole)) if kind == "all" else (1, len(whole) - 1)
        target = torch.full((end - first,), torch.nan, dtype=torch.float64 if kind == "double" else torch.float32)
        found.append((Wanted(f"model/{number}", first, target), whole[first:end]))
    random.Random(0).shuffle(found)
    return found


@pytest.mark.parametrize("limit", [None, 1001])
@pytest.mark.parametrize("kind", ["all", "parts", "double"])
def test_ranges_are_found_wherever_they_lie(shards, monkeypatch, kind, limit):
    """Also if the system reads less than it was asked for, as it does beyond 2 GiB, and fails in between."""
    preadv, calls = os.preadv, []

    def short(file: int, buffers: list[memoryview], offset: int) -> int:
        calls.append(offset)
        if len(calls) in (7, 100):
            raise OSError(errno.EIO, "Input/output error")
        some, left = [], limit
        for buffer in buffers:
            some.append(buffer[:left])
            left -= len(some[-1])
            if not left:
                break
        return preadv(file, some, offset)

    if limit:
        monkeypatch.setattr(faults, "PAUSES", (0.0,) * 9)
        monkeypatch.setattr(os, "preadv", short)
    pairs, files = wanted(kind), os.listdir("/proc/self/fd")
    fill(shards, [want for want, _ in pairs])
    assert all(torch.equal(want.target.float(), expected) for want, expected in pairs)
    assert os.listdir("/proc/self/fd") == files
    assert not limit or len(calls) > 50
