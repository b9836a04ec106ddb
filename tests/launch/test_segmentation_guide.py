"""The commands of docs/segmentation.md, in their order, as they stand: the quickstart is trained to its end.

The labelled photographs are the drawn scenes, and the recipe for ADE20K is replaced by a few steps of the quickstart's.
"""

import json
import re
from pathlib import Path

import pytest

from tests.launch.test_commands import long, run_all
from tests.runs import ROOT

PAGE = ROOT / "docs/segmentation.md"


def commands() -> list[str]:
    blocks = re.findall(r"^```\n(.*?)^```", PAGE.read_text(), flags=re.MULTILINE | re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    inline = re.findall(r"`(python launch/prepare.py [^`]*)`", PAGE.read_text())
    first = [line for line in lines if re.match("(python|deepspeed) ", line)]
    where = next(number for number, line in enumerate(first) if "cat_s_80k" in line)
    return [*first[:where], *inline, *first[where:]]


@long
@pytest.mark.timeout(1200)
def test_the_page_from_drawn_scenes_to_masks(tmp_path):
    for name in ("launch", "examples"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "configs/segmentation").mkdir(parents=True)
    quickstart = (ROOT / "configs/segment_quickstart.yaml").read_text()
    (tmp_path / "configs/segment_quickstart.yaml").write_text(quickstart)
    (tmp_path / "configs/segmentation/cat_s_80k.yaml").write_text(
        quickstart.replace("epochs: 3", "epochs: 1\n  max_steps: 4")
    )
    found = commands()
    assert len(found) > 10
    run_all(found[:1], tmp_path)
    images = Path("datasets/segments-images")
    (tmp_path / "photographs").symlink_to(tmp_path / images)
    (tmp_path / "photo.jpg").symlink_to(tmp_path / images / "images/val/000000.jpg")
    (tmp_path / "holidays").mkdir()
    (tmp_path / "holidays/beach.jpg").symlink_to(tmp_path / images / "images/val/000001.jpg")
    run_all(found[1:], tmp_path)

    lines = [json.loads(line) for line in (tmp_path / "runs/segment_quickstart/metrics.jsonl").read_text().splitlines()]
    last = [line for line in lines if line["kind"] == "eval"][-1]
    assert last["weights"] == "ema" and last["count"] == 200
    assert last["miou"] > 90
    masks = sorted(path.name for path in (tmp_path / "masks").iterdir())
    assert masks == ["beach_labels.png", "beach_overlay.jpg", "photo_labels.png", "photo_overlay.jpg"]
    assert (tmp_path / "segment.onnx").stat().st_size > 1e6 and (tmp_path / "segment.pt2").exists()
