"""What a run records of its evaluations, what the report reads of its folder, and the page for tasks of other kinds."""

import json
import shutil

import pytest
import torch

from operate.report.run import read_reported_run
from tests.runs import run
from train.tasks.classification.scores import KEPT
from train.telemetry.goodput import read_lines


@pytest.fixture(scope="module")
def trained(tiny_config, tmp_path_factory):
    """8 steps, not evaluated."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    run(tiny_config, folder, "train.max_steps=8", "train.evaluate_every=0")
    return folder


def evaluated(trained, tiny_config, output, *settings: str, world: int) -> dict[str, str]:
    """What a start on `world` ranks records that has nothing to do but to evaluate `trained`, by weights."""
    shutil.copytree(trained, output)
    run(tiny_config, output, "train.max_steps=8", *settings, world=world)
    return {path.stem: path.read_text() for path in (output / "evaluations").iterdir()}


@pytest.mark.slow
def test_classes_and_mistakes_are_those_of_the_model_on_any_number_of_ranks(trained, tiny_config, tmp_path):
    """101 samples in 13 batches: the last is short, and one of two ranks must repeat a batch that does not count."""
    records = [
        evaluated(trained, tiny_config, tmp_path / "1", world=1),
        evaluated(trained, tiny_config, tmp_path / "2", "zero.stage=3", world=2),
    ]
    assert records[0].keys() == {"ema", "model"} and records[0]["ema"] != records[0]["model"]
    assert records[0] == records[1]
    for weights, text in records[0].items():
        record = json.loads(text)
        labels, predicted, probability = predictions(trained, weights)
        assert record["step"] == 8 and record["classes"] == [f"class_{label}" for label in range(10)]
        assert record["count"] == torch.bincount(labels, minlength=10).tolist() and sum(record["count"]) == 101
        assert record["correct"] == torch.bincount(labels[labels == predicted], minlength=10).tolist()
        wrong = [id for id in range(101) if predicted[id] != labels[id]]
        surest = sorted(wrong, key=lambda id: (-probability[id].item(), id))[:KEPT]
        assert len(record["mistakes"]) == len(surest) == KEPT
        expected = [{"id": id, "label": labels[id].item(), "predicted": predicted[id].item()} for id in surest]
        found = [mistake.pop("probability") for mistake in record["mistakes"]]
        assert record["mistakes"] == expected and found == pytest.approx(probability[surest].tolist(), abs=1e-6)


@torch.no_grad()
def predictions(trained, weights) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(label, predicted class, its probability) of each sample, in the order of ids, in the plainest way."""
    from data_pipeline.augment import normalise
    from data_pipeline.loader import evaluation_batches
    from data_pipeline.manifest import open_manifest
    from data_pipeline.views import Crops
    from train.checkpoint.trained_model import read_trained

    it = read_trained(trained, weights)
    model, split = it.model(), open_manifest(it.config.data.path).split("val")
    data, views = it.config.data, Crops(it.config.data, it.config.augment)
    batches = [batch for _, batch in evaluation_batches(data, views, split, it.config.train.micro_batch)]
    best = torch.cat([model(normalise(batch.images, it.config.augment)).softmax(dim=1) for batch in batches]).max(dim=1)
    return torch.cat([batch.targets for batch in batches]), best.indices, best.values


# A start that is killed after step 16, one that continues from 8 (epochs of 8 steps) and goes back, and a torn line.
LINES = [
    {
        "kind": "event",
        "event": "start",
        "step": 0,
        "startup_seconds": 10.0,
        "steps_per_epoch": 8,
        "last": 32,
        "time": 3610.0,
    },
    {
        "kind": "train",
        "step": 8,
        "loss": 2.0,
        "step_ms": 1000.0,
        "data_wait": 0.0,
        "images_per_second": 5.0,
        "time": 3618.0,
    },
    {"kind": "eval", "step": 8, "weights": "ema", "top1": 50.0, "seconds": 1.0, "time": 3619.0},
    {"kind": "event", "event": "bad_sample", "step": 9, "split": "train", "id": 7, "time": 3620.0},
    {
        "kind": "train",
        "step": 16,
        "loss": None,
        "step_ms": 1000.0,
        "data_wait": 0.0,
        "images_per_second": 5.0,
        "time": 3627.0,
    },
    {"kind": "eval", "step": 16, "weights": "ema", "top1": 90.0, "seconds": 1.0, "time": 3628.0},
    {
        "kind": "event",
        "event": "resume",
        "step": 8,
        "startup_seconds": 10.0,
        "steps_per_epoch": 8,
        "last": 32,
        "lost_steps": 8,
        "time": 3700.0,
    },
    {"kind": "event", "event": "bad_sample", "step": 9, "split": "train", "id": 7, "time": 3702.0},
    {
        "kind": "train",
        "step": 16,
        "loss": 1.0,
        "step_ms": 1000.0,
        "data_wait": 0.0,
        "images_per_second": 7.0,
        "time": 3708.0,
    },
    {"kind": "eval", "step": 16, "weights": "model", "top1": 60.0, "seconds": 1.0, "time": 3709.0},
    {"kind": "eval", "step": 16, "weights": "ema", "top1": 60.0, "seconds": 1.0, "time": 3710.0},
    {"kind": "event", "event": "skipped_step", "step": 17, "time": 3711.0},
    {
        "kind": "train",
        "step": 18,
        "loss": 9.0,
        "step_ms": 1000.0,
        "data_wait": 0.0,
        "images_per_second": 7.0,
        "time": 3712.0,
    },
    {"kind": "event", "event": "rollback", "step": 18, "to": 16, "time": 3713.0},
    {
        "kind": "train",
        "step": 18,
        "loss": 0.9,
        "step_ms": 1000.0,
        "data_wait": 0.0,
        "images_per_second": 9.0,
        "time": 3716.0,
    },
]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES) + '{"kind": "tra')
    (tmp_path / "config.yaml").write_text("train: {epochs: 4}\n")
    return tmp_path


def test_what_was_taken_again_does_not_count(folder):
    found = read_reported_run(folder)
    log = found.log
    taken = [(line.values["step"], line.values["loss"]) for line in log.train if not line.again]
    assert taken == [(8, 2.0), (16, 1.0), (18, 0.9)]
    assert [line.values["top1"] for line in log.scores("ema")] == [50.0, 60.0]
    assert (log.best().values["weights"], log.best().values["step"]) == ("ema", 16)
    counts = (log.ledger.lost_steps, found.restarts, found.step, found.last_step, found.speed)
    assert counts == (10, 1, 18, 32, 7.0) and found.task == "classification"
    assert log.train[0].hours == pytest.approx(18 / 3600) and found.epoch(log.train[0]) == 1
    assert [line.values["event"] for line in found.incidents()] == ["bad_sample", "skipped_step", "rollback"]
    assert [launch.end for launch in found.launches] == ["killed", "killed"] and found.state == "killed"


def test_the_state_is_that_of_now(folder):
    import time

    lock = folder / ".lock"
    lock.write_text(json.dumps({"beat": time.time(), "ended": False}))
    assert read_reported_run(folder).state == "running" and read_reported_run(folder).launches[-1].end == ""
    lock.write_text(json.dumps({"beat": 3800.0, "ended": False}))  # perhaps it is only suspended
    assert read_reported_run(folder).state == read_reported_run(folder).launches[-1].end == "silent"
    assert read_reported_run(folder).launches[-1].ended == pytest.approx(200 / 3600)
    with open(folder / "metrics.jsonl", "a") as file:
        file.write("\n" + json.dumps({"kind": "event", "event": "preempted", "step": 18, "time": 3717.0}) + "\n")
    assert read_reported_run(folder).state == read_reported_run(folder).launches[-1].end == "stopped"
    assert len(list(read_lines(folder / "metrics.jsonl"))) == len(LINES) + 1


NAME = "<b>depth</b>"
ERROR = {"name": "error", "label": NAME, "unit": "m", "better": "lower", "primary": True}


def other_task(path, task):
    """A run of a task that the report knows by its files alone."""
    path.mkdir()
    start = {"kind": "event", "event": "start", "step": 0, "startup_seconds": 1.0, "steps_per_epoch": 8, "last": 16}
    start |= {"metrics": [ERROR], "samples": "volumes", "world_size": 1, "zero_stage": 0, "time": 10.0}
    train = {"kind": "train", "loss": 2.0, "lr": 0.1, "step_ms": 1000.0, "data_wait": 0.0, "images_per_second": 5.0}
    evaluation = {"kind": "eval", "weights": "model", "count": 12, "seconds": 1.0}
    lines = [start]
    for step, error in ((8, 0.125), (16, 0.5)):
        lines += [
            {**train, "step": step, "time": 10.0 + step},
            {**evaluation, "step": step, "error": error, "time": 11.0 + step},
        ]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (path / "config.yaml").write_text(f"task: {{name: {task}}}\ndata: {{path: '<i>'}}\ntrain: {{epochs: 2}}\n")
    (path / "evaluations").mkdir()
    (path / "evaluations" / "model.json").write_text(json.dumps({"step": 16, "split": "", "worst": ["<u>"]}))
    return path


def html(*folders) -> str:
    from operate.report.figures import figures
    from operate.report.page import page
    from operate.report.run import names

    runs = [read_reported_run(folder) for folder in folders]
    return page(runs, names(runs), figures(runs, names(runs)), 100.0)


def test_a_task_without_sections_has_its_metrics_in_the_page(tmp_path):
    """In the table and the plots' labels, escaped, with the lowest as the best; nothing is of images or classes."""
    text = html(other_task(tmp_path / "run", "unheard_of"))
    assert (
        '<td class="number">0.1250 m</td><td class="text">model, epoch 1</td><td class="number">0.5000 m</td>' in text
    )
    assert (
        "best\n&lt;b&gt;depth&lt;/b&gt;" in text
        and "volumes\nper second" in text
        and "data.path: &#34;&lt;i&gt;&#34;" in text
    )
    assert not any(word in text for word in ("<b>", "<i>", "top-1", "images", "Classes", "mistakes"))


def test_sections_of_a_task_and_of_two(tmp_path, monkeypatch):
    """A task's own section; beside a run of another task, each section has its task's name."""
    from types import ModuleType

    from operate.report import page as module
    from train.task_registry import find
    from train.tasks.report import Section, Table, templates, text

    def report_sections(runs):
        macros = templates(tmp_path).get_template("macros.html.j2").module
        rows = [[run.name, worst] for run in runs for worst in run.details["model"]["worst"]]
        return [Section("worst", "Worst", macros.table(Table(text("run", "worst"), rows)))]

    toy = ModuleType("toy")
    toy.report_sections = report_sections
    monkeypatch.setattr(module, "find", lambda name: toy if name == "toy" else find(name))
    first, second = other_task(tmp_path / "first", "toy"), other_task(tmp_path / "second", "classification")
    shutil.rmtree(second / "evaluations")
    alone = html(first)
    assert '<section id="worst"><h2>Worst</h2>' in alone and "&lt;u&gt;" in alone and "<u>" not in alone
    both = html(first, second)
    assert '<section id="toy-worst"><h2>toy: Worst</h2>' in both
    assert '<section id="classification-classes"><h2>classification: Classes</h2>' in both
    assert both.count("No evaluation has been recorded yet.") == 2
