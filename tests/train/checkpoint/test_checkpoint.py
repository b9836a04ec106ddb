"""Which checkpoints are kept, which settings a resume refuses, and what a run's folder contains."""

import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open

from tests.runs import metrics, run, start
from train.checkpoint.format import read_weights
from train.checkpoint.info import CheckpointError, first_sound, list_checkpoints, read_info, validate
from train.checkpoint.saver import snapshot
from train.engine.deepspeed_engine import Fragment


@dataclass(frozen=True)
class Opened:
    """Writes into `file` which shards rank `rank` reads."""

    rank: int
    file: Path

    def __call__(self, rank: int) -> None:
        def hook(event: str, arguments: tuple) -> None:
            if (
                event == "open"
                and str(arguments[0]).endswith(".safetensors")
                and "/checkpoints/step_" in str(arguments[0])
            ):
                with self.file.open("a") as file:
                    print(Path(arguments[0]).name, file=file)

        if rank == self.rank:
            sys.addaudithook(hook)


@pytest.fixture(scope="module")
def finished(tiny_config, tmp_path_factory):
    """A finished run on two ranks: 4 epochs, a checkpoint every 4 steps, of which two and the best are kept."""
    output = tmp_path_factory.mktemp("finished") / "run"
    run(
        tiny_config,
        output,
        "train.epochs=4",
        "checkpoint.every_steps=4",
        "checkpoint.keep=2",
        "monitor.images=8",
        world=2,
    )
    return output


@pytest.mark.parametrize("rank", [0, 1])
def test_a_snapshot_is_a_copy(rank):
    """Training changes the state while it is written. Rank 0 alone writes what is whole on every rank."""
    weights, moment, average, buffer, mean = (torch.full((2,), float(number)) for number in range(5))
    engine = SimpleNamespace(
        rank=rank,
        fragments=lambda: [Fragment("layer", 6, weights, {"exp_avg": moment})],
        whole=lambda: {"running": buffer},
    )
    tensors, starts = snapshot(engine, SimpleNamespace(averages=[average, mean], buffers={"running": mean}))
    for tensor in (weights, moment, average, buffer, mean):
        tensor.fill_(9)
    fragments = {"model/layer": [0, 0], "exp_avg/layer": [1, 1], "ema/layer": [2, 2]}
    whole = {"buffer/running": [3, 3], "ema_buffer/running": [4, 4]} if rank == 0 else {}
    assert {key: tensor.tolist() for key, tensor in tensors.items()} == fragments | whole
    assert starts == dict.fromkeys(fragments, 6)


@pytest.mark.slow
def test_newest_two_and_the_best_are_kept(finished):
    evaluated = {line["step"]: line["top1"] for line in metrics(finished, "eval") if line["weights"] == "ema"}
    best = max(evaluated, key=lambda step: (evaluated[step], -step))  # of equals the earliest
    kept = {int(path.name[5:]) for path in list_checkpoints(finished / "checkpoints")}
    assert kept == {28, 32, best}
    assert not list((finished / "checkpoints").glob(".*"))


@pytest.mark.slow
def test_run_folder_holds_what_the_contract_says(finished):
    names = {path.name for path in finished.iterdir()}
    assert {
        "config.yaml",
        "metrics.jsonl",
        "train.log",
        "tensorboard",
        "checkpoints",
        "samples",
        "model.safetensors",
    } <= names
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    train = [line for line in lines if line["kind"] == "train"]
    assert [line["step"] for line in train] == list(range(1, 33))
    expected = {
        "kind",
        "step",
        "epoch",
        "loss",
        "lr",
        "grad_norm",
        "images_per_second",
        "data_wait",
        "step_ms",
        "mfu",
        "time",
    }
    assert all(set(line) == expected and 0 <= line["data_wait"] <= 1 for line in train)
    assert [line["event"] for line in lines if line["kind"] == "event" and line["event"] != "checkpoint"] == [
        "start",
        "finished",
    ]


@pytest.mark.slow
def test_final_weights_are_the_last_checkpoints_ema_under_the_models_own_names(finished, tiny_config):
    from train.config import load_config
    from train.tasks.base import build_task

    newest = list_checkpoints(finished / "checkpoints")[0]
    with safe_open(finished / "model.safetensors", framework="pt") as file:
        state = {key: file.get_tensor(key) for key in file.keys()}
        assert json.loads(file.metadata()["catmodel"])["step"] == 32
    build_task(load_config(tiny_config), [""] * 10).build_model().load_state_dict(state)
    assert all((state[key] == value).all() for key, value in read_weights(newest, "ema").items())
    assert any((state[key] != value).any() for key, value in read_weights(newest, "model").items())


@pytest.mark.slow
def test_tensorboard_has_curves_images_config_and_hyperparameters(finished):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(finished / "tensorboard"), size_guidance={"scalars": 0, "images": 0})
    events.Reload()
    tags = events.Tags()
    wanted = {f"learning/{name}" for name in ("loss", "lr", "grad_norm")} | {
        "speed/images_per_second",
        "speed/data_wait",
    }
    wanted |= {f"evaluation/{weights}_{name}" for weights in ("model", "ema") for name in ("top1", "top5", "loss")}
    assert wanted <= set(tags["scalars"])
    assert len(events.Scalars("learning/loss")) == 32
    assert "config/text_summary" in tags["tensors"]
    assert "_hparams_/session_start_info" in events.PluginTagToContent("hparams")
    assert [image.step for image in events.Images("inputs")] == [0, 8, 16, 24]


@pytest.mark.slow
def test_running_a_finished_run_again_trains_nothing(finished, tiny_config, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    before = (copy / "model.safetensors").read_bytes()
    run(tiny_config, copy, "train.epochs=4", "checkpoint.every_steps=4", "checkpoint.keep=2", world=2)
    assert (copy / "model.safetensors").read_bytes() == before
    assert len(metrics(copy, "train")) == 32


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["train.epochs=4", "train.seed=1"], "trained with other settings: train.seed (0 → 1)"),
        (["train.epochs=4", "model.embed_dim=32"], "model.embed_dim (16 → 32)"),
        (
            ["train.epochs=4", "model.embed_dim=32", "--resume-with-changes"],
            "is of another model: ape is (1, 64, 16) there and (1, 64, 32) here",
        ),
        (["train.epochs=4", "--resume", "never"], "already has checkpoints"),
        (["train.epochs=4", "--resume", "/nowhere"], "/nowhere is not a checkpoint"),
    ],
)
def test_what_may_not_be_resumed_is_refused(finished, tiny_config, arguments, sentence):
    job = start(tiny_config, finished, *arguments, world=1)
    assert job.wait() == [78]
    last = job.text().strip().splitlines()[-1]
    assert last.startswith("error: ") and sentence in last
    assert "Traceback" not in job.text()


@pytest.mark.slow
def test_resume_with_changes_goes_on_and_says_so(finished, tiny_config, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    job = run(tiny_config, copy, "train.epochs=5", "optimizer.lr=0.0005", "--resume-with-changes")
    assert "changed since the checkpoint: optimizer.lr (0.001 → 0.0005)" in job.text()
    assert max(line["step"] for line in metrics(copy, "train")) == 40


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["truncate", "missing", "manifest", "bit"])
def test_damage_is_found_and_named(finished, tmp_path, damage):
    copy = tmp_path / "checkpoints"
    shutil.copytree(finished / "checkpoints", copy)
    newest, older = list_checkpoints(copy)[:2]
    shard = newest / "shard_00001.safetensors"
    content = shard.read_bytes()
    if damage == "truncate":
        shard.write_bytes(content[:-1])
    elif damage == "missing":
        shard.unlink()
    elif damage == "bit":
        shard.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    else:
        (newest / "manifest.json").write_text((newest / "manifest.json").read_text()[:-40])
    with pytest.raises(CheckpointError, match=r"manifest\.json|shard_00001"):
        validate(newest)
    path, _, skipped = first_sound(list_checkpoints(copy))
    assert path == older and len(skipped) == 1


@pytest.mark.slow
def test_the_manifest_names_step_layout_and_data(finished):
    info = read_info(list_checkpoints(finished / "checkpoints")[0])
    assert (info.step, info.optimizer_step, info.world_size) == (32, 32, 2)
    assert sorted(info.shards) == ["shard_00000.safetensors", "shard_00001.safetensors"]
    assert info.config["train"]["epochs"] == 4 and len(info.classes) == 10


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3])
def test_a_rank_that_goes_on_with_its_own_share_opens_no_other_shard(tiny_config, tmp_path, stage):
    """The last of four ranks reads its own shard and the first, which has the buffers."""
    settings = [f"zero.stage={stage}", "train.max_steps=1", "train.evaluate_every=0"]
    run(tiny_config, tmp_path, *settings, world=4)
    run(tiny_config, tmp_path, *settings, world=4, before=Opened(3, tmp_path / "opened"))
    opened = (tmp_path / "opened").read_text().split()
    assert "shard_00003.safetensors" in opened and set(opened) <= {"shard_00003.safetensors", "shard_00000.safetensors"}


@pytest.mark.slow
def test_plain_safetensors_reads_a_checkpoint(finished):
    """A checkpoint can be read without this program: flat pieces, with their starts in each file's metadata."""
    newest = list_checkpoints(finished / "checkpoints")[0]
    weights = read_weights(newest, "model")
    found = dict.fromkeys(weights, 0)
    for path in sorted(newest.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            starts = json.loads(file.metadata()["starts"])
            for name, tensor in weights.items():
                if f"model/{name}" in file.keys():
                    piece, begin = file.get_tensor(f"model/{name}"), starts[f"model/{name}"]
                    assert (piece == tensor.flatten()[begin : begin + piece.numel()]).all()
                    found[name] += piece.numel()
    parameters = read_info(newest).shapes
    assert {name: found[name] for name in parameters} == {name: weights[name].numel() for name in parameters}
