"""docs/models.md is made of docs/results/models.json, and that of the models."""

import json
import shutil
import subprocess
import sys

import pytest

import catmodel
from tests.runs import ROOT
from train.bench_models import PUBLISHED, counted


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    return json.loads((ROOT / "docs/results/models.json").read_text())["counts"]


def page(root, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(root / "launch/models_page.py"), *arguments], capture_output=True, text=True)


def test_the_page_is_not_stale():
    done = page(ROOT, "--check")
    assert done.returncode == 0, done.stderr


def test_every_model_has_a_line(rows):
    assert [(row["model"], row["size"]) for row in rows] == [line[:2] for line in PUBLISHED]
    assert {row["model"] for row in rows} == set(catmodel.list_models())


@pytest.mark.parametrize("name", ["cat_nano", "pvt_tiny", "cotnet50"])
def test_counts_are_still_those_of_the_models(rows, name):
    assert counted(name, 32 if name == "cat_nano" else 224).items() <= next(row for row in rows if row["model"] == name).items()


def test_a_new_result_makes_the_page_stale_until_it_is_made_anew(tmp_path):
    for name in ("launch", "docs"):
        shutil.copytree(ROOT / name, tmp_path / name)
    path = tmp_path / "docs/results/models.json"
    result = json.loads(path.read_text())
    result["counts"][1]["parameters"] = 123_456_789
    path.write_text(json.dumps(result))
    stale = page(tmp_path, "--check")
    assert stale.returncode == 1 and "run python launch/models_page.py" in stale.stderr
    assert page(tmp_path).returncode == page(tmp_path, "--check").returncode == 0
    assert "| cat_tiny | 224 | 123,456,789 | 17M | +626.2% |" in (tmp_path / "docs/models.md").read_text()
