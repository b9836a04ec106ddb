"""The README's picture of a killed run."""

import json

import pytest

from benchmarks import killed_run


@pytest.fixture
def result():
    return json.loads(killed_run.RESULT.read_text())


def test_metrics_are_split_into_starts(tmp_path):
    lines = [{"kind": "train", "step": step, "loss": 1 / step} for step in (1, 2, 3, 2, 3, 4, 4, 5)]
    text = "".join(json.dumps(line) + "\n" for line in [*lines[:4], {"kind": "eval", "step": 3}, *lines[4:]])
    (tmp_path / "metrics.jsonl").write_text(text + '{"kind": "train", "st')  # a kill may leave an unfinished line
    assert [[step for step, _ in part] for part in killed_run.starts(tmp_path)] == [[1, 2, 3], [2, 3, 4], [4, 5]]


def test_the_result_shows_what_the_readme_claims(result):
    whole = dict(map(tuple, result["uninterrupted"]))
    assert len(result["killed"]) == len(killed_run.KILLS) + 1 == 4
    assert result["sha256"]["killed"] == result["sha256"]["uninterrupted"]
    assert all(whole[step] == loss for part in result["killed"] for step, loss in part)
    assert {step for part in result["killed"] for step, _ in part} == whole.keys()
    picture = (killed_run.ROOT / "README.md").read_text()
    assert str(killed_run.PICTURE.relative_to(killed_run.ROOT)) in picture


def test_no_picture_is_drawn_of_different_weights(result, tmp_path, monkeypatch):
    monkeypatch.setattr(killed_run, "PICTURE", tmp_path / "picture.svg")
    killed_run.draw(result)
    assert (tmp_path / "picture.svg").read_text().startswith("<?xml")
    result["sha256"]["killed"] = "0" * 64
    with pytest.raises(SystemExit, match="the final weights differ"):
        killed_run.draw(result)
