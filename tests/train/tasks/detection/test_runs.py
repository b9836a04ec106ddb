"""Runs of detection: killed, on other numbers of ranks, evaluated."""

import json

import pytest
import torch

import catmodel
from tests.oracle import assert_same_state, state
from tests.runs import losses, metrics, run, start
from tests.train.tasks.dense_runs import check_a_killed_run, check_other_numbers_of_ranks, details, evaluate
from train.checkpoint.info import checkpoint_path
from train.checkpoint.trained_model import read_trained

pytestmark = pytest.mark.slow
METRICS = ("ap", "ap50", "ap75", "aps", "apm", "apl", "ar100", "count")


def test_it_is_killed_and_resumes_bitwise(box_config, whole, tmp_path):
    check_a_killed_run(box_config, whole, tmp_path)


def test_one_two_and_four_ranks_take_the_same_steps(box_config, whole, tmp_path):
    """With images of several scales."""
    check_other_numbers_of_ranks(box_config, whole, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("detector", ["fcos", "atss"])
def test_the_other_detectors_take_the_same_steps(box_config, tmp_path, detector):
    """Killed on two ranks, and on four."""
    settings = [f"task.detector={detector}"]
    run(box_config, tmp_path / "whole", *settings, world=2)
    start(box_config, tmp_path / "killed", *settings, world=2).kill_at(9)
    run(box_config, tmp_path / "killed", *settings, world=2)
    run(box_config, tmp_path / "4", *settings, "zero.stage=2", world=4)
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    assert_same_state(state(tmp_path / "killed", 20), state(tmp_path / "whole", 20))
    assert details(tmp_path / "killed", "ema") == details(tmp_path / "whole", "ema")
    assert losses(tmp_path / "4") == pytest.approx(losses(tmp_path / "whole"), rel=1e-5, abs=0)


def test_its_evaluation_is_exact_on_any_number_of_ranks(whole, tmp_path):
    """101 images: as during training, on two ranks; each counts once, and all detections are the same."""
    during = {line["weights"]: line for line in metrics(whole, "eval") if line["step"] == 20}
    results = {}
    for world in (1, 4):
        file = tmp_path / f"{world}.json"
        found = evaluate(tmp_path / f"job{world}", whole, "--results", str(file), world=world)
        assert [found[key] for key in METRICS] == [during["ema"][key] for key in METRICS]
        results[world] = file.read_bytes()
    assert results[1] == results[4]
    assert len({row["image_id"] for row in json.loads(results[1])}) == 101
    assert during["ema"]["count"] == 101 and during["ema"]["ap50"] > 0


def test_weights_that_are_not_trained_are_kept(box_config, tmp_path):
    """In the network's precision: they are no optimizer's masters, and a resumed run does not read init_from again."""
    from safetensors.torch import save_file

    torch.manual_seed(5)
    small = dict(embed_dim=16, depths=(1, 1), num_heads=(2, 4))
    first = catmodel.create_model("cat_tiny", img_size=224, num_classes=10, **small).state_dict()
    source = tmp_path / "first.safetensors"
    save_file(first, source)
    settings = ["task.frozen_stages=1", "train.precision=bf16", "train.max_steps=5", "train.evaluate_every=0"]
    settings += ["train.evaluate_every_steps=null", f"model.init_from={source}", "checkpoint.keep=9"]
    output = tmp_path / "run"
    run(box_config, output, *settings, world=2)
    again = ["--resume", str(checkpoint_path(output / "checkpoints", 4))]
    source.write_bytes(b"")
    run(box_config, tmp_path / "resumed", *settings, *again, world=2)
    assert losses(tmp_path / "resumed")[5] == losses(output)[5]
    weights = read_trained(tmp_path / "resumed").model().state_dict()
    for name in ("layers.0.pre_ipsa_blocks.0.attn.qkv.weight", "patch_embed.proj.weight"):
        assert torch.equal(weights[f"backbone.{name}"], first[name].bfloat16().float())
    trained = "layers.1.pre_ipsa_blocks.0.attn.qkv.weight"
    assert not torch.equal(weights[f"backbone.{trained}"], first[trained])


def test_a_micro_batch_that_is_found_can_be_of_one_orientation(box_config, tmp_path):
    """There are nine portrait images."""
    job = run(
        box_config,
        tmp_path,
        *("train.micro_batch=auto", "train.global_batch=16", "train.max_steps=1", "train.evaluate_every=0"),
    )
    assert "train.micro_batch: 8 is the largest that fits (16 does not: the dataset's 9 portrait images" in job.text()
