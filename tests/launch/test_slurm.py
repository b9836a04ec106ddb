"""Training with launch/submit.py on a real SLURM cluster of two nodes (tests/launch/slurm.py), with faults."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.launch.slurm import HEAD, NODES, Cluster, missing
from tests.oracle import assert_same_state, ids_by_step, state
from tests.runs import ROOT, losses, metrics

pytestmark = [pytest.mark.slow, pytest.mark.skipif(missing() is not None, reason=f"no SLURM: {missing()}")]

STEPS = 64
# A step every 8 steps is an epoch's last; a checkpoint every 7 leaves steps to be taken again after a crash.
SETTINGS = ["train.epochs=8", "train.evaluate_every=4", "checkpoint.every_steps=7", "guard.grace=15"]
# On one node; a rank whose peer was killed before they have met leaves after the grace.
TWO_TASKS = ["--gpus-per-node=0", "--tasks-per-node=2", "guard.grace=3"]
TRAIN = [sys.executable, str(ROOT / "launch" / "train.py")]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    cluster = Cluster(tmp_path_factory.mktemp("slurm") / "cluster")
    yield cluster
    cluster.close()


@pytest.fixture(scope="module")
def whole(cluster, tiny_config, tmp_path_factory):
    """An undisturbed run, started by hand: `srun python launch/train.py`, with a rank on each of two nodes."""
    output = tmp_path_factory.mktemp("whole")
    cluster.run(
        "srun",
        "--nodes=2",
        "--ntasks-per-node=1",
        *TRAIN,
        "--config",
        str(tiny_config),
        "--output",
        str(output),
        *SETTINGS,
    )
    assert [event["world_size"] for event in metrics(output, "event") if event["event"] == "start"] == [2]
    return output


def submit(cluster: Cluster, config: Path, output: Path | str, *arguments: str, **options) -> str:
    """Submit a job and return its number, with fewer cores per rank than the default, which the nodes do not have."""
    command = [
        sys.executable,
        str(ROOT / "launch" / "submit.py"),
        "--config",
        str(config),
        "--output",
        str(output),
        "--cpus-per-task=1",
    ]
    command += arguments
    said = cluster.run(*command, **options)
    return re.match(r"job (\d+)\n", said)[1]


def log(output: Path) -> str:
    return "\n".join(f"--- {path.name}\n{path.read_text()}" for path in sorted((output / "logs").iterdir()))


def hold(cluster: Cluster, job: str, output: Path, step: int, world: int = 2) -> list[int]:
    """Stop all ranks (SIGSTOP) after `step` and return their processes: a step is shorter than injecting a fault.

    SLURM sends SIGCONT before any signal of its own.
    """
    path = output / "metrics.jsonl"
    seen = path.stat().st_size if path.exists() else 0
    deadline = time.monotonic() + 120
    while not any(line["step"] >= step for line in _train_lines(path, seen)):
        assert time.monotonic() < deadline, f"step {step} has not come:\n{cluster.run('squeue')}\n{log(output)}"
        time.sleep(0.01)
    ranks = [cluster.rank(job, rank) for rank in range(world)]
    for rank in ranks:
        os.kill(rank, signal.SIGSTOP)
    last = max(line["step"] for line in metrics(output, "train"))
    assert last < STEPS, f"stopped too late, at {last}"
    return ranks


def _train_lines(path: Path, start: int) -> list[dict]:
    """Complete training lines of metrics.jsonl from a position on."""
    if not path.exists():
        return []
    content = path.read_bytes()[start:]
    lines = [json.loads(line) for line in content.splitlines(keepends=True) if line.endswith(b"\n")]
    return [line for line in lines if line["kind"] == "train"]


def test_every_fault_in_one_run(cluster, whole, tiny_config, tmp_path):
    """A rank is killed, the job requeued, preempted and out of time, a node lost: weights equal those of `whole`."""
    output = tmp_path / "run"
    job = submit(
        cluster,
        tiny_config,
        output,
        "--nodes",
        "2",
        "--gpus-per-node",
        "0",
        "--tasks-per-node",
        "1",
        "--time",
        "3",
        *SETTINGS,
    )

    def restarted(times: int) -> None:
        cluster.wait(f"restart {times}", lambda: cluster.job(job).restarts == times or cluster.ended(job))
        assert cluster.job(job).restarts == times, log(output)

    ranks = hold(cluster, job, output, 5)
    os.kill(ranks[1], signal.SIGKILL)
    os.kill(ranks[0], signal.SIGCONT)
    restarted(1)

    hold(cluster, job, output, 15)
    cluster.run("scontrol", "requeue", job)
    restarted(2)

    hold(cluster, job, output, 25)
    urgent = [
        "sbatch",
        "--parsable",
        "--partition=high",
        "--nodes=2",
        "--exclusive",
        "--output=/dev/null",
        "--wrap=true",
    ]
    urgent = cluster.run(*urgent).strip()
    cluster.wait("the end of the other job", lambda: cluster.ended(urgent))
    restarted(3)

    hold(cluster, job, output, 35)
    cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=1")
    restarted(4)
    cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=3")

    ranks = hold(cluster, job, output, 45)
    cluster.kill_slurmd("n2")
    cluster.wait("the loss of the node", lambda: cluster.job(job).restarts == 5)
    os.kill(ranks[1], signal.SIGCONT)
    cluster.start_slurmd("n2")
    cluster.wait("the end", lambda: cluster.ended(job))

    info = cluster.job(job)
    assert (info.state, info.exit_code, info.restarts) == ("COMPLETED", "0:0", 5), log(output)
    resumed = [event["lost_steps"] for event in metrics(output, "event") if event["event"] == "resume"]
    assert resumed == [0, 0, 0, 0]  # but for the killed rank, everybody had time to save
    assert losses(output) == losses(whole)
    assert sorted(losses(output)) == list(range(1, STEPS + 1))
    assert_same_state(state(output, STEPS), state(whole, STEPS))
    assert ids_by_step(output, 2) == ids_by_step(whole, 2)


def test_nobody_restarts_a_run_that_does_not_come_forward(cluster, tiny_config, tmp_path):
    job = submit(cluster, tiny_config, tmp_path / "run", *TWO_TASKS, "--max-restarts=1")
    for restart in range(2):
        cluster.wait(
            "the start",
            lambda restart=restart: cluster.job(job).state == "RUNNING" and cluster.job(job).restarts == restart,
        )
        cluster.wait("its ranks", lambda: cluster.has_rank(job, 0))
        os.kill(cluster.rank(job, 0), signal.SIGKILL)
    cluster.wait("the end", lambda: cluster.ended(job))
    assert cluster.job(job).restarts == 1
    assert "no newer checkpoint than the beginning after 1 restarts" in log(tmp_path / "run")


def test_a_cancelled_job_stays_cancelled(cluster, tiny_config, tmp_path):
    job = submit(cluster, tiny_config, tmp_path / "run", *TWO_TASKS)
    cluster.wait("its ranks", lambda: cluster.has_rank(job, 0))
    cluster.run("scancel", job)
    cluster.wait("the end", lambda: cluster.ended(job))
    assert (cluster.job(job).state, cluster.job(job).restarts) == ("CANCELLED", 0)
    assert "it was cancelled" in log(tmp_path / "run")


@pytest.mark.parametrize("spoilt", [["n2"], ["n1", "n2"]])
def test_a_cache_folder_that_cannot_be_used(cluster, tiny_config, tmp_path, spoilt):
    """On one of two nodes: the job is requeued, because SLURM may assign other nodes. On both: it ends with 78."""
    output, cache = tmp_path / "run", tmp_path / "cache"
    cache.mkdir()
    for node in spoilt:
        cluster.kill_slurmd(node)
        cluster.start_slurmd(node, f"mount -t tmpfs -o ro tmpfs {cache}")
    try:
        cluster.wait(
            "idle nodes", lambda: cluster.run("sinfo", "-h", "-p", "low", "-t", "idle", "-o", "%D").strip() == "2"
        )
        arguments = ["--nodes=2", "--gpus-per-node=0", "--tasks-per-node=1", "guard.grace=3", f"data.cache_dir={cache}"]
        job = submit(cluster, tiny_config, output, *arguments)
        cluster.wait("the end of a start", lambda: cluster.ended(job) or cluster.job(job).restarts)
        info, sentence = cluster.job(job), f"data.cache_dir {cache} cannot be used: Read-only file system"
        cluster.run("scancel", job)
        cluster.wait("the end", lambda: cluster.ended(job))
    finally:
        for node in spoilt:
            cluster.kill_slurmd(node)
            cluster.start_slurmd(node)
    if spoilt == ["n2"]:
        assert info.restarts == 1 and f"error: rank 1: {sentence}" in (output / "logs" / "rank_1.log").read_text(), log(
            output
        )
        assert "exit code 78, on 1 of 2 nodes alone, the beginning: put back into the queue" in log(output)
    else:
        assert (info.state, info.exit_code, info.restarts) == ("FAILED", "78:0", 0), log(output)
        assert f"error: {sentence}" in (
            output / "logs" / "rank_0.log"
        ).read_text() and "exit code 78: bad configuration" in log(output)


def test_gpus_that_cannot_be_used(cluster, tiny_config, tmp_path):
    """Nobody trains on a CPU unnoticed, where SLURM has given the job GPUs."""
    start = ["env", "-u", "DS_ACCELERATOR", "srun", "--gpus-per-node=1", *TRAIN, "train.max_steps=1"]
    result = cluster.execute(*start, "--config", str(tiny_config), "--output", str(tmp_path / "run"))
    assert result.returncode == 69 and "error: SLURM gave this job GPUs of n1, and PyTorch cannot" in result.stderr


@pytest.mark.parametrize("program", ["train", pytest.param("doctor", marks=pytest.mark.long)])
def test_nodes_whose_own_names_lead_to_loopback(cluster, tiny_config, tmp_path, program):
    """Ubuntu's "127.0.1.1 hostname": gloo would choose loopback, where other nodes cannot connect."""
    for node, address, other in (("n1", "10.0.0.2", "n2"), ("n2", "10.0.0.1", "n1")):
        hosts = tmp_path / f"hosts_{node}"
        hosts.write_text(f"127.0.0.1 localhost\n127.0.1.1 {node}\n{address} {other}\n")
    on_node = f'mount --bind {tmp_path}/hosts_$SLURMD_NODENAME /etc/hosts && exec "$@"'
    cluster.run("nsenter", "--net=/run/netns/n1", "ip", "route", "replace", "default", "via", HEAD)
    start = ["srun", "--nodes=2", "--ntasks-per-node=1", "unshare", "--mount", "sh", "-c", on_node, "sh"]
    arguments = [
        "--config",
        str(tiny_config),
        "--output",
        str(tmp_path / "run"),
        "train.max_steps=2",
        "guard.timeout.startup=40",
    ]
    cluster.run(
        *start, sys.executable, str(ROOT / "launch" / f"{program}.py"), *arguments
    )  # which asserts that it ends with 0
    assert program == "doctor" or sorted(losses(tmp_path / "run")) == [1, 2]


@pytest.mark.long
def test_a_rank_that_lives_on_at_a_lost_node(cluster, tiny_config, tmp_path):
    """The requeued job finds its folder in use and is requeued; the lost node's batch script does not interfere."""
    cluster.run(
        "srun", "--nodes=1", *TRAIN, "--config", str(tiny_config), "--output", str(tmp_path / "whole"), *SETTINGS
    )
    output = tmp_path / "run"
    job = submit(cluster, tiny_config, output, "--gpus-per-node=0", "--tasks-per-node=1", *SETTINGS)
    [old] = hold(cluster, job, output, 10, world=1)
    node = cluster.job(job).nodes
    cluster.kill_slurmd(node)
    cluster.wait("a start that finds the folder in use", lambda: cluster.job(job).restarts == 2)
    os.kill(old, signal.SIGKILL)
    cluster.start_slurmd(node)
    cluster.wait("the end", lambda: cluster.ended(job))
    assert (cluster.job(job).state, cluster.job(job).restarts) == ("COMPLETED", 2), log(output)
    said = log(output)
    assert "SLURM has requeued this job already" in said and f"is in use by a run on host {node}" in said
    assert_same_state(state(output, STEPS), state(tmp_path / "whole", STEPS))


@pytest.mark.long
def test_a_controller_that_is_away_when_a_rank_is_killed(cluster, whole, tiny_config, tmp_path):
    job = submit(cluster, tiny_config, tmp_path, "--nodes=2", "--gpus-per-node=0", "--tasks-per-node=1", *SETTINGS)
    ranks = hold(cluster, job, tmp_path, 10)
    cluster.kill_slurmctld()
    os.kill(ranks[1], signal.SIGKILL)
    os.kill(ranks[0], signal.SIGCONT)
    time.sleep(30)
    cluster.start_slurmctld()
    cluster.wait("the end", lambda: cluster.ended(job), 300)
    assert (cluster.job(job).state, cluster.job(job).restarts) == ("COMPLETED", 1), log(tmp_path)
    assert_same_state(state(tmp_path, STEPS), state(whole, STEPS))


HOSTILE = "$(touch pwned) `touch pwned`; touch pwned & 'a' \"b\" -x [z] * ü # \u6771"


def test_nothing_that_was_typed_reaches_a_shell(cluster, tiny_config, tmp_path):
    """Also: seeds as a job array on stand-ins for GPUs, and bad data, which ends a job with its exit code."""
    output = tmp_path / HOSTILE
    (tmp_path / "here").mkdir()
    setup = tmp_path / "setup $(touch pwned).sh"
    setup.write_text("echo set up\n")
    arguments = [
        "--nodes=2",
        "--gpus-per-node=2",
        "--seeds=3,5",
        "--stage-in",
        "--setup",
        str(setup),
        "--env",
        f"X={HOSTILE}",
    ]
    arguments += [
        "--job-name",
        f"-{HOSTILE}",
        "--interface",
        HOSTILE,
        "--partition=low",
        f"data.path={json.dumps('/' + HOSTILE)}",
    ]
    job = submit(cluster, tiny_config, output, *arguments, env={"TMPDIR": str(tmp_path)}, cwd=tmp_path / "here")
    for seed in (3, 5):
        cluster.wait("the end", lambda seed=seed: cluster.ended(f"{job}_{seed}"))
        info = cluster.job(f"{job}_{seed}")
        folder = output / f"seed_{seed}"
        assert (info.state, info.exit_code, info.restarts) == ("FAILED", "65:0", 0), log(folder)
        assert sorted(path.name for path in (folder / "logs").glob("rank_*")) == [
            f"rank_{rank}.log" for rank in range(4)
        ]
        assert f"no dataset at /{HOSTILE}:" in (folder / "logs" / "rank_0.log").read_text()
        assert "set up" in log(folder)
    assert not list(tmp_path.rglob("pwned"))


def test_deepspeed_inside_an_allocation(cluster, whole, tiny_config, tmp_path):
    """The ranks are those of the deepspeed launcher, not SLURM's."""
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators=2", *TRAIN[1:]]
    arguments = ["--config", str(tiny_config), "--output", str(tmp_path), *SETTINGS, "train.max_steps=3"]
    cluster.run(
        "salloc", "--nodes=1", "--ntasks-per-node=2", "srun", "--ntasks=1", "--cpus-per-task=2", *launcher, *arguments
    )
    assert [event["world_size"] for event in metrics(tmp_path, "event") if event["event"] == "start"] == [2]
    assert losses(tmp_path) == pytest.approx(
        {step: loss for step, loss in losses(whole).items() if step <= 3}, rel=1e-6
    )


def test_a_cluster_ends_with_the_process_that_made_it(tmp_path):
    make = (
        "import sys, pathlib; from tests.launch.slurm import Cluster; Cluster(pathlib.Path(sys.argv[1])); "
        "print('up', flush=True); input()"
    )
    maker = subprocess.Popen(
        [sys.executable, "-c", make, str(tmp_path / "cluster")],
        cwd=ROOT,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert maker.stdout.readline() == "up\n"
    mine = lambda: [path for path in Path("/proc").glob("[0-9]*/environ") if str(tmp_path).encode() in _content(path)]  # noqa: E731
    assert len(mine()) >= 1 + len(NODES)
    maker.kill()
    maker.wait()
    deadline = time.monotonic() + 30
    while mine():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""
