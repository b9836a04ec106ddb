"""The reader of a run's folder: what counts after restarts, and which metrics an evaluation has."""

import random

import pytest

from operate.run_folder import MetricsTail, RunLog, amount, hangs, last_beat, quantity, read_config
from train.telemetry.metrics import Metric, describe_metrics


def test_only_new_and_whole_lines_are_read(tmp_path):
    path = tmp_path / "metrics.jsonl"
    tail = MetricsTail(path)
    assert tail.read() == []
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert tail.read() == [{"step": 1}, {"step": 2}]
    with open(path, "r+b") as file:  # what has been read is not read again
        file.write(b"x" * 24)
    assert tail.read() == []
    with open(path, "a") as file:
        file.write('ep": 3}\n{"torn\n{"step": 4}\n')
    assert tail.read() == [{"step": 3}, {"step": 4}] and not tail.replaced
    path.write_text('{"step": 1}\n')
    assert tail.replaced


def test_the_lock_and_the_watchdogs_records(tmp_path):
    assert last_beat(tmp_path) is None and list(hangs(tmp_path)) == []
    (tmp_path / ".lock").write_text("")
    assert last_beat(tmp_path) is None
    (tmp_path / ".lock").write_text('{"host": "node1", "beat": 1050.5}'.ljust(511) + "\n")
    assert last_beat(tmp_path) == 1050.5
    (tmp_path / "stacks").mkdir()
    record = "1970-01-01 01:00:10 +0100 rank 0 has been 300 s in step 7.\nThread 0x1:\n  File x\n"
    (tmp_path / "stacks" / "rank_1.txt").write_text(record)
    assert list(hangs(tmp_path)) == [(10.0, "rank 0 has been 300 s in step 7.")]


def event(name, step, at, **fields):
    return {"kind": "event", "event": name, "step": step, "time": at, **fields}


def log_of(lines, **options):
    log = RunLog(**options)
    for line in lines:
        log.add(line)
    return log


def random_lines(seed):
    """Lines of a run that is killed, evaluated again at its start, and rolled back at random."""
    dice = random.Random(seed)
    lines, taken = [], 0
    for number in range(dice.randint(1, 5)):
        step = dice.randint(0, taken)
        lines.append(event("resume" if number else "start", step, len(lines)))
        for _ in range(dice.randint(0, 12)):
            if dice.random() < 0.3:
                for weights in ("model", "ema"):
                    fields = {"weights": weights, "top1": dice.random(), "seconds": 1.0}
                    lines.append({"kind": "eval", "step": step, "time": len(lines), **fields})
            if dice.random() < 0.1:
                to = dice.randint(0, step)
                lines.append(event("rollback", step, len(lines), to=to))
                step = to
            step += dice.randint(1, 3)
            taken = max(taken, step)
            lines.append({"kind": "train", "step": step, "time": len(lines), "step_ms": 1.0, "data_wait": 0.0})
    return lines


def counting(lines):
    """The train and eval lines that count, found backwards: no later line repeats one or goes back before its step."""
    kept, seen, limit = [], set(), float("inf")
    for line in reversed(lines):
        key = line["kind"], line["step"], line.get("weights")
        if line["kind"] in ("train", "eval") and line["step"] <= limit and key not in seen:
            kept.append(line)
        seen.add(key)
        if line.get("event"):
            limit = min(limit, line["to"] if line["event"] == "rollback" else line["step"])
    return kept[::-1]


def test_lines_that_are_replaced_do_not_count():
    for seed in range(300):
        lines = random_lines(seed)
        log = log_of(lines)
        found = [line.values for line in (*log.train, *log.evals) if not line.again]
        assert sorted(found, key=lambda line: line["time"]) == counting(lines), seed
        short = log_of(lines, keep_train=False)
        assert [line.values for line in short.scores()] == [line.values for line in log.scores()] and not short.train


def test_the_metrics_are_those_of_the_start_line():
    log = log_of([event("start", 0, 0.0)])
    assert [metric.name for metric in log.metrics] == ["top1", "top5", "loss"], (
        "an older run's start does not list them"
    )
    assert log.speed_unit == "img/s" and log.last is None and log.steps_per_epoch is None
    metrics = (Metric("iou", "mean IoU", "%", "higher"), Metric("loss", "loss", "", "lower"))
    described = describe_metrics(metrics)[::-1]
    log.add(event("resume", 8, 1.0, metrics=described, samples="scans", last=16, steps_per_epoch=4))
    assert log.metrics == metrics, "the primary one first"
    assert (log.samples, log.speed_unit, log.last, log.steps_per_epoch) == ("scans", "scans/s", 16, 4)


@pytest.mark.parametrize(("better", "best"), [("higher", (8, "ema")), ("lower", (4, "model"))])
def test_the_best_evaluation(better, best):
    """The first of equals, and of one step the EMA's; one that is not finite never is."""
    metric = Metric("score", "score", "", better)
    log = log_of([event("start", 0, 0.0, metrics=describe_metrics((metric,)))])
    for step, model, ema in ((4, 1.0, 2.0), (8, 3.0, 3.0), (12, 3.0, 1.0), (16, None, None)):
        for weights, score in (("model", model), ("ema", ema)):
            log.add(
                {"kind": "eval", "step": step, "weights": weights, "score": score, "seconds": 1.0, "time": float(step)}
            )
    assert (log.best().values["step"], log.best().values["weights"]) == best
    assert log.best("ema").values["step"] == (8 if better == "higher" else 12)
    assert log_of([event("start", 0, 0.0)]).best() is None


def test_values_in_words():
    assert quantity(Metric("a", "a", "%", "higher"), 70.126) == "70.13 %"
    assert (
        quantity(Metric("a", "a", "m", "lower"), 0.12345) == "0.1235 m"
        and amount(Metric("a", "a", "m", "lower"), 1) == "1.0000"
    )
    assert (
        quantity(Metric("a", "a", "", "lower"), 0.5) == "0.5000"
        and quantity(Metric("a", "a", "%", "lower"), None) == "–"
        and quantity(Metric("a", "a", "", "lower"), None) == "not finite"
    )


def test_a_config_without_its_secrets(tmp_path):
    (tmp_path / "config.yaml").write_text("data: {path: 'http://user:word@host/d'}\nguard: {timeout: {step: 3}}\n")
    config = read_config(tmp_path)
    assert config["guard.timeout.step"] == 3 and "word" not in config["data.path"] and "host/d" in config["data.path"]
