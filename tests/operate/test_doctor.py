"""The doctor without a cluster: the ranks of one machine, a rank that dies, and made-up findings of many nodes."""

import json
import os
import resource
import signal
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from data_pipeline.grouped_order import GroupedOrder
from data_pipeline.manifest import open_manifest
from operate.doctor import files
from operate.doctor.assess import assess
from operate.doctor.findings import GREEN, RED, YELLOW, Findings, Line, one_micro_batch
from operate.doctor.meeting import Meeting
from operate.doctor.network import schedule
from operate.doctor.training_step import needed_bytes
from operate.task_model import meta_model, task_of
from tests.runs import start_command
from train.checkpoint.resume_point import Resume
from train.config import ConfigError, load_config
from train.engine.runtime import Runtime
from train.tasks.base import build_task


@dataclass(frozen=True)
class FewFiles:
    """Rank `rank` may open 400 files."""

    rank: int

    def __call__(self, rank: int) -> None:
        if rank == self.rank:
            resource.setrlimit(resource.RLIMIT_NOFILE, (400, 400))


@dataclass(frozen=True)
class KillBefore:
    """Rank `rank` is killed with -9 when it comes to the check `check`."""

    rank: int
    check: str

    def __call__(self, rank: int) -> None:
        if rank != self.rank:
            return
        from operate.doctor.checks import Checks

        setattr(Checks, self.check, lambda checks: os.kill(os.getpid(), signal.SIGKILL))


def doctor(config, folder, *arguments, world=2, before=None):
    job = start_command(
        "doctor",
        folder,
        "--config",
        str(config),
        "--json",
        str(folder / "found.json"),
        *arguments,
        world=world,
        before=before,
    )
    codes = job.wait()
    return json.loads((folder / "found.json").read_text()), codes, job.text()


def reds(lines) -> dict[str, str]:
    return {line["check"]: line["says"] for line in lines if line["status"] == "red"}


@pytest.mark.slow
def test_few_files_and_a_full_page(tiny_config, tmp_path):
    """A limit of one of two ranks is the only red line; rank 0 exits with 78."""
    found, codes, text = doctor(tiny_config, tmp_path, before=FewFiles(1))
    assert codes == [78, 0], text
    assert (
        list(reds(found["lines"])) == ["open files"] and "(rank 1): 400 allowed" in reds(found["lines"])["open files"]
    )
    assert "raise the hard limit" in text and "RED: 1 red" in text
    assert found["ranks"][1]["step"]["value"]["peak"] > 0


@pytest.mark.slow
def test_a_rank_that_dies_is_named(tiny_config, tmp_path):
    """Killed while it decodes: no check waits for it for long, and its missing results are not green."""
    found, codes, text = doctor(tiny_config, tmp_path, before=KillBefore(1, "decoding"))
    assert codes == [78, -9], text
    red = reds(found["lines"])
    assert "(rank 1) left before the end" in red["nodes"] and list(red) == ["nodes"]
    status = {line["check"]: line["status"] for line in found["lines"]}
    assert status["network"] == status["links"] == status["step"] == "yellow"


@dataclass(frozen=True)
class FreezeIn:
    """Rank `rank` is stopped when it comes to `check`, whose limit becomes ten seconds."""

    rank: int
    check: str

    def __call__(self, rank: int) -> None:
        from operate.doctor import checks

        checks.LIMITS[self.check] = 10
        if rank == self.rank:
            setattr(checks.Checks, self.check, lambda _: os.kill(os.getpid(), signal.SIGSTOP))


@pytest.mark.long
@pytest.mark.parametrize("check", ["network", "step"])
def test_a_rank_that_hangs_in_a_collective(tiny_config, tmp_path, check):
    job = start_command(
        "doctor",
        tmp_path,
        "--config",
        str(tiny_config),
        "--json",
        str(tmp_path / "found.json"),
        world=2,
        before=FreezeIn(1, check),
    )
    assert job.wait_for_death(0) == 78
    red = reds(json.loads((tmp_path / "found.json").read_text())["lines"])
    assert set(red) == {"nodes", check} and "(rank 1) left" in red["nodes"] and "no end within 10 s" in red[check]


def findings(config, hosts: list[str], facts: dict[int, dict], **options) -> Findings:
    meeting = Meeting(0, len(hosts), None, tuple(hosts), ())
    found = {rank: {check: {"value": value} for check, value in one.items()} for rank, one in facts.items()}
    return Findings(config, meeting, found, options.get("checkpoint", 10**9), options.get("gpu_rate"))


def red_lines(found: Findings) -> dict[str, str]:
    return {line.check: line.says for line in assess(found) if line.status == RED}


@pytest.fixture(scope="module")
def config(tiny_config):
    return load_config(tiny_config)


def config_check(config, folder, hosts: list[str], manifest) -> dict:
    """The result of the check "config" on the first rank."""
    from operate.doctor.checks import Checks

    checks = Checks(
        config, folder, Resume.decide(folder, "auto", False), Meeting(0, len(hosts), None, tuple(hosts), ())
    )
    checks.manifest = manifest
    return checks.config()


@pytest.mark.parametrize(
    ("override", "ranks", "sentence"),
    [
        ("train.global_batch=512", 2, "260 samples, fewer than one global_batch of 512: set a smaller train.global_ba"),
        ("schedule.warmup_steps=500", 2, "the warm-up takes 500 of the run's 16 steps: lower schedule.warmup_steps"),
        ("model.init_from=missing", 2, "model.init_from: there is no missing"),
        ("train.seed=1", 3, "3 ranks cannot share the 4 micro-batches"),
        pytest.param(
            *("train.cuda_graphs=true", 2, "train.cuda_graphs=true needs a GPU"),
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_what_a_start_would_refuse_is_red(tiny_config, tiny_dataset, tmp_path, monkeypatch, override, ranks, sentence):
    monkeypatch.setenv("LOCAL_RANK", "0")
    config, hosts = load_config(tiny_config, [override]), ["n1", "n2", "n3"][:ranks]
    with pytest.raises(ConfigError, match=sentence) as raised:
        config_check(config, tmp_path, hosts, open_manifest(tiny_dataset))
    found = findings(config, hosts, {rank: {} for rank in range(ranks)})
    found.facts[1]["config"] = {"error": str(raised.value)}
    (line,) = (line for line in assess(found) if line.status == RED)
    assert line.check == "config" and line.says == f"n2: {raised.value}" and line.remedy


def test_what_a_start_would_accept_is_green(config, tiny_dataset, tmp_path, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    line = Line("config", GREEN, "16 steps of 32 samples, 4 of them of the warm-up")
    value = config_check(config, tmp_path, ["n1", "n2"], open_manifest(tiny_dataset))
    missing = config_check(config, tmp_path, ["n1", "n2"], None)
    assert line in assess(findings(config, ["n1", "n2"], {0: {"config": missing}, 1: {"config": value}}))
    alone = assess(findings(config, ["n1"], {0: {"config": missing}}))
    assert [found.status for found in alone if found.check == "config"] == [YELLOW]


def test_the_estimate_of_memory_counts_what_graphs_keep(tiny_config):
    """Another copy of the gradients, although the doctor's own step is neither compiled nor replayed."""
    found = []
    for graphs in ("auto", "false"):
        settings = ["train.compile=true", f"train.cuda_graphs={graphs}", "train.precision=bf16"]
        task = task_of(one_micro_batch(load_config(tiny_config, settings)))
        found.append(needed_bytes(task, meta_model(task), Runtime(0, 1, 0, torch.device("cuda"))))
    with_graphs, without = found
    assert with_graphs == {**without, "gradients": without["gradients"] + without["weights"]}


def test_decoding_is_measured_where_few_images_are_portraits(tiny_config, tiny_dataset, monkeypatch):
    """Fewer than the 64 that are decoded at a time, but enough for the run's micro-batches of 8."""

    def order(config, split, *sizes):
        return GroupedOrder(sizes[0], split.samples, *sizes[1:], portrait=np.arange(split.samples) < 9)

    monkeypatch.setattr("train.tasks.classification.order", order, raising=False)
    config, split = load_config(tiny_config), open_manifest(tiny_dataset).split("train")
    assert files.decoding(config.data, build_task(config, [""] * 10), split, 0)["images_per_second"] > 0


def rates(hosts: list[str], slow: dict[tuple[int, int], float]) -> dict[int, dict]:
    ranks = range(len(hosts))

    def links(a: int) -> list[dict]:
        return [{"to": b, "bytes_per_second": slow.get((a, b), 1e10), "latency": 1e-5} for b in ranks if b != a]

    return {rank: {"links": {"links": links(rank)}} for rank in ranks}


def test_a_slow_node_and_a_slow_link_among_eight(config):
    hosts = [f"n{number}" for number in range(8)]
    assert red_lines(findings(config, hosts, rates(hosts, {(2, 5): 1e9})))["links"].startswith("n2 to n5: 1 GB/s where")
    node = {(a, b): 1e9 for a in range(8) for b in range(8) if a != b and 6 in (a, b)}
    assert red_lines(findings(config, hosts, rates(hosts, node)))["links"].startswith("n6 is slow: 14 of its 14 links")
    assert "links" not in red_lines(findings(config, hosts, rates(hosts, {(2, 5): 5e9})))


def test_a_link_without_another_is_not_compared(config):
    """Rank 1 died after the links had been measured."""
    found = findings(config, ["n1", "n2"], rates(["n1", "n2"], {}))
    del found.facts[1]
    assert list(red_lines(found)) == ["nodes"]


def test_a_clock_that_is_off_is_named(config):
    hosts = ["n1", "n2", "n3"]
    facts = {
        rank: {"network": {"clocks": [1e9 + step + 90 * (rank == 2) for step in range(5)], "all_reduce": None}}
        for rank in range(3)
    }
    for one in facts.values():
        one["network"]["all_reduce"] = {"latency": 1e-4, "bytes": 2**20, "seconds": 1e-3}
    assert red_lines(findings(config, hosts, facts))["clocks"].startswith("n3: up to 90.0 s")


def test_more_nodes_than_a_line_can_name(config):
    hosts = [f"n{number}" for number in range(20)]
    disk = {"folder": "/x", "free": 10**12, "held": 0, "same": True, "bytes_per_second": 1e6}
    assert red_lines(findings(config, hosts, {rank: {"disk": disk} for rank in range(20)}))["disk"].startswith(
        "n0, n1, n2, n3 and 16 more: "
    )


def test_space_for_all_checkpoints_is_needed_less_what_is_there(config):
    hosts, disk = ["n1"], {"folder": "/x", "free": 4 * 10**9, "held": 0, "same": True, "bytes_per_second": 1e9}
    assert "space" in red_lines(
        findings(config, hosts, {0: {"disk": disk}})
    )  # 3 to keep, the best, the one in writing: 5 GB
    assert "space" not in red_lines(findings(config, hosts, {0: {"disk": {**disk, "held": 10**9}}}))


@pytest.mark.parametrize("nodes", [1, 2, 5, 8])
def test_every_pair_is_measured_once_and_no_rank_twice_in_a_round(nodes):
    pairs = schedule(list(range(nodes)))
    assert sorted(tuple(sorted(pair)) for pair in pairs) == [(a, b) for a in range(nodes) for b in range(a + 1, nodes)]
    for start in range(0, len(pairs), max(1, nodes // 2)):
        ranks = [rank for pair in pairs[start : start + nodes // 2] for rank in pair]
        assert len(ranks) == len(set(ranks))


def test_checkpoints_that_were_set_aside_give_no_room(tmp_path):
    """The run never removes them."""
    for name in ("step_00000008", "superseded_step_00000004"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        (tmp_path / "checkpoints" / name / "shard_00000.safetensors").write_bytes(bytes(1000))
    assert files.disk(tmp_path, 1, "")["held"] == 1000
