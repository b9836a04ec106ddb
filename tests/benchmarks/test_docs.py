"""The tables of docs/ are up to date with docs/results and the config's classes."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def docs(root: Path, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(root / "launch/docs.py"), *arguments], capture_output=True, text=True)


def test_no_page_is_stale():
    done = docs(ROOT, "--check")
    assert done.returncode == 0, done.stderr


def test_every_table_is_on_a_page():
    from benchmarks.tables import TABLES
    from launch.docs import TABLE

    used = [found[1] for page in (ROOT / "docs").glob("*.md") for found in TABLE.findall(page.read_text())]
    assert sorted(used) == sorted(TABLES)


def anchors(page: Path) -> set[str]:
    """Names of a page's headings in links, as GitHub forms them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_link_has_its_target():
    missing = []
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
            path, _, anchor = link.partition("#")
            target = page.parent / path if path else page
            if "://" not in link and not (target.exists() and (not anchor or anchor in anchors(target))):
                missing.append(f"{page.relative_to(ROOT)}: {link}")
    assert not missing


def test_every_named_program_exists():
    """Outside of blocks, whose commands test_commands.py runs."""
    rooms = [folder for folder in ROOT.iterdir() if not folder.name.startswith(".")]
    programs = {str(path.relative_to(ROOT)) for room in rooms for path in room.rglob("*.py")}
    names = {path.rsplit("/", 1)[1] for path in programs}
    missing = []
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
        for name in re.findall(r"(?<![\w/.])([\w/]+\.py)\b", text):
            if name not in (programs if "/" in name else names):
                missing.append(f"{page.name}: {name}")
    assert not missing


@pytest.fixture
def checkout(tmp_path):
    """A copy of the sources of the pages."""
    for folder in ("launch", "benchmarks", "docs", "train", "data_pipeline", "catmodel"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    return tmp_path


@pytest.mark.parametrize("name", ["gpu-gradients", "models"])
def test_a_new_result_makes_its_page_stale_until_it_is_made_anew(checkout, name):
    path = checkout / f"docs/results/{name}.json"
    if name == "models":
        page, line = "docs/models.md", "| cat_tiny | 224 | 123,456,789 | 17M | +626.2% |"
        result = json.loads(path.read_text())
        result["counts"][1]["parameters"] = 123_456_789
    else:
        page, line = "docs/gpu.md", "| gradients | passed | 3 | 0 of 7 differ | a new GPU | 2030-01-02 |"
        result = {"passed": True, "says": "0 of 7 differ", "seconds": 3.0, "machine": "a new GPU", "date": "2030-01-02"}
    path.write_text(json.dumps(result))
    assert_stale_until_made(checkout, page, line)


def test_a_new_config_key_makes_the_reference_stale_until_it_is_made_anew(checkout):
    path = checkout / "train/config_sections.py"
    before = "class EmaConfig(Section):\n"
    after = before + '    every: Literal["step", "epoch"] | None = Field(None, description="how often it is fed")\n'
    assert before in path.read_text()
    path.write_text(path.read_text().replace(before, after))
    assert_stale_until_made(
        checkout, "docs/config.md", "| `ema.every` | `step`, `epoch`, or null | `null` | fixed | how often it is fed |"
    )


def assert_stale_until_made(root: Path, page: str, line: str) -> None:
    stale = docs(root, "--check")
    assert (
        stale.returncode == 1 and stale.stderr.startswith(f"{page}: ") and "run python launch/docs.py" in stale.stderr
    ), stale.stderr
    assert docs(root).returncode == docs(root, "--check").returncode == 0
    assert line in (root / page).read_text()


def test_every_config_key_and_rule_says_what_it_does():
    from benchmarks.config_reference import reference
    from train.config import Config, flatten, load_config

    lines = reference().splitlines()
    rows = {line.split("`")[1]: line.removesuffix(" |").split(" | ") for line in lines if line.startswith("| `")}
    recipes = ("configs/cat_b.yaml", "configs/segmentation/cat_s_80k.yaml", "configs/detection/atss_cat_s_1x.yaml")
    assert rows.keys() == {key for recipe in recipes for key in flatten(load_config(ROOT / recipe).model_dump())}
    assert not [key for key, cells in rows.items() if not cells[-1].strip() or len(cells) != 5]
    assert "- None" not in lines and "## guard.timeout" in lines
    assert rows["zero.stage"][1:4] == ["`0`, `1`, `2`, `3`", "`1`", "free"]
    assert rows["train.global_batch"][1:4] == ["int ≥ 1", "`1024`", "fixed"]
    headings = [line for line in lines if line.startswith("## ") and "." not in line]
    sections = [f"## {section}" for section in Config.model_fields]
    tasks = [f"## task: settings of {task}" for task in ("detection", "segmentation")]
    assert headings == [*sections, *tasks, "## Across sections"]
