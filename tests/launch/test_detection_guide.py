"""The commands of docs/detection.md, in their order, as they stand: the quickstart is trained to its end.

The annotated photographs are the drawn scenes, and the recipe for COCO is replaced by a few steps of the quickstart's.
"""

import json
import re
from pathlib import Path

import pytest

from tests.launch.test_commands import long, run_all
from tests.runs import ROOT

PAGE = ROOT / "docs/detection.md"


def commands() -> list[str]:
    blocks = re.findall(r"^```\n(.*?)^```", PAGE.read_text(), flags=re.MULTILINE | re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    inline = re.findall(r"`(python launch/prepare.py [^`]*)`", PAGE.read_text())
    first = [line for line in lines if re.match("(python|deepspeed) ", line)]
    where = next(number for number, line in enumerate(first) if "retinanet_cat_s_1x" in line)
    return [*first[:where], *inline, *first[where:]]


@long
@pytest.mark.timeout(1800)
def test_the_page_from_drawn_scenes_to_boxes(tmp_path):
    for name in ("launch", "examples"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "configs/detection").mkdir(parents=True)
    quickstart = (ROOT / "configs/detect_quickstart.yaml").read_text()
    (tmp_path / "configs/detect_quickstart.yaml").write_text(quickstart)
    (tmp_path / "configs/detection/retinanet_cat_s_1x.yaml").write_text(
        quickstart.replace("epochs: 6", "epochs: 1\n  max_steps: 4")
    )
    found = commands()
    assert len(found) > 10
    run_all(found[:1], tmp_path)
    images = Path("datasets/boxes-images")
    (tmp_path / "photographs").symlink_to(tmp_path / images)
    (tmp_path / "photo.jpg").symlink_to(tmp_path / images / "val/000000.jpg")
    (tmp_path / "holidays").mkdir()
    (tmp_path / "holidays/beach.jpg").symlink_to(tmp_path / images / "val/000001.jpg")
    run_all(found[1:], tmp_path)

    lines = [json.loads(line) for line in (tmp_path / "runs/detect_quickstart/metrics.jsonl").read_text().splitlines()]
    last = [line for line in lines if line["kind"] == "eval"][-1]
    assert last["weights"] == "ema" and last["count"] == 200
    assert last["ap50"] > 90
    results = json.loads((tmp_path / "detections.json").read_text())
    assert {"image_id", "category_id", "bbox", "score"} == results[0].keys()
    assert sorted(path.name for path in (tmp_path / "boxes").iterdir()) == ["beach_boxes.jpg", "photo_boxes.jpg"]
    assert (tmp_path / "detect.onnx").stat().st_size > 1e6 and (tmp_path / "detect.pt2").exists()
