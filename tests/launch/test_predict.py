"""launch/predict.py as a command, on images of a dataset."""

import json
import shutil
import subprocess
import sys

import pytest
from PIL import Image

from tests.runs import ROOT, run, start_command


@pytest.fixture(scope="module")
def tiny_run(tiny_config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    run(tiny_config, folder, "train.max_steps=8", "train.evaluate_every=0")
    return folder


def predict(output, *arguments: str, code: int = 0) -> tuple[list[dict], list[str]]:
    """The lines of JSON, and the other lines."""
    job = start_command("predict", output, *map(str, arguments), "--json")
    assert job.wait() == [code], job.text()
    lines = job.text().splitlines()
    return [json.loads(line) for line in lines if line.startswith("{")], [
        line for line in lines if not line.startswith("{")
    ]


@pytest.mark.slow
def test_a_folder_has_the_accuracy_that_evaluate_finds(tiny_run, tiny_images, tmp_path):
    job = start_command("evaluate", tmp_path / "evaluate", str(tiny_run), "--json")
    assert job.wait() == [0], job.text()
    scores = json.loads(job.text().splitlines()[-1])
    lines, others = predict(tmp_path, tiny_images / "val", "--run", tiny_run, "--batch", "8")
    assert len(lines) == scores["count"] == 101 and not others
    assert [line["image"] for line in lines] == sorted(line["image"] for line in lines)
    hits = [[best["class"] == line["image"].split("/")[-2] for best in line["top"]] for line in lines]
    assert all(len(row) == 5 for row in hits)
    assert 100 * sum(row[0] for row in hits) / 101 == scores["top1"]
    assert 100 * sum(map(any, hits)) / 101 == scores["top5"]


@pytest.mark.slow
def test_broken_images_are_named_and_others_predicted_in_order(tiny_run, tiny_images, tmp_path):
    sound = sorted((tiny_images / "val").rglob("*.jpg"))[:3]
    folder = tmp_path / "images"
    folder.mkdir()
    shutil.copy(sound[0], folder / "d.jpg")
    (folder / "b.jpg").write_bytes(sound[1].read_bytes()[:300])
    (folder / "c.png").write_bytes(b"no image")
    Image.open(sound[1]).save(folder / "a.png")
    (folder / "notes.txt").write_text("not looked at")
    (folder / ".hidden.jpg").write_text("nor this")
    arguments = [sound[2], folder, sound[0], "--run", tiny_run, "--batch", "2", "--top", "1"]
    lines, others = predict(tmp_path, *arguments, code=65)
    assert [line["image"] for line in lines] == [
        str(path) for path in (sound[2], folder / "a.png", folder / "d.jpg", sound[0])
    ]
    assert lines[2]["top"][0]["class"] == lines[3]["top"][0]["class"]
    assert abs(lines[2]["top"][0]["probability"] - lines[3]["top"][0]["probability"]) < 1e-5
    named = sorted(line for line in others if line.startswith("left out: "))
    assert [line.split(": ")[1] for line in named] == [str(folder / "b.jpg"), str(folder / "c.png")]
    assert others[-1] == "error: 2 of 6 images could not be read"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["a.jpg", "--run", "nowhere"], "nowhere is neither a run's folder nor a checkpoint"),
        (["nothing.jpg", "--run", "."], "there is no image or folder nothing.jpg"),
        (["configs", "--run", "."], "configs contains no images"),
        (["a.jpg", "--run", ".", "--top", "0"], "'0' is not a whole number of at least 1"),
        (
            ["LICENSE", "--run", ".", "--output", "LICENSE"],
            "--output LICENSE/ cannot be written (Not a directory)",
        ),
    ],
)
def test_a_mistake(arguments, sentence):
    result = subprocess.run(
        [sys.executable, "launch/predict.py", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 78 and sentence in result.stderr
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr
