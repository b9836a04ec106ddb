"""Malicious weight files are refused with one sentence, and none of their code runs.

Their code would create the file `trace`. If torch.load itself runs the code, the test demonstrates that first.
"""

import contextlib
import io
import json
import os
import pickle
import struct
import tarfile
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import catmodel
from tests.catmodel.small import small
from tests.runs import start
from train.checkpoint.init_from import read_source
from train.config import ConfigError


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    return small("cat_nano", stages=1).state_dict()


def refused(path: Path, sentence: str) -> None:
    """Check that load_published and model.init_from refuse the file in one line that names it."""
    with pytest.raises(ValueError, match=sentence) as error:
        catmodel.load_published(small("cat_nano", stages=1), path)
    assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)
    with pytest.raises(ConfigError, match="model.init_from: "):
        read_source(path)


def torch_load(path: Path) -> None:
    """Read the file with torch.load, which runs its code."""
    with contextlib.suppress(Exception), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.load(path, weights_only=False)


def records(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def write(path: Path, *contents: tuple[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w", compression) as archive:
        warnings.simplefilter("ignore")  # zipfile warns about duplicate names
        for name, content in contents:
            archive.writestr(name, content)
    return path


def released(folder: Path, weights: dict[str, torch.Tensor]) -> Path:
    torch.save({"model": weights}, folder / "released.pth")
    return folder / "released.pth"


# --- other archives --------------------------------------------------------------------------------------------------


def script(trace: Path) -> torch.jit.ScriptModule:
    """TorchScript whose __setstate__, which runs when the module is loaded, creates a file."""

    class Harm(nn.Module):
        def __init__(self, path: str):
            super().__init__()
            self.path, self.file = path, torch.zeros(1)

        @torch.jit.export
        def __getstate__(self) -> tuple[str, bool]:
            return self.path, self.training

        @torch.jit.export
        def __setstate__(self, state: tuple[str, bool]) -> None:
            self.path, self.training = state
            self.file = torch.from_file(self.path, True, 16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated
        return torch.jit.script(Harm(str(trace)))


def test_torchscript(tmp_path):
    file, trace = tmp_path / "program.pth", tmp_path / "trace"
    script(trace).save(str(file))
    trace.unlink(missing_ok=True)
    torch_load(file)
    assert trace.exists()
    trace.unlink()
    refused(file, "a TorchScript program")
    assert not trace.exists()


def test_torchscript_beside_weights(tmp_path, weights):
    """All weights are present, and also the records that make torch.load run the program."""
    file, trace = tmp_path / "both.pth", tmp_path / "trace"
    script(trace).save(str(tmp_path / "program.pt"))
    trace.unlink(missing_ok=True)
    program = records(tmp_path / "program.pt")
    names = {name.split("/", 1)[1]: content for name, content in records(released(tmp_path, weights)).items()}
    names |= {name.split("/", 1)[1]: content for name, content in program.items()}
    write(file, *((f"program/{name}", content) for name, content in names.items()))
    torch_load(file)
    assert trace.exists()
    trace.unlink()
    refused(file, "a TorchScript program")
    assert not trace.exists()


def test_torch_package(tmp_path):
    file = tmp_path / "package.pth"
    with torch.package.PackageExporter(file) as exporter:
        exporter.save_source_string("harm", f"open({str(tmp_path / 'trace')!r}, 'w')")
        exporter.save_pickle("model", "model.pkl", {"model": {}})
    refused(file, "not a file of torch.save's")
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize("appended", [False, True])
def test_the_tar_format_of_old_releases(tmp_path, weights, appended):
    """torch.load unpacks such a tar archive. With a zip archive appended, the file is both."""
    file, trace = tmp_path / "old.pth", tmp_path / "trace"
    with tarfile.open(file, "w", format=tarfile.PAX_FORMAT) as archive:
        for name in ("storages", "tensors", "pickle"):
            content = pickle.dumps(Runs(trace))
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    if appended:
        with open(file, "ab") as end:
            end.write(released(tmp_path, weights).read_bytes())
    torch_load(file)
    assert trace.exists()
    trace.unlink()
    if appended:
        catmodel.load_published(small("cat_nano", stages=1), file)  # reads the zip archive only
    else:
        refused(file, "neither a .safetensors file nor a zip file")
    assert not trace.exists()


def test_a_bare_pickle(tmp_path):
    file, trace = tmp_path / "bare.pth", tmp_path / "trace"
    torch.save({"model": {"x": Runs(trace)}}, file, _use_new_zipfile_serialization=False)
    torch_load(file)
    assert trace.exists()
    trace.unlink()
    refused(file, "neither a .safetensors file nor a zip file")
    assert not trace.exists()


# --- pickles ---------------------------------------------------------------------------------------------------------


class Runs:
    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self):
        return os.system, (f"touch {self.trace}",)


# The ways in which a pickle can call a function.
PICKLES: dict[str, Callable[[bytes], bytes]] = {
    "reduce": lambda path: b"cposix\nsystem\n(S'touch " + path + b"'\ntR.",
    "instance": lambda path: b"(S'touch " + path + b"'\niposix\nsystem\n.",
    "object": lambda path: b"(cposix\nsystem\nS'touch " + path + b"'\no.",
    "stack global": lambda path: b"\x80\x04\x8c\x05posix\x8c\x06system\x93(S'touch " + path + b"'\ntR.",
    "new object": lambda path: b"\x80\x02csubprocess\nPopen\n(S'touch " + path + b"'\nI1\nNNNNNI01\nI01\nt\x81.",
    "attribute": lambda path: b"cbuiltins\ngetattr\n(cos\nenviron\nS'clear'\ntR(S'touch " + path + b"'\nt.",
    "state": lambda path: b"ctorch._utils\n_rebuild_tensor_v2\n}S'__globals__'\n}sb(S'touch " + path + b"'\nt.",
    "extension": lambda path: b"\x80\x02\x82\x01(S'touch " + path + b"'\ntR.",
    "dotted": lambda path: (
        b"\x80\x04\x8c\x05torch\x8c\x10serialization.os\x93\x8c\x06system\x94(S'touch " + path + b"'\nt."
    ),
    "torch.load": lambda path: b"ctorch\nload\n(S'" + path + b"'\ntR.",
}


@pytest.mark.parametrize("name", PICKLES)
def test_a_pickle_cannot_call_functions(tmp_path, name):
    trace = tmp_path / "trace"
    pickled = PICKLES[name](str(trace).encode())
    file = write(tmp_path / "evil.pth", ("archive/data.pkl", pickled), ("archive/version", b"3"))
    refused(file, "holds a|not a readable checkpoint")
    assert not trace.exists()


DEEP = {
    "alone": b")" + b"\x85" * 10**6,
    "marked": b"(" * 10**5 + b")" + b"t" * 10**5,
    "memoized": b")" + b"\x85q\0h\0\x86" * 10**5,
    "twice in each": b")" + b"2\x86" * 10**6,
    "with lists between": b")" + b"\x85]Na0" * 10**5,
    "with removed marks": b")" + b"N(00\x85" * 10**5,
}


@pytest.mark.parametrize("name", DEEP)
def test_deeply_nested_tuples_are_refused(tmp_path, name):
    """As the key of a dict: Python crashes when it computes the hash."""
    pickled = b"\x80\x02}" + DEEP[name] + b"K\x01s."
    refused(write(tmp_path / "deep.pth", ("archive/data.pkl", pickled)), "tuples in tuples")


def test_nested_tuples_inside_parameters_are_dropped(tmp_path):
    """Only tensors are rebuilt as parameters. If tuples were too, the depth would be counted from 0 at each of them."""
    level = b"\x85q\x000ctorch._utils\n_rebuild_parameter\nh\x00\x85R"
    pickled = b"\x80\x02}S'x'\n)" + level * 10**4 + b"s."
    found = read_source(write(tmp_path / "deep.pth", ("archive/data.pkl", pickled)))[0]
    assert found == {"x": {}}


def test_a_file_with_two_pickles_is_refused(tmp_path, weights):
    trace = tmp_path / "trace"
    names = records(released(tmp_path, weights))
    evil = ("released/data.pkl", PICKLES["reduce"](str(trace).encode()))
    for contents in ([evil, *names.items()], [*names.items(), evil]):
        refused(write(tmp_path / "twice.pth", *contents), "holds data.pkl twice")
    other = ("other/data.pkl", names["released/data.pkl"])
    refused(write(tmp_path / "folders.pth", *names.items(), other), "holds data.pkl twice")
    other = ("other/version", b"3")
    without_version = (item for item in names.items() if "version" not in item[0])
    refused(write(tmp_path / "folders.pth", other, *without_version), "which has one folder")
    assert not trace.exists()


# --- archives --------------------------------------------------------------------------------------------------------


OTHER = ("code/__torch__.py", "constants.pkl", ".data/extern_modules", "data/../../x", "data/1/2", "data/\u0661")


@pytest.mark.parametrize("name", [*OTHER, "data.pkl~.txt", "x"])
def test_unknown_records_are_refused(tmp_path, weights, name):
    file = write(tmp_path / "more.pth", *records(released(tmp_path, weights)).items(), (f"released/{name}", b""))
    file.write_bytes(file.read_bytes().replace(b"~", b"\0"))  # many programs end a name at a zero byte
    refused(file, "so it is (not a file of torch.save's|a TorchScript)")


def test_different_names_in_the_two_headers_are_refused(tmp_path, weights):
    """A zip archive has the name of each record twice: before its content and in the directory at its end."""
    file = released(tmp_path, weights)
    content = file.read_bytes()
    assert content.count(b"released/data.pkl") == 2
    file.write_bytes(content.replace(b"released/data.pkl", b"released/evil.pkl", 1))
    refused(file, "differ")


def test_decompression_bombs_are_refused(tmp_path, weights):
    """Compressed zeros, and many records with the same place in the file."""
    names = records(released(tmp_path, weights))
    zeros = ("released/data/999", bytes(2**26))
    refused(write(tmp_path / "bomb.pth", *names.items(), zeros, compression=zipfile.ZIP_DEFLATED), "is compressed")
    overlap = write(tmp_path / "overlap.pth", *names.items(), ("released/data/999", bytes(2**16)))
    stored = bytearray(overlap.read_bytes())
    with zipfile.ZipFile(tmp_path / "overlap.pth") as archive:
        last = archive.infolist()[-1]
        place, entries = archive.start_dir, len(archive.infolist())
    entry = stored[stored.rindex(b"PK\x01\x02") :]
    entry = bytes(entry[: 46 + len(last.filename)])
    copies = b"".join(entry.replace(b"data/999", f"data/{number}".encode()) for number in range(800, 999))
    directory = bytes(stored[place : stored.rindex(b"PK\x05\x06")]) + copies
    end = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, entries + 199, entries + 199, len(directory), place, 0)
    (tmp_path / "overlap.pth").write_bytes(bytes(stored[:place]) + directory + end)
    refused(tmp_path / "overlap.pth", "more bytes than it has")


@pytest.mark.parametrize("cut", [1, 100, 5000])
def test_a_damaged_file_is_refused(tmp_path, weights, cut):
    file = released(tmp_path, weights)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "flipped.pth").write_bytes(content)
    refused(tmp_path / "flipped.pth", "Bad CRC-32|not a readable|neither")
    file.write_bytes(file.read_bytes()[:-cut])
    refused(file, "it is damaged")


# --- tensors ---------------------------------------------------------------------------------------------------------


def tensor(
    storage: str = "FloatStorage", key: str = "0", stored: int = 4, offset: int = 0, size=(4,), stride=(1,)
) -> bytes:
    """A pickled {"model": {"x": this tensor}}, for a file whose data/0 has 16 bytes."""

    def numbers(values) -> bytes:
        return b"(" + b"".join(b"L%dL\n" % value for value in values) + b"t"

    persistent = b"(S'storage'\nctorch\n" + storage.encode() + b"\nS'" + key.encode() + b"'\nS'cpu'\nL%dL\ntQ" % stored
    arguments = persistent + b"L%dL\n" % offset + numbers(size) + numbers(stride)
    call = b"ctorch._utils\n_rebuild_tensor_v2\n(" + arguments + b"I00\nNtR"
    return b"\x80\x02}S'model'\n}S'x'\n" + call + b"ss."


@pytest.mark.parametrize(
    "lie",
    [
        dict(stored=5),
        dict(stored=2**62),
        dict(stored=-4),
        dict(storage="DoubleStorage"),
        dict(storage="QInt8Storage"),
        dict(storage="load"),
        dict(key="1"),
        dict(key="../version"),
        dict(offset=1),
        dict(offset=-1),
        dict(offset=2**62),
        dict(size=(5,)),
        dict(size=(-4,)),
        dict(size=(2**40,), stride=(0,)),
        dict(size=(2**33, 2**33), stride=(0, 0)),
        dict(size=(2, 2), stride=(1,)),
        dict(size=(2,), stride=(4,)),
        dict(size=(2,), stride=(-1,)),
        dict(size=(2,), stride=(2**62,)),
    ],
    ids=str,
)
def test_a_tensor_that_does_not_fit_its_bytes_is_refused(tmp_path, lie):
    def file(**what) -> Path:
        contents = [("a/data.pkl", tensor(**what)), ("a/data/0", bytes(16)), ("a/byteorder", b"little")]
        return write(tmp_path / "lie.pth", *contents)

    assert read_source(file())[0]["x"].tolist() == [0.0] * 4
    refused(file(**lie), "not a readable checkpoint|holds a tensor|its data/0 has 16 bytes")


# --- safetensors, and a run ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [
        b"\xff" * 8 + b"{}",
        struct.pack("<Q", 2**40) + b"{}",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 100_000) + b"[" * 100_000,
    ],
    ids=["length", "longer than the file", "no dict", "deep"],
)
def test_invalid_safetensors_headers_are_refused(tmp_path, content):
    file = tmp_path / "evil.safetensors"
    file.write_bytes(content)
    refused(file, "not a readable safetensors file")


@pytest.mark.parametrize(
    "about", ["", "{", "[]", "3", '{"classes": 3}', '{"classes": [3]}', '{"model": []}', '{"task": 3}', "[" * 10**5]
)
def test_invalid_metadata_is_refused(tmp_path, weights, about):
    file = tmp_path / "evil.safetensors"
    save_file(weights, file, {"catmodel": about})
    refused(file, "metadata 'catmodel' is not in the form that this project writes")


@pytest.mark.parametrize("size", [0, -32, [32], [32, 0], ["a", "b"], {"a": 1}, 10**30])
def test_impossible_image_sizes(tmp_path, weights, size):
    """A huge size does not fit the weights; values that are not sizes are ignored."""
    file, model = tmp_path / "odd.safetensors", small("cat_nano", stages=1)
    save_file(weights, file, {"catmodel": json.dumps({"model": {"img_size": size}})})
    with (
        pytest.raises(ValueError, match="odd.safetensors does not fit") if size == 10**30 else contextlib.nullcontext()
    ):
        report = catmodel.load_published(model, file)
        assert not report.left_out and not report.fresh and not report.resized
        assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


@pytest.mark.slow
def test_a_run_ends_with_one_sentence(tiny_config, tmp_path, weights):
    trace = tmp_path / "trace"
    script(trace).save(str(tmp_path / "program.pth"))
    trace.unlink(missing_ok=True)
    save_file(weights, tmp_path / "about.safetensors", {"catmodel": "[]"})
    torch.save({"model": {"head.weight": Runs(trace), "x": torch.ones(())}}, tmp_path / "stub.pth")
    for name in ("program.pth", "about.safetensors", "stub.pth"):
        job = start(tiny_config, tmp_path / name.replace(".", "_"), f"model.init_from={tmp_path / name}")
        assert job.wait() == [78], job.text()
        lines = [line for line in job.text().splitlines() if line.startswith("error: ")]
        assert len(lines) == 1 and f"model.init_from: {tmp_path / name}" in lines[0], job.text()
        assert "Traceback" not in job.text() and not trace.exists()
