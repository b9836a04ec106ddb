"""launch/doctor.py on the two-node SLURM of tests/launch/slurm.py: real faults are named, healthy nodes are green."""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch.slurm import THROTTLE, Cluster, missing
from tests.launch.test_slurm import log, submit
from tests.runs import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.skipif(missing() is not None, reason=f"no SLURM: {missing()}")]

# Runs its arguments in a mount namespace of their own: on the first node after $1, on the second after $2.
ON_NODE = """\
[ "$SLURM_NODEID" = 0 ] && prepare=$1 || prepare=$2
shift 2
exec unshare --mount sh -c "$prepare"' && exec "$@"' sh "$@"
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    cluster = Cluster(tmp_path_factory.mktemp("doctor") / "cluster")
    yield cluster
    cluster.close()


@pytest.fixture(scope="module")
def other_einops(tmp_path_factory):
    """A folder of packages with an older einops, from the registry that `make setup` has its packages from."""
    folder = tmp_path_factory.mktemp("packages")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", f"--target={folder}", "einops==0.8.1"]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        pytest.skip(f"another version of a library cannot be installed: {result.stderr[-200:]}")
    return folder


def doctor(
    cluster: Cluster, config: Path, output: Path, *arguments: str, prepare: str = "true", first: str = "true"
) -> tuple[dict, str, int]:
    """Run the doctor; returns its JSON, its output and its exit code. prepare: shell that spoils the second node.

    first: shell for the first node.
    """
    output.mkdir(exist_ok=True)
    report = output.with_suffix(".json")
    command = ["srun", "--nodes=2", "--ntasks-per-node=1", "sh", "-c", ON_NODE, "sh", first, prepare, sys.executable]
    command += [
        str(ROOT / "launch" / "doctor.py"),
        "--config",
        str(config),
        "--output",
        str(output),
        "--json",
        str(report),
    ]
    result = cluster.execute(*command, *arguments)
    assert report.exists(), f"{result.stdout}{result.stderr}\n{cluster.log()}"
    return json.loads(report.read_text()), result.stdout + result.stderr, result.returncode


def reds(found: dict) -> dict[str, str]:
    return {line["check"]: line["says"] for line in found["lines"] if line["status"] == "red"}


def test_healthy_nodes_are_green_and_the_job_goes_on(cluster, tiny_config, tmp_path):
    """With one rank on each of two nodes; also the order of the page's lines."""
    output = tmp_path / "run"
    job = submit(cluster, tiny_config, output, "--nodes=2", "--gpus-per-node=0", "--tasks-per-node=1", "--doctor")
    trains = lambda: (output / "logs" / "rank_1.log").exists()  # noqa: E731
    cluster.wait("training or the end", lambda: trains() or cluster.ended(job) or cluster.job(job).restarts, 240)
    assert trains(), log(output)
    cluster.run("scancel", job)
    found = json.loads((output / "doctor.json").read_text())
    assert found["verdict"] == "green" and not [line for line in found["lines"] if line["status"] != "green"], log(
        output
    )
    checks = [
        "nodes",
        "devices",
        "versions",
        "open files",
        "disk",
        "space",
        "dataset",
        "config",
        "decoding",
        "clocks",
        "all-reduce",
        "links",
    ]
    assert [line["check"] for line in found["lines"]] == [*checks, "memory", "step"]
    assert [rank["host"] for rank in found["ranks"]] == ["n1", "n2"]
    assert "GREEN: 14 green" in log(output)
    assert not list(output.glob("**/.doctor*"))


def without_a_shard(dataset: Path, folder: Path) -> str:
    """Shell that removes a shard of the dataset in its mount namespace."""
    shard = sorted(dataset.glob("train*.tar"))[0].name
    return f"cp -r {dataset} {folder}/copy && rm {folder}/copy/{shard} && mount --bind {folder}/copy {dataset}"


@pytest.mark.skipif(
    not THROTTLE.exists(), reason="the kernel cannot slow down a disk: no control group blkio of version 1"
)
def test_a_spoilt_second_node(cluster, tiny_config, tiny_dataset, other_einops, tmp_path):
    """Another version of a library, a missing shard, a slow link and a slow disk: one run finds all of them."""
    output = tmp_path / "run"
    output.mkdir()
    prepare = f"export PYTHONPATH={other_einops} && {without_a_shard(tiny_dataset, tmp_path)}"
    with cluster.slow_link("n2", "20mbit"), cluster.slow_disk(output, 4_000_000):
        found, text, code = doctor(cluster, tiny_config, output, prepare=prepare)
    assert code == 78, text
    red = reds(found)
    assert set(red) - {"all-reduce"} == {"versions", "dataset", "links", "disk"}, (
        text
    )  # whether that is a matter for so small a model
    assert "n2 has einops 0.8.1" in red["versions"] and red["versions"].count("has") == 2
    assert red["dataset"].startswith("n2: ") and "train-000000.tar is missing" in red["dataset"].replace("_", "-")
    assert red["links"].startswith("n2 to n1: ")
    assert "n1, n2" in red["disk"]
    assert all(line["remedy"] for line in found["lines"] if line["status"] == "red")
    assert "not fit for this run" in text


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="both nodes have this machine's only core")
def test_too_little_memory_and_too_few_cores(cluster, tiny_config, tmp_path):
    """The second node has half as many cores, and 6.5 GB of address space a rank, of which libraries take 4."""
    cores = sorted(os.sched_getaffinity(0))[:2]
    widen = f"taskset --pid --cpu-list {cores[0]},{cores[1]} $$"  # this machine's cores are shared out among the nodes
    large = ["train.micro_batch=10240", "train.global_batch=20480"]
    few = "prlimit --pid $$ --as=6500000000"
    found, text, code = doctor(
        cluster, tiny_config, tmp_path / "run", "--gpu-rate=1e6", *large, prepare=few, first=widen
    )
    assert code == 78, text
    red = reds(found)
    assert set(red) == {"devices", "config", "memory", "decoding"}, text  # the batch is larger than the dataset
    assert "n1 has 2 cores" in red["devices"] and "n2 has 1 core" in red["devices"]
    assert red["memory"].startswith("n2: ") and "The step was not tried" in red["memory"]
    assert "--cpus-per-task=" in text and "--gpu-rate" in red["decoding"]
    assert [line["check"] for line in found["lines"] if line["status"] == "yellow"] == ["all-reduce"]


def test_red_ends_the_job(cluster, tiny_config, tmp_path):
    """A full disk where the checkpoints go: no training, no requeue, and the page in the job's log."""
    output = tmp_path / "run"
    full = output / "checkpoints"
    full.mkdir(parents=True)
    cluster.run("mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(full))
    cluster.execute("dd", "if=/dev/zero", f"of={full}/something", "bs=64k")
    job = submit(cluster, tiny_config, output, "--gpus-per-node=0", "--tasks-per-node=1", "--doctor")
    cluster.wait("the end", lambda: cluster.ended(job) or cluster.job(job).restarts)
    assert (cluster.job(job).state, cluster.job(job).exit_code, cluster.job(job).restarts) == ("FAILED", "78:0", 0), (
        log(output)
    )
    assert reds(json.loads((output / "doctor.json").read_text())).keys() == {"disk"}
    text = " ".join(log(output).split())
    assert "No space left on device" in text and "remedy: make room" in text and "start 1" not in text
    assert not (output / "metrics.jsonl").exists()


def test_a_node_that_does_not_come(cluster, tiny_config, tmp_path):
    found, text, code = doctor(cluster, tiny_config, tmp_path / "run", "--wait=3", prepare="exit 0")
    assert code == 78 and list(reds(found)) == ["nodes"], text
    assert "n2 did not" in reds(found)["nodes"]
    assert {line["check"] for line in found["lines"] if line["status"] == "yellow"} >= {"network", "links", "step"}


@pytest.mark.long
@pytest.mark.parametrize("fault", ["link", "both ways", "version", "shard"])
def test_one_fault_alone_is_the_only_red(cluster, tiny_config, tiny_dataset, other_einops, tmp_path, fault):
    """If the only link is slow both ways the all-reduce is red: the gradient takes longer than the step."""
    prepare = {"version": f"export PYTHONPATH={other_einops}", "shard": without_a_shard(tiny_dataset, tmp_path)}.get(
        fault, "true"
    )
    with contextlib.ExitStack() as stack:
        for node in {"link": ["n2"], "both ways": ["n1", "n2"]}.get(fault, []):
            stack.enter_context(cluster.slow_link(node, {"link": "50mbit", "both ways": "3mbit"}[fault]))
        found, text, code = doctor(cluster, tiny_config, tmp_path / "run", prepare=prepare)
    expected = {"link": "links", "both ways": "all-reduce", "version": "versions", "shard": "dataset"}[fault]
    assert code == 78 and set(reds(found)) - ({"all-reduce"} if fault == "link" else set()) == {expected}, text
