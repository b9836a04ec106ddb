"""The commands of docs/segmentation.md and docs/detection.md, in their order, as they stand: the quickstarts are
trained to their ends.

The photographs are the drawn scenes, and the papers' recipes are replaced by a few steps of the quickstarts'.
"""

import json
import re
from pathlib import Path

from tests.launch.test_commands import long, run_all
from tests.runs import ROOT, metrics


def commands(page: str, recipe: str) -> list[str]:
    """Those of a page. The one that prepares photographs stands in a sentence, before the one that trains `recipe`."""
    text = (ROOT / "docs" / page).read_text()
    blocks = re.findall(r"^```\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    found = [line for line in lines if re.match("(python|deepspeed) ", line)]
    where = next(number for number, line in enumerate(found) if recipe in line)
    return [*found[:where], *re.findall(r"`(python launch/prepare.py [^`]*)`", text), *found[where:]]


def follow(page: str, quickstart: str, recipe: str, drawn: str, val: str, folder: Path) -> dict:
    """Run a page's commands in `folder`; returns the quickstart's last evaluation, which is the EMA's.

    drawn: the folder that the first command draws. val: its images of the val split.
    """
    for name in ("launch", "examples"):
        (folder / name).symlink_to(ROOT / name)
    text = (ROOT / f"configs/{quickstart}.yaml").read_text()
    few_steps, count = re.subn(r"epochs: \d+\n  global", "epochs: 1\n  max_steps: 4\n  global", text)
    assert count == 1
    for name, content in ((quickstart, text), (recipe, few_steps)):
        path = folder / f"configs/{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    first, *others = commands(page, recipe)
    run_all([first], folder)
    (folder / "photographs").symlink_to(folder / drawn)
    (folder / "photo.jpg").symlink_to(folder / drawn / val / "000000.jpg")
    (folder / "holidays").mkdir()
    (folder / "holidays/beach.jpg").symlink_to(folder / drawn / val / "000001.jpg")
    assert len(others) > 9
    run_all(others, folder)
    last = metrics(folder / "runs" / quickstart, "eval")[-1]
    assert last["weights"] == "ema" and last["count"] == 200
    return last


def written(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@long
def test_from_drawn_scenes_to_masks(tmp_path):
    names = ("segmentation.md", "segment_quickstart", "segmentation/cat_s_80k")
    assert follow(*names, "datasets/segments-images", "images/val", tmp_path)["miou"] > 90
    masks = ["beach_labels.png", "beach_overlay.jpg", "photo_labels.png", "photo_overlay.jpg"]
    assert written(tmp_path / "masks") == masks
    assert (tmp_path / "segment.onnx").stat().st_size > 1e6 and (tmp_path / "segment.pt2").exists()


@long
def test_from_drawn_scenes_to_boxes(tmp_path):
    names = ("detection.md", "detect_quickstart", "detection/retinanet_cat_s_1x")
    assert follow(*names, "datasets/boxes-images", "val", tmp_path)["ap50"] > 90
    results = json.loads((tmp_path / "detections.json").read_text())
    assert {"image_id", "category_id", "bbox", "score"} == results[0].keys()
    assert written(tmp_path / "boxes") == ["beach_boxes.jpg", "photo_boxes.jpg"]
    assert (tmp_path / "detect.onnx").stat().st_size > 1e6 and (tmp_path / "detect.pt2").exists()
