"""launch/plan.py as a user types it, and a prediction compared with a real run that is really killed."""

import ctypes
import json
import os
import random
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial

import pytest

from operate.plan.simulate import simulate
from operate.plan.timeline import Timeline
from tests.runs import ROOT, metrics, run, start


def command(*arguments):
    line = [sys.executable, str(ROOT / "launch" / "plan.py"), *map(str, arguments)]
    environment = {**os.environ, "COLUMNS": "80"}
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=300, env=environment)


@pytest.fixture(scope="module")
def planned(tiny_config, tmp_path_factory):
    """A plan of two nodes: what it printed, its JSON, and its folder."""
    folder = tmp_path_factory.mktemp("plan")
    where = ["--config", tiny_config, "--nodes", 2, "--gpus-per-node", 1, "train.epochs=300", "zero.stage=2"]
    where.append("train.evaluate_every=50")  # rarer than the best checkpoints
    given = [
        "--images-per-second",
        50,
        "--node-mtbf",
        0.4,
        "--startup",
        20,
        "--requeue",
        30,
        "--checkpoint-stall",
        1,
        "--price",
        2.5,
    ]
    result = command(*where, *given, "--plot", folder / "plan.png", "--json", folder / "plan.json")
    assert result.returncode == 0, result.stderr
    return result.stdout, json.loads((folder / "plan.json").read_text()), folder


def test_guessed_and_given_numbers_are_marked(planned):
    text, plan, _ = planned
    origins = {name: entry["origin"] for name, entry in plan["assumptions"].items()}
    assert origins["startup"] == origins["node_mtbf"] == "given"
    assert origins["link_between"].startswith("GUESSED") and origins["straggler_factor"] == "GUESSED"
    assert origins["decode_rate"].startswith("measured: docs/results/data-cpu.json")
    lines = [line.split() for line in text.splitlines()]
    assert ["node", "mtbf", "0.4", "h", "given"] in lines and ["latency", "within", "5", "µs", "GUESSED"] in lines
    assert "Failures are a Poisson process" in text


def test_a_plan_fits_a_terminal_of_80_columns(planned):
    lines = planned[0].splitlines()
    assert [line for line in lines if len(line) > 80] == []
    (table,) = (number for number, line in enumerate(lines) if line.startswith("ZeRO  memory/rank "))
    rows = [line.split() for line in lines[table : table + 5]]
    assert rows[0] == "ZeRO memory/rank = weights + gradients + optimizer + activations".split()
    for row in rows[1:]:
        numbers = [float(cell) for cell in row if "." in cell]
        assert len(numbers) == 5 and numbers[0] == pytest.approx(sum(numbers[1:]), abs=0.03)


def test_the_numbers_of_a_plan(planned):
    """32 images a step on two GPUs of 50 images/s; failures every 0.2 h."""
    text, plan, folder = planned
    best, zero = plan["best interval"], plan["zero"]["2"]
    assert zero["compute"] == pytest.approx(0.32) and best["timeline"]["steps"] == 300 * (260 // 32)
    assert best["timeline"]["failure_rate"] == pytest.approx(1 / 720)
    assert (
        best["closed_form"]["failures"] > 1
        and best["closed_form"]["wall"] < plan["as configured"]["closed_form"]["wall"]
    )
    running = best["closed_form"]["wall"] - best["closed_form"]["waiting"]
    assert best["price"] == pytest.approx(2.5 * 2 * running / 3600)
    assert [point["gpus"] for point in plan["scale"]] == [
        1,
        2,
        4,
        8,
        16,
        32,
    ]  # 64 would have global batches of more than all images
    assert (folder / "plan.png").read_bytes().startswith(b"\x89PNG")


def test_plans_side_by_side(planned):
    _, plan, folder = planned
    other = json.loads(json.dumps(plan))
    other["assumptions"]["startup"]["value"] = 120
    (folder / "slow.json").write_text(json.dumps(other))
    result = command("--compare", folder / "plan.json", folder / "slow.json")
    assert result.returncode == 0, result.stderr
    lines = [line.split() for line in result.stdout.splitlines()]
    assert lines[0] == ["plan", "slow"] and ["startup", "20", "s", "120", "s"] in lines
    assert not any(line[:2] == ["link", "between"] for line in lines)  # in which they do not differ


def test_mistakes_get_one_sentence(tiny_config, tmp_path):
    where = ["--config", tiny_config, "--nodes", 1, "--gpus-per-node"]
    (tmp_path / "no.json").write_text("{}")
    for arguments, sentence in (
        ([*where, 2], "the speed of a GPU is not known: give --images-per-second"),
        ([*where, 3, "--images-per-second", 9], "3 ranks cannot share the 4 micro-batches"),
        ([*where, 2, "--images-per-second", 9, "schedule.warmup_steps=500"], "takes 500 of the run's 16 steps: lower"),
        ([*where, 2, "--bench", tmp_path / "no.json"], "measures neither the training of cat_nano, nor decoding"),
        ([*where, 2, "--calibrate", tmp_path / "nowhere"], "is not a run's folder"),
        ([*where, 2, "--images-per-second", 9, "train.micro_batch=auto"], "give train.micro_batch=N"),
        ([*where, 2, "--images-per-second", -9], "argument --images-per-second"),
        ([*where, 2, "--json", tmp_path / "no/plan.json"], "no/plan.json cannot be written (No such file"),
        ([*where, 2, "--images-per-second", 9, "--plot", tmp_path / "plan.txt"], "give it a name that ends in .png"),
        (["--nodes", 2], "needs --config"),
        (["--compare", tmp_path / "no.json"], "is not a plan"),
    ):
        result = command(*arguments)
        assert result.returncode == 78, (arguments, result.stderr)
        assert result.stderr.startswith("error: ") and sentence in result.stderr and result.stderr.count("\n") == 1, (
            result.stderr
        )


# --- a prediction, compared with a real run ---

WAIT = 3.0  # seconds from a kill to the next start, as a scheduler takes them
CALIBRATION = ["train.epochs=15", "train.evaluate_every=5", "checkpoint.every_steps=20"]
PREDICTED = ["train.epochs=25", "train.evaluate_every=8", "checkpoint.every_steps=40"]
BOTH = ["train.log_every=5", "monitor.record_samples=false"]
CLONE_NEWNET = 0x40000000


def enter(network, rank):
    """Move to the network namespace, in a rank's process while it has one thread."""
    with open(f"/run/netns/{network}") as file:
        assert ctypes.CDLL(None, use_errno=True).setns(file.fileno(), CLONE_NEWNET) == 0, os.strerror(
            ctypes.get_errno()
        )


@pytest.fixture
def slow_network():
    """Move a rank's process into a network of 20 Mbit/s: a step takes as long as its bytes on busy cores, too."""
    name = f"plan{os.getpid()}"
    if os.geteuid() or subprocess.run(["ip", "netns", "add", name], capture_output=True).returncode:
        pytest.skip("needs root, and iproute2: makes a network namespace")
    try:
        for line in ("ip link set lo mtu 1500 up", "tc qdisc add dev lo root tbf rate 20mbit burst 32kb latency 10s"):
            subprocess.run(["ip", "netns", "exec", name, *line.split()], check=True)
        yield partial(enter, name)
    finally:
        subprocess.run(["ip", "netns", "del", name], check=True)


def run_with_kills(config, output, kills, *settings, before):
    """Train on two ranks, killed with -9 at each of the steps `kills` and started again; returns its seconds."""
    began = time.monotonic()
    for step in kills:
        job = start(config, output, *settings, world=2, before=before)
        while not any(line["step"] >= step for line in metrics(output, "train", missing_ok=True)):
            assert all(process.is_alive() for process in job.processes), job.text()
            time.sleep(0.1)
        job.kill()
        time.sleep(WAIT)
    run(config, output, *settings, world=2, before=before)
    return time.monotonic() - began


@pytest.mark.long
@pytest.mark.parametrize("seed", [1, 2, 3, 4, 5])
def test_a_calibrated_plan_predicts_the_wall_time_of_a_run_that_is_killed(
    tiny_config, slow_network, tmp_path, seed, record_property
):
    """It is calibrated on another run, which was killed at other steps, and made before this one begins."""
    run(
        tiny_config, tmp_path / "warm", "train.max_steps=2", world=2, before=slow_network
    )  # or the first start would read its libraries from the disk
    first, second = tmp_path / "first", tmp_path / "second"
    run_with_kills(tiny_config, first, [30, 70], *CALIBRATION, *BOTH, before=slow_network)
    where = ["--config", tiny_config, "--nodes", 1, "--gpus-per-node", 2, "--calibrate", first, *PREDICTED, *BOTH]
    result = command(*where, "--json", tmp_path / "plan.json")
    assert result.returncode == 0, result.stderr
    timeline = Timeline(**json.loads((tmp_path / "plan.json").read_text())["as configured"]["timeline"])

    kills, moments = sorted(random.Random(seed).sample(range(10, 200, 20), 4)), []
    for step in kills:  # when the plan has it there
        moments.append(simulate(replace(timeline, steps=step), 0, moments).wall)
    predicted = simulate(timeline, 0, moments)
    took = run_with_kills(tiny_config, second, kills, *PREDICTED, *BOTH, before=slow_network)
    beside = command(*where, "--against", second).stdout
    print(beside[beside.index("prediction and reality") :])
    record_property("killed at steps", kills)
    record_property("predicted, seconds", round(predicted.wall, 1))
    record_property("took, seconds", round(took, 1))
    record_property("off by", f"{100 * (predicted.wall / took - 1):+.1f} %")
    assert predicted.failures == len(kills)
    assert predicted.wall == pytest.approx(took, rel=0.10)
