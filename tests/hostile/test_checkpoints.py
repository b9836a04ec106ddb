"""Untrusted checkpoints: reading one may end a command with one sentence and must have no other effect."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.runs import ROOT
from train.checkpoint.info import CheckpointError, CheckpointInfo, write_manifest
from train.checkpoint.trained_model import read_trained
from train.config import ConfigError, load_config
from train.tasks.base import build_task


class Forged:
    """A sound checkpoint of one shard, with methods that tamper with it."""

    def __init__(self, folder: Path, config: Path, classes: list[str] | None = None):
        self.path = folder / "checkpoint"
        self.path.mkdir(parents=True)
        self.config = load_config(config, ["ema.decay=0"])
        classes = classes or [f"class_{number}" for number in range(10)]
        state = build_task(self.config, classes).build_model().state_dict()
        self.tensors = {f"model/{name}": tensor.flatten() for name, tensor in state.items()}
        self.starts = dict.fromkeys(self.tensors, 0)
        shapes = {name: list(tensor.shape) for name, tensor in state.items()}
        dumped = self.config.model_dump(mode="json")
        write_manifest(self.path, CheckpointInfo(8, None, "", classes, dumped, 8, {}, shapes, {}, 1))
        self.write()

    def write(self, name: str = "shard_00000.safetensors", **metadata: str) -> None:
        save_file(self.tensors, self.path / name, {"starts": json.dumps(self.starts), **metadata})
        self.seal(name)

    def seal(self, *names: str) -> None:
        """Correct the hashes of changed shards in the manifest."""
        hashes = {name: hashlib.sha256((self.path / name).read_bytes()).hexdigest() for name in names}
        self.change(shards=self.manifest()["shards"] | hashes)

    def manifest(self) -> dict:
        return json.loads((self.path / "manifest.json").read_text())

    def change(self, **fields: object) -> None:
        (self.path / "manifest.json").write_text(json.dumps(self.manifest() | fields))

    def header(self, change) -> None:
        """Let `change` alter the shard's header, a dict."""
        file = self.path / "shard_00000.safetensors"
        content = file.read_bytes()
        length = int.from_bytes(content[:8], "little")
        document = json.loads(content[8 : 8 + length])
        change(document)
        header = json.dumps(document).encode()
        file.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])
        self.seal(file.name)


@pytest.fixture
def forged(tiny_config, tmp_path):
    return Forged(tmp_path, tiny_config)


def refused(forged: Forged) -> str:
    with pytest.raises(ConfigError) as caught:
        read_trained(forged.path).model()
    text = str(caught.value)
    assert text.isprintable() and str(forged.path) in text and caught.value.exit_code == 78
    return text


def test_the_unchanged_checkpoint_is_sound(forged):
    read_trained(forged.path).model()


DEEP = 100_000 * "[" + 100_000 * "]"


@pytest.mark.parametrize(
    "fields",
    [
        {"shards": {"../../../etc/passwd": 64 * "0"}},
        {"shards": {"/etc/passwd": 64 * "0"}},
        {"shards": {"shard_00000.safetensors/../x": 64 * "0"}},
        {"shards": {"shard_00000.safetensors\n": 64 * "0"}},
        {"shards": {"shard_00000.safetensors": "0"}},
        {"shards": []},
        {"step": float("nan")},
        {"step": -1},
        {"step": 10**400},
        {"step": True},
        {"step": "8"},
        {"score": float("nan")},
        {"score": 1e300},
        {"better": "other"},
        {"version": 1, "top1": float("nan")},
        {"optimizer_step": -1},
        {"world_size": None},
        {"classes": ["a", 7]},
        {"classes": "class"},
        {"config": []},
        {"loss_scale": {"cur_scale": "1"}},
        {"shapes": {"head.bias": [-10]}},
        {"shapes": {"head.bias": [1.5]}},
        {"shapes": {"head.bias": 10}},
        {"version": 3},
        {"version": "\x1b[2J"},
    ],
    ids=lambda fields: f"{next(iter(fields))}-{str(next(iter(fields.values())))[:20]!a}",
)
def test_a_manifest_with_invalid_fields_is_refused(forged, fields):
    forged.change(**fields)
    refused(forged)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "7", DEEP, '{"version": 1}', '{"version": 1, "config": ' + DEEP + "}", "\xff\x00"]
)
def test_a_file_that_is_not_a_manifest_is_refused(forged, text):
    (forged.path / "manifest.json").write_text(text)
    refused(forged)


def test_a_huge_manifest_is_not_read(forged):
    os.truncate(forged.path / "manifest.json", 2**40)  # a sparse file, which takes no space
    assert "no manifest is that large" in refused(forged)


def test_pipes_and_devices_are_not_opened(forged):
    (forged.path / "manifest.json").rename(forged.path / "kept")
    os.mkfifo(forged.path / "manifest.json")
    assert "is no file" in refused(forged)
    (forged.path / "kept").replace(forged.path / "manifest.json")
    for make in (lambda path: os.mkfifo(path), lambda path: path.symlink_to("/dev/zero")):
        (forged.path / "shard_00000.safetensors").unlink()
        make(forged.path / "shard_00000.safetensors")
        assert "shard_00000.safetensors is missing" in refused(forged)


def test_shapes_that_exceed_any_memory_are_refused(forged):
    forged.change(shapes=forged.manifest()["shapes"] | {"head.bias": [10**12]})
    assert "model/head.bias has 10 of the 1000000000000 elements of its shape" in refused(forged)
    forged.header(lambda header: header["model/head.bias"].update(shape=[10**12]))
    assert "does not lie inside the file" in refused(forged)


@pytest.mark.parametrize(
    "change",
    [
        lambda header: header["model/head.bias"].update(data_offsets=[-40, 0]),
        lambda header: header["model/head.bias"].update(data_offsets=[10**15, 10**15 + 40]),
        lambda header: header["model/head.bias"].update(data_offsets=[0]),
        lambda header: header["model/head.bias"].update(data_offsets=None),
        lambda header: header["model/head.bias"].update(dtype="F128"),
        lambda header: header["model/head.bias"].update(dtype=["F32"]),
        lambda header: header["model/head.bias"].update(shape=[-10]),
        lambda header: header["model/head.bias"].update(shape=["10"]),
        lambda header: header["model/head.bias"].update(shape=[True] * 5),
        lambda header: header.update({"model/head.bias": 7}),
        lambda header: header.update(__metadata__=[]),
        lambda header: header.update(__metadata__={"starts": "{"}),
        lambda header: header.update(__metadata__={"starts": DEEP}),
        lambda header: header["__metadata__"].update(starts='{"model/head.bias": -1}'),
        lambda header: header["__metadata__"].update(starts='{"model/head.bias": NaN}'),
        lambda header: header["__metadata__"].update(starts="[]"),
        lambda header: header.pop("model/head.bias"),
    ],
)
def test_a_shard_with_an_invalid_header_is_refused(forged, change):
    forged.header(change)
    refused(forged)


@pytest.mark.parametrize(
    "content",
    [b"", b"\x00" * 8, b"\xff" * 8 + b"{}", (1 << 40).to_bytes(8, "little") + b"{}", b"\x02" + bytes(7) + b"{"],
)
def test_a_file_that_is_not_a_shard_is_refused(forged, content):
    (forged.path / "shard_00000.safetensors").write_bytes(content)
    forged.seal("shard_00000.safetensors")
    refused(forged)


def test_pieces_that_overlap_or_leave_gaps_are_refused(forged):
    """Pieces of a tensor of ten elements, given by their lengths and the start of the second one."""
    bias = forged.tensors.pop("model/head.bias")
    forged.write()
    for first, second, start in ((6, 6, 4), (7, 3, 2), (3, 3, 7), (5, 5, 6)):
        save_file({"model/head.bias": bias[:first]}, forged.path / "shard_00001.safetensors", {"starts": "{}"})
        starts = json.dumps({"model/head.bias": start})
        save_file(
            {"model/head.bias": bias[:second].clone()}, forged.path / "shard_00002.safetensors", {"starts": starts}
        )
        forged.seal("shard_00001.safetensors", "shard_00002.safetensors")
        assert "head.bias" in refused(forged)


@pytest.mark.parametrize(
    ("section", "settings"),
    [
        ("model", {"name": "\x1b]0;owned\x07"}),
        ("model", {"embed_dim": 2**40}),
        ("model", {"depths": [10**9, 1]}),
        ("model", {"name": "cat_base"}),
        ("model", {"run": "os.system"}),
        ("data", {"image_size": 32}),
        ("augment", {"std": [0, 0, 0]}),
        ("augment", {"rand_augment": "\x1b[31m"}),
        ("train", 7),
    ],
)
def test_an_invalid_config_is_refused(forged, section, settings):
    config = forged.manifest()["config"]
    config[section] = config[section] | settings if isinstance(settings, dict) else settings
    forged.change(config=config)
    refused(forged)


def command(name: str, folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    whole = [sys.executable, str(ROOT / f"launch/{name}.py"), *arguments]
    return subprocess.run(whole, cwd=folder, capture_output=True, text=True, timeout=600)


@pytest.mark.slow
def test_paths_and_urls_in_a_config_are_not_accessed(tiny_config, tiny_dataset, tmp_path):
    """Initial weights are not read, a URL is not requested, and a folder for copies is not created."""
    forged = Forged(tmp_path, tiny_config)
    config = forged.manifest()["config"]
    config["model"]["init_from"] = "/dev/zero"
    config["data"] |= {"path": f"file://{tiny_dataset}", "cache_dir": str(tmp_path / "cache")}
    forged.change(config=config)
    work = tmp_path / "work"
    work.mkdir()
    done = command("evaluate", work, str(forged.path))
    assert done.returncode == 78
    assert done.stderr == "error: the run's dataset is behind a URL; name it: --data URL --cache-dir FOLDER\n"
    done = command("evaluate", work, str(forged.path), "--data", str(tiny_dataset))
    assert done.returncode == 0 and "(101 images)" in done.stdout, done.stderr
    assert not (tmp_path / "cache").exists() and not list(work.iterdir())


@pytest.mark.slow
def test_control_characters_in_class_names_are_escaped(tiny_config, tiny_images, tmp_path):
    classes = [f"\x1b[2J\u202e{number}\r\n" for number in range(10)]
    forged = Forged(tmp_path, tiny_config, classes)
    image = next((tiny_images / "val").rglob("*.jpg"))
    done = command("predict", tmp_path, str(image), "--run", str(forged.path), "--top", "1")
    assert done.returncode == 0, done.stderr
    assert [line.isprintable() for line in done.stdout.splitlines()] == [True, True]
    assert r"\x1b[2J\u202e" in done.stdout


def test_weights_that_are_not_the_models_are_named(forged):
    """One that the model lacks, and one of a layer that the checkpoint lacks."""
    shapes, config = forged.manifest()["shapes"], forged.manifest()["config"]
    forged.tensors["model/extra"] = torch.zeros(2)
    forged.write()
    forged.change(shapes=shapes | {"extra": [2]})
    assert refused(forged).endswith("its weights are not those of its model.name cat_nano: extra")
    config["model"]["depths"] = [1, 2]
    forged.change(shapes=shapes, config=config)
    assert ": layers.1." in refused(forged)


def test_what_is_not_there_is_said(forged, tmp_path):
    """Averages of a run without any, and a run's folder before its first checkpoint."""
    with pytest.raises(ConfigError, match=r"has no EMA, because its run had ema.decay=0: give --weights model$"):
        read_trained(forged.path, "ema")
    run = tmp_path / "run"
    run.mkdir()
    with pytest.raises(ConfigError, match=r"run is not a checkpoint: manifest.json: No such file"):
        read_trained(run)
    (run / "config.yaml").touch()
    with pytest.raises(ConfigError, match=r"run is a run that has no checkpoint yet$"):
        read_trained(run)


def test_reading_returns_the_written_tensors(forged):
    state = read_trained(forged.path).state
    assert all(torch.equal(tensor.flatten(), forged.tensors[f"model/{name}"]) for name, tensor in state.items())
    model = read_trained(forged.path).model()
    assert not model.training and all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_an_error_of_a_checkpoint_is_one_line():
    assert str(CheckpointError("a\nb\x1b")) == r"a\nb\x1b"
