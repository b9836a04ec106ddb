"""Runs of segmentation: killed, on other numbers of ranks, evaluated, and used."""

import json
import random
import time

import numpy as np
import pytest
from PIL import Image

from tests.oracle import assert_same_state, ids_by_step, state
from tests.runs import losses, metrics, run, start_command
from tests.train.tasks.dense_runs import check_a_killed_run, check_other_numbers_of_ranks, details, evaluate
from tests.train.test_random_kills import run_with_kills
from train.tasks.drawing import from_base64

pytestmark = pytest.mark.slow
METRICS = ("miou", "macc", "aacc", "count")


@pytest.fixture(scope="module")
def whole(segment_config, tmp_path_factory):
    output = tmp_path_factory.mktemp("runs") / "whole"
    run(segment_config, output, "checkpoint.keep=9", world=2)
    return output


def test_it_is_killed_and_resumes_bitwise(segment_config, whole, tmp_path):
    check_a_killed_run(segment_config, whole, tmp_path)


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_it_is_killed_at_random_moments(segment_config, whole, tmp_path):
    """Ten times, over as many runs as it takes."""
    dice, done, number = random.Random(20261127), 0, 0
    began = time.monotonic()
    run(segment_config, tmp_path / "undisturbed", world=2)
    duration = time.monotonic() - began
    while done < 10:
        output, number = tmp_path / f"run{number}", number + 1
        done += len(run_with_kills(segment_config, output, (), dice, duration, 10 - done))
        assert losses(output) == losses(whole)
        assert_same_state(state(output, 20), state(whole, 20))
        assert ids_by_step(output, world=2) == ids_by_step(whole, world=2)
        assert details(output, "ema") == details(whole, "ema")


def test_one_two_and_four_ranks_take_the_same_steps(segment_config, whole, tmp_path):
    check_other_numbers_of_ranks(segment_config, whole, tmp_path)


def test_its_evaluation_is_exact_on_any_number_of_ranks(whole, tmp_path):
    """As during training, for both kinds of weights; and each image counts once."""
    during = {line["weights"]: line for line in metrics(whole, "eval") if line["step"] == 20}
    for world, weights in ((1, "ema"), (2, "model"), (4, "ema")):
        found = evaluate(tmp_path / f"{world}{weights}", whole, "--weights", weights, world=world)
        assert [found[key] for key in METRICS] == [during[weights][key] for key in METRICS]
    assert during["ema"]["count"] == 13 and during["ema"]["miou"] != during["model"]["miou"]


def test_all_labelled_pixels_are_counted_once(whole, scenes):
    labels = [np.asarray(Image.open(path)) for path in sorted((scenes / "annotations/val").iterdir())]
    counts = np.bincount(np.concatenate([values.ravel() for values in labels]), minlength=256)
    found = details(whole, "ema")
    assert found["labelled"] == counts[:6].tolist() and sum(found["predicted"]) == counts[:6].sum()
    iou = [
        100 * correct / (labelled + predicted - correct)
        for correct, labelled, predicted in zip(
            *(found[key] for key in ("correct", "labelled", "predicted")), strict=True
        )
    ]
    (line,) = [line for line in metrics(whole, "eval") if (line["step"], line["weights"]) == (20, "ema")]
    assert line["miou"] == pytest.approx(sum(iou) / 6, rel=1e-12)


def test_an_evaluation_takes_other_settings(whole, tmp_path):
    """Several scales, mirrored, in windows: the same numbers on two and four ranks; what cannot be set is named."""
    more = ["task.test_ratios=[0.5,1.0]", "task.test_flip=true", "task.test=slide", "task.window=[64,64]"]
    kept = [tmp_path / "2.json", tmp_path / "4.json"]
    found = [
        evaluate(tmp_path / file.stem, whole, *more, "--details", str(file), world=int(file.stem)) for file in kept
    ]
    assert found[0] == found[1] and found[0]["count"] == 13
    assert json.loads(kept[0].read_text()) == json.loads(kept[1].read_text())
    plain = [line for line in metrics(whole, "eval") if (line["step"], line["weights"]) == (20, "ema")]
    assert found[0]["miou"] != plain[0]["miou"]
    text = evaluate(tmp_path / "wrong", whole, "model.name=cat_tiny", code=78)
    assert "model.name=cat_tiny cannot be set in an evaluation" in text and "Traceback" not in text


def test_it_predicts_image_files(whole, scenes, tmp_path):
    """Photographs of the val split get the labels that the evaluation counted."""
    found = details(whole, "ema")
    ids = [picture["id"] for picture in found["pictures"]]
    paths = sorted((scenes / "images/val").iterdir())
    (tmp_path / "broken.jpg").write_bytes(paths[0].read_bytes()[:200])
    arguments = [*map(str, paths), str(tmp_path / "broken.jpg"), "--run", str(whole), "--output", str(tmp_path / "out")]
    job = start_command("predict", tmp_path / "job", *arguments, "--json")
    assert job.wait() == [65], job.text()
    lines = [json.loads(line) for line in job.text().splitlines() if line.startswith("{")]
    assert [line["image"] for line in lines] == [str(path) for path in paths]
    assert f"left out: {tmp_path / 'broken.jpg'}" in job.text()
    predicted = np.zeros(6, np.int64)
    for path, line in zip(paths, lines, strict=True):
        assert sum(line["shares"].values()) == pytest.approx(1)
        assert list(line["shares"].values()) == sorted(line["shares"].values(), reverse=True)
        overlay, indices = (
            Image.open(tmp_path / "out" / f"{path.stem}_{end}") for end in ("overlay.jpg", "labels.png")
        )
        photograph, labels = Image.open(path), np.asarray(indices)
        assert indices.mode == "L" and indices.size == photograph.size
        assert overlay.size[0] == photograph.size[0] and overlay.size[1] > photograph.size[1]  # a legend below
        truth = np.asarray(Image.open(scenes / "annotations/val" / f"{path.stem}.png"))
        predicted += np.bincount(labels[truth != 255], minlength=6)
    assert predicted.tolist() == found["predicted"]
    assert len(ids) == 8


def test_two_images_of_one_name_are_refused(whole, scenes, tmp_path):
    first = scenes / "images/val/000000.jpg"
    (tmp_path / "other").mkdir()
    (tmp_path / "other/000000.jpg").write_bytes(first.read_bytes())
    arguments = [str(first), str(tmp_path / "other"), "--run", str(whole), "--output", str(tmp_path / "out")]
    job = start_command("predict", tmp_path / "job", *arguments)
    assert job.wait() == [78] and "would both become 000000_labels.png" in job.text()
    job = start_command("predict", tmp_path / "top", str(first), "--run", str(whole), "--top", "3")
    assert job.wait() == [78] and "--top is no option of the task segmentation" in job.text()


def test_it_appears_in_watch_report_and_tensorboard(whole, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    watch = start_command("watch", tmp_path / "watch", str(whole), "--once")
    assert watch.wait() == [0] and "mIoU, %" in watch.text() and "top-1" not in watch.text()
    page = tmp_path / "report.html"
    report = start_command("report", tmp_path / "report", str(whole), "--output", str(page))
    assert report.wait() == [0], report.text()
    text, found = page.read_text(), details(whole, "ema")
    assert "best\nmIoU" in text and all(name in text for name in found["classes"])
    for picture in found["pictures"]:
        assert all(picture[part] in text for part in ("image", "labels", "prediction"))
    board = EventAccumulator(str(whole / "tensorboard"))
    board.Reload()
    tags = board.Tags()
    assert {"evaluation/ema_miou", "evaluation/model_macc", "evaluation/model_aacc"} <= set(tags["scalars"])
    assert {"inputs", "evaluation/ema", "evaluation/model"} == set(tags["images"])
    assert {f"evaluation/{weights}/text_summary" for weights in ("ema", "model")} <= set(tags["tensors"])
    assert from_base64(found["pictures"][0]["image"]).shape[2] == 3


def test_it_is_exported_for_images_of_any_size(whole, tmp_path):
    import torch

    import catmodel
    from catmodel.pretrained import about
    from train.checkpoint.trained_model import read_trained

    for name, more in (("model.safetensors", []), ("model.pt2", []), ("maps.safetensors", ["--features"])):
        job = start_command("export", tmp_path / name, str(whole), "--to", str(tmp_path / "files" / name), *more)
        assert job.wait() == [0], job.text()
        assert "of the model on random images" in job.text()
    described = about(tmp_path / "files/model.safetensors")
    assert described["classes"] == details(whole, "ema")["classes"] and described["model"]["name"] == "cat_tiny"
    assert isinstance(catmodel.create_segmenter(**described["model"]), torch.nn.Module)
    images = torch.randn(1, 3, 97, 131)
    with torch.no_grad():
        logits = read_trained(whole).model()(images)
        found = torch.export.load(tmp_path / "files/model.pt2").module()(images)
    expected = torch.nn.functional.interpolate(logits, size=(97, 131), mode="bilinear")
    assert found.shape == (1, 6, 97, 131) and torch.allclose(found, expected, atol=1e-4)
