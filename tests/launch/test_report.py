"""The page about real runs, as a user gets it: one that was killed twice and resumed, one that still runs, several."""

import json
import re
import shutil
import subprocess
import sys
import time
from html import unescape

import pytest

from tests.runs import ROOT, metrics, run, start

CLASS = "<script>alert('class_3')</script>"
SECTIONS = ("summary", "learning", "speed", "time", "starts", "incidents", "classes", "mistakes", "config", "versions")


@pytest.fixture(scope="module")
def dataset(tiny_dataset, tmp_path_factory):
    """Prepared images, one of them unreadable, and a class whose name a browser must not take for a script."""
    folder = tmp_path_factory.mktemp("data") / "dataset"
    shutil.copytree(tiny_dataset, folder)
    manifest = folder / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"class_3"', json.dumps(CLASS)))
    with open(folder / "train-000000.tar", "r+b") as shard:
        shard.seek(600)
        shard.write(b"no image")
    return folder


@pytest.fixture(scope="module")
def killed(tiny_config, dataset, tmp_path_factory):
    """A run that was killed with -9 after 5 steps, and after 13, and then went on to its end."""
    folder = tmp_path_factory.mktemp("runs") / "killed"
    settings = [f"data.path={dataset}", "checkpoint.every_steps=3"]
    start(tiny_config, folder, *settings, world=2).kill_at(5)
    start(tiny_config, folder, *settings).kill_at(13)
    run(tiny_config, folder, *settings)
    return folder


@pytest.fixture(scope="module")
def page(killed, tmp_path_factory):
    return report(tmp_path_factory.mktemp("page") / "report.html", killed)


def report(output, *runs):
    result = command(*runs, "--output", output)
    assert result.returncode == 0, result.stderr
    return output


def command(*arguments):
    words = [sys.executable, str(ROOT / "launch" / "report.py"), *map(str, arguments)]
    return subprocess.run(words, capture_output=True, text=True, timeout=120)


def wait_for_steps(job, step) -> None:
    deadline = time.monotonic() + 120
    while not any(line["step"] >= step for line in metrics(job.output, "train", missing_ok=True)):
        assert time.monotonic() < deadline and job.processes[0].is_alive(), job.text()
        time.sleep(0.01)


def rows(page, section) -> list[list[str]]:
    """The cells of the section's tables, as one reads them."""
    content = re.search(f'<section id="{section}">(.*?)</section>', page.read_text(), re.S)[1]
    cells = [re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row, re.S) for row in re.findall("<tr>(.*?)</tr>", content, re.S)]
    return [[" ".join(unescape(re.sub("<[^>]*>", "", cell)).split()) for cell in row] for row in cells]


@pytest.mark.slow
def test_the_page_is_utf8_in_any_locale(killed, tmp_path, monkeypatch):
    """A cluster's may be Latin-1 or ASCII: only plain C is taken for UTF-8 (PEP 538, PEP 540)."""
    for name, value in (("LC_ALL", "C"), ("PYTHONUTF8", "0"), ("PYTHONCOERCECLOCALE", "0")):
        monkeypatch.setenv(name, value)
    report(tmp_path / "report.html", killed)
    assert "×" in (tmp_path / "report.html").read_text("utf-8")


@pytest.mark.slow
def test_numbers_of_a_run_that_was_killed_twice(killed, page):
    lines = [json.loads(line) for line in (killed / "metrics.jsonl").read_text().splitlines()]
    resumed = [line for line in lines if line.get("event") == "resume"]
    best = max(line["top1"] for line in lines if line["kind"] == "eval")
    summary = dict(zip(*rows(page, "summary"), strict=True))
    assert [summary[key] for key in ("run", "state", "epoch", "restarts")] == ["killed", "finished", "2 of 2", "2"]
    assert summary["best top-1"] == f"{best:.2f} %"
    assert summary["bad samples"] == "1" and summary["skipped steps"] == "0"
    assert summary["steps lost"] == str(sum(line["lost_steps"] for line in resumed)) != "0"
    starts = [(row[3], row[-1]) for row in rows(page, "starts")[1:]]
    assert starts == [("2", "killed"), ("1", "killed"), ("1", "finished")]
    # On a busy machine a save may still be written when the next one is due, which is an incident, too.
    (incident,) = (row for row in rows(page, "incidents")[1:] if row[2] != "slow save")
    assert incident[2] == "bad sample" and "train-000000.tar" in incident[3]
    assert [row[0] for row in rows(page, "versions")[1:]] == ["1", "2, 3"]
    classes = rows(page, "classes")[1:]
    assert len(classes) == 10 and CLASS in [row[0] for row in classes] and sum(int(row[1]) for row in classes) == 101
    for name in ("learning", "speed", "time"):
        assert (page.parent / f"report-{name}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_page_needs_nothing_else(page):
    text = page.read_text()
    assert "<script" not in text and not re.findall(r"(?:src|href)=(?!\"(?:data:|#))", text) and "url(" not in text
    assert text.count("data:image/jpeg") == 24 and text.count("data:image/svg+xml") == 3


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="Chromium is not installed")
def test_in_a_browser(page, tmp_path):
    """In a frame of a laptop's width, from which a script beside it takes the sizes."""
    shutil.copy(page, tmp_path / "report.html")
    (tmp_path / "frame.html").write_text("""<!DOCTYPE html>
        <iframe src="report.html" width="1280" height="900"></iframe><script>
        addEventListener("load", () => {
            const page = document.querySelector("iframe").contentDocument
            const heights = Object.fromEntries([...page.querySelectorAll("section")].map(s => [s.id, s.clientHeight]))
            const images = [...page.images].map(image => image.complete ? image.naturalWidth : 0)
            document.body.textContent = JSON.stringify({heights, images, width: page.documentElement.scrollWidth})
        })</script>""")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--window-size=1400,1000"]
    options += ["--allow-file-access-from-files", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]
    options.append((tmp_path / "frame.html").as_uri())
    result = subprocess.run(["chromium", *options], capture_output=True, text=True, timeout=120)
    assert "CONSOLE" not in result.stderr, result.stderr
    seen = json.loads(re.search(r"<body>(\{.*\})</body>", result.stdout)[1])
    assert tuple(seen["heights"]) == SECTIONS and min(seen["heights"].values()) > 60, seen
    assert min(seen["images"]) > 0 and len(seen["images"]) == 27
    assert seen["width"] <= 1280, "something is wider than the screen"


@pytest.mark.slow
def test_a_run_that_goes_on_beside_one_that_has_ended(killed, tiny_config, tmp_path):
    settings = ["train.epochs=1000", "optimizer.lr=0.01", "train.evaluate_every=1000"]
    job = start(tiny_config, tmp_path / "goes_on", *settings)
    try:
        wait_for_steps(job, 3)
        page = report(tmp_path / "both.html", killed, tmp_path / "goes_on")
    finally:
        job.kill()
    head, first, second = rows(page, "summary")
    state, best = head.index("state"), head.index("best top-1")
    assert (first[state], second[state], second[best]) == ("finished", "running", "none yet")
    assert "No evaluation has been recorded yet." in page.read_text()
    differing = {row[0]: row[1:] for row in rows(page, "config")[1:]}
    assert differing["optimizer.lr"] == ["0.001", "0.01"] and differing["train.epochs"] == ["2", "1000"]
    assert "train.seed" not in differing


@pytest.mark.slow
def test_a_folder_that_was_moved_and_has_a_torn_line(killed, tmp_path):
    shutil.copytree(killed, tmp_path / "moved")
    config, lines = tmp_path / "moved" / "config.yaml", tmp_path / "moved" / "metrics.jsonl"
    config.write_text(re.sub("path: .*", "path: datasets/elsewhere", config.read_text()))
    lines.write_text(lines.read_text() + '{"kind": "train", "st')
    shutil.rmtree(tmp_path / "moved" / "checkpoints")
    page = report(tmp_path / "report.html", tmp_path / "moved")
    assert rows(page, "summary")[1][:3] == ["moved", "finished", "2 of 2"]
    text = page.read_text()
    assert "No pictures: no dataset at datasets/elsewhere" in text and text.count("no picture<") == 24


def test_mistakes_get_one_sentence(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "begins").mkdir()
    (tmp_path / "begins" / "metrics.jsonl").write_text("")
    for arguments, code, sentence in (
        ([tmp_path / "empty"], 78, "empty is no run's folder: it has no metrics.jsonl"),
        ([tmp_path / "begins"], 65, "has no start with a time: the run has not begun yet"),
        ([tmp_path / "begins", "--output", tmp_path / "nowhere" / "report.html"], 78, "report.html cannot be written"),
        ([], 78, "the following arguments are required: RUN"),
    ):
        result = command(*arguments)
        assert result.returncode == code
        assert result.stderr.startswith("error: ") and sentence in result.stderr, result.stderr
        assert result.stderr.count("\n") == 1
