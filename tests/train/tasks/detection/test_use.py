"""A finished run in use: image files, watch, report, TensorBoard, the results file; and what is refused."""

import json

import numpy as np
import pytest
from PIL import Image

from tests.runs import start_command
from tests.train.tasks.dense_runs import details

pytestmark = pytest.mark.slow


def command(name: str, folder, *arguments: object, code: int = 0) -> str:
    job = start_command(name, folder, *map(str, arguments))
    assert job.wait() == [code], job.text()
    return job.text()


def test_it_predicts_image_files_as_it_evaluates(whole, box_scenes, tmp_path):
    """The same boxes, in pixels of the file's image, of the same scores and classes as in the results file."""
    command("evaluate", tmp_path / "evaluate", whole, "--results", tmp_path / "r.json", "train.micro_batch=1")
    source = json.loads((box_scenes / "annotations/instances_val.json").read_text())
    names = {each["id"]: each["name"] for each in source["categories"]}
    expected: dict[int, list] = {}
    for row in json.loads((tmp_path / "r.json").read_text()):
        expected.setdefault(row["image_id"], []).append((names[row["category_id"]], row["score"], row["bbox"]))
    images = {image["id"]: box_scenes / "val" / image["file_name"] for image in source["images"][:12]}
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(images[source["images"][0]["id"]].read_bytes()[:200])
    chosen = ["--run", whole, "--min-score", "0", "--output", tmp_path / "out", "--json"]
    text = command("predict", tmp_path / "job", *images.values(), broken, *chosen, code=65)
    lines = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
    assert f"left out: {broken}" in text and [line["image"] for line in lines] == [*map(str, images.values())]
    for (number, path), line in zip(images.items(), lines, strict=True):
        found = [(each["class"], each["score"], each["bbox"]) for each in line["objects"]]
        assert found == expected[number] and len(found) > 10
        (written,) = line["written"]
        photograph, picture = Image.open(path), Image.open(written)
        assert (line["width"], line["height"]) == photograph.size
        assert picture.size[0] == photograph.size[0] and picture.size[1] > photograph.size[1]  # a legend below
        difference = np.abs(np.asarray(picture, int)[: photograph.size[1]] - np.asarray(photograph.convert("RGB"), int))
        assert (difference > 60).mean() > 0.01


def test_low_scores_are_left_out(whole, box_scenes, tmp_path):
    paths = sorted((box_scenes / "val").iterdir())[:3]
    lines = [
        command("predict", tmp_path / str(least), *paths, "--run", whole, *options).splitlines()
        for least, options in enumerate([(), ("--min-score", 0.01)])
    ]
    assert lines[0] == [*map(str, paths)]  # a network that has hardly learned is not sure of anything
    assert all(" %  " in line or line in lines[0] for line in lines[1]) and len(lines[1]) > 10
    scores = [float(line.split()[0]) for line in lines[1] if line not in lines[0]]
    assert 1 <= min(scores) < 5  # also below task.score_threshold


def test_wrong_options_are_named(whole, tiny_config, box_scenes, tmp_path):
    first = box_scenes / "val/000000.jpg"
    (tmp_path / "other").mkdir()
    (tmp_path / "other/000000.jpg").write_bytes(first.read_bytes())
    arguments = [first, tmp_path / "other", "--run", whole, "--output", tmp_path / "out"]
    text = command("predict", tmp_path / "1", *arguments, code=78)
    assert "would both become 000000_boxes.jpg" in text
    assert "--top is no option of the task detection" in command(
        "predict", tmp_path / "2", first, "--run", whole, "--top", 3, code=78
    )
    missing = tmp_path / "missing/results.json"
    text = command("evaluate", tmp_path / "3", whole, "--results", missing, code=78)
    assert f"--results {missing} cannot be written (No such file or directory): name another" in text
    command("train", tmp_path / "run", "--config", tiny_config, "--output", tmp_path / "run", "train.max_steps=1")
    text = command("evaluate", tmp_path / "4", tmp_path / "run", "--results", tmp_path / "r.json", code=78)
    assert "--results is no option of the task classification" in text and not (tmp_path / "r.json").exists()
    arguments = [first, "--run", tmp_path / "run", "--min-score", 0.5]
    assert "--min-score is no option of the task classification" in command(
        "predict", tmp_path / "5", *arguments, code=78
    )


def test_it_appears_in_watch_report_and_tensorboard(whole, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    text = command("watch", tmp_path / "watch", whole, "--once")
    assert "AP, %" in text and "top-1" not in text
    page = tmp_path / "report.html"
    command("report", tmp_path / "report", whole, "--output", page)
    text, found = page.read_text(), details(whole, "ema")
    assert "best\nAP" in text and all(name in text for name in found["classes"])
    assert text.count("<figure>") >= 2 * len(found["pictures"]) + len(found["mistakes"]) > 20
    board = EventAccumulator(str(whole / "tensorboard"))
    board.Reload()
    tags = board.Tags()
    assert {"evaluation/ema", "inputs"} <= {*tags["images"]} and "evaluation/ema_ap50" in tags["scalars"]
    (written,) = board.Tensors("evaluation/ema/text_summary")
    assert b"nothing there" in written.tensor_proto.string_val[0]
