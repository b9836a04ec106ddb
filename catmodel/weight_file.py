"""A reader for untrusted files written by `torch.save`. It runs no code of the file and writes nothing.

Such a file is a zip archive of a pickle, `data.pkl`, and the bytes of each storage, `data/0`, `data/1`, ...,
uncompressed. torch.load does more than read it: it also runs TorchScript programs and unpacks tar archives. With
`weights_only=True` it does not, but it then refuses the released files, whose `config` is a pickled yacs CfgNode. This
module therefore reads the archive itself, and replaces everything but tensors and plain containers by inert stubs.
"""

import io
import math
import pickle
import pickletools
import re
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# All records that torch.save of PyTorch 1.6 to 2.15 writes, inside a folder of any name.
RECORDS = re.compile(
    r"[^/]+/"
    r"(data\.pkl|data/[0-9]+|version|byteorder|\.format_version|\.storage_alignment|\.data/serialization_id)"
)
DEEPEST = 100  # levels of nested tuples
LARGEST_PICKLE = 2**25  # bytes; released files stay below a megabyte, because the weights are stored outside the pickle


def read(path: Path) -> dict[str, Any]:
    """The dict in a .pth file, with tensors on the CPU. Objects of other classes become empty dicts.

    Raises ValueError if the file is damaged or was not written by torch.save.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            records = _records(archive, path.stat().st_size)
            found = _Unpickler(archive, records).load()
    except _Refused as error:
        raise ValueError(f"{path}: {error}") from None
    except zipfile.BadZipFile as error:
        raise ValueError(
            f"{path}: neither a .safetensors file nor a zip file as torch.save writes it since PyTorch 1.6 ({error}): "
            "it is damaged, or must be saved again with a newer PyTorch"
        ) from error
    except Exception as error:  # a damaged pickle can raise anything
        raise ValueError(f"{path}: not a readable checkpoint ({type(error).__name__}: {error})") from error
    if not isinstance(found, dict) or isinstance(found, _Stub):
        raise ValueError(f"{path}: holds a {type(found).__name__}, not a dict of weights")
    return found


class _Refused(Exception):
    """The file was not written by torch.save. The message continues a sentence that begins with the file's name."""


def _records(archive: zipfile.ZipFile, size: int) -> dict[str, zipfile.ZipInfo]:
    """The archive's records by name, without the folder. size: of the file, in bytes."""
    found: dict[str, zipfile.ZipInfo] = {}
    folders = set()
    for record in archive.infolist():
        # orig_filename, because Python cuts filename at a null byte.
        known = RECORDS.fullmatch(record.orig_filename)
        if not known:
            script = {"constants.pkl", "code"} & {*record.filename.split("/")}
            kind = "a TorchScript program" if script else "not a file of torch.save's"
            raise _Refused(
                f"holds {record.orig_filename!r}, so it is {kind}: save the model's state_dict() with torch.save"
            )
        if known[1] in found:
            raise _Refused(f"holds {known[1]} twice")
        stored = record.compress_type == zipfile.ZIP_STORED and record.compress_size == record.file_size
        if not stored or record.flag_bits & 1:
            raise _Refused(f"its {known[1]} is compressed or encrypted, which torch.save's files are not")
        found[known[1]] = record
        folders.add(record.orig_filename[: known.start(1)])
    if "data.pkl" not in found or len(folders) > 1:
        raise _Refused("not a file of torch.save's, which has one folder with a data.pkl")
    if sum(record.file_size for record in found.values()) > size:
        raise _Refused("declares more bytes than it has")
    return found


def _tensor(
    storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_hooks_and_flags: Any
) -> Tensor:
    if not isinstance(storage, Tensor):
        raise _Refused("holds a tensor of an unknown dtype")
    if math.prod(size) > len(storage):
        raise _Refused(f"holds a tensor of shape {list(size)} with {len(storage)} stored elements")
    return storage.as_strided(size, stride, offset)


def _parameter(data: Any, *_hooks_and_flags: Any) -> Any:
    return data if isinstance(data, Tensor) else _Stub()


_STORAGES = {
    **dict(Double=torch.double, Float=torch.float, Half=torch.half, BFloat16=torch.bfloat16),
    **dict(Long=torch.long, Int=torch.int, Short=torch.short, Char=torch.int8, Byte=torch.uint8, Bool=torch.bool),
    **dict(ComplexFloat=torch.cfloat, ComplexDouble=torch.cdouble),
}

# All globals that a pickle may name: those that describe tensors, and inert containers. Names are matched as pairs, so
# that attributes of allowed objects are out of reach. Functions are our own, so that a file cannot modify torch.
_ALLOWED: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("builtins", "set"): set,
    ("torch", "Size"): torch.Size,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    **{("torch", f"{name}Storage"): dtype for name, dtype in _STORAGES.items()},
    **{
        ("torch", str(dtype).removeprefix("torch.")): dtype
        for dtype in vars(torch).values()
        if isinstance(dtype, torch.dtype)
    },
}


class _Stub(dict):
    """Stands for an object of a class that is not loaded. Accepts every operation of a pickle and ignores it."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__()

    __hash__ = object.__hash__  # it may be a key of a dict

    def __setstate__(self, state: Any) -> None:
        pass

    def append(self, item: Any) -> None:
        pass

    def extend(self, items: Any) -> None:
        pass

    def add(self, item: Any) -> None:
        pass


def _check_depth(content: bytes) -> None:
    """Refuse deeply nested tuples, whose hash Python computes with an unlimited recursion, which crashes."""
    stack, marks, memo = [], [], {}
    for operation, argument, _ in pickletools.genops(content):
        name, taken = operation.name, []
        if name == "MARK":
            marks.append(len(stack))
        elif name == "MEMOIZE" or name.endswith("PUT"):
            memo[len(memo) if name == "MEMOIZE" else argument] = stack[-1]
        elif name.endswith("GET"):
            stack.append(memo[argument])
        elif name == "POP" and marks and marks[-1] == len(stack):
            marks.pop()
        elif name == "DUP":
            stack.append(stack[-1])
        else:
            below = operation.stack_before
            if pickletools.markobject in below:
                begin, below = marks.pop(), below[: below.index(pickletools.markobject)]
                taken += stack[begin:]
                del stack[begin:]
            for _ in below:
                taken.append(stack.pop())
            depth = 1 + max(taken, default=0) if "TUPLE" in name else 0
            if depth > DEEPEST:
                raise _Refused(f"its data.pkl has tuples in tuples, over {DEEPEST} deep, which describe no weights")
            stack += [depth] * len(operation.stack_after)


class _Unpickler(pickle.Unpickler):
    def __init__(self, archive: zipfile.ZipFile, records: dict[str, zipfile.ZipInfo]):
        if records["data.pkl"].file_size > LARGEST_PICKLE:
            raise _Refused(f"its data.pkl has {records['data.pkl'].file_size} bytes, too many to describe weights")
        content = archive.read(records["data.pkl"])
        _check_depth(content)
        super().__init__(io.BytesIO(content), encoding="utf-8")
        self.archive, self.records, self.storages = archive, records, {}
        order = archive.read(records["byteorder"]).decode() if "byteorder" in records else "little"
        if order != sys.byteorder:
            raise _Refused(
                f"its numbers are in {order}-endian order, this machine's are not: save it again on a machine like "
                "this one"
            )

    def find_class(self, module: str, name: str) -> Any:
        # A new class for each name: errors show the name, and no pickle can modify a class that another one uses.
        return _ALLOWED.get((module, name)) or type(f"{module}.{name}", (_Stub,), {})

    def persistent_load(self, pid: Any) -> Any:
        """A storage, as a tensor of one dimension."""
        _, dtype, key, _, elements = pid
        if not isinstance(dtype, torch.dtype):
            return _Stub()  # not a weight
        if (key, dtype) not in self.storages:
            record = self.records[f"data/{key}"]
            if record.file_size != elements * dtype.itemsize:
                raise _Refused(
                    f"its data/{key} has {record.file_size} bytes, which are not {elements} elements of {dtype}"
                )
            content = bytearray(self.archive.read(record))
            storage = torch.frombuffer(content, dtype=dtype) if content else torch.empty(0, dtype=dtype)
            self.storages[key, dtype] = storage
        return self.storages[key, dtype]
