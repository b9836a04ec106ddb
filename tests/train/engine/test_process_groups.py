"""Process groups: the timeout of collectives, and the network interface of gloo."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.runs import ROOT, run


@dataclass(frozen=True)
class WriteTimeouts:
    """Write the timeouts in seconds of all process groups when training begins, and the limit of open files."""

    path: Path

    def __call__(self, rank: int) -> None:
        import resource

        import torch
        import torch.distributed as dist

        from train.trainer import Run

        resource.setrlimit(resource.RLIMIT_NOFILE, (512, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
        go = Run.go

        def writing(run: Run) -> None:
            groups = dist.distributed_c10d._world.pg_map
            seconds = [group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for group in groups]
            (self.path / f"groups_{rank}.json").write_text(
                json.dumps([seconds, resource.getrlimit(resource.RLIMIT_NOFILE)])
            )
            go(run)

        Run.go = writing


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_the_guard_has_the_first_word(tiny_config, tmp_path, stage):
    """All groups, DeepSpeed's own included, have a timeout above the longest limit of the guard."""
    settings = [f"zero.stage={stage}", "guard.timeout.first_step=4321", "train.max_steps=1", "train.evaluate_every=0"]
    run(tiny_config, tmp_path, *settings, world=2, before=WriteTimeouts(tmp_path))
    for rank in range(2):
        seconds, (soft, hard) = json.loads((tmp_path / f"groups_{rank}.json").read_text())
        assert len(seconds) >= 2 and set(seconds) == {4321 + 120}
        assert soft == hard


NAMES = (
    "import sys; from train.engine.network_interface import interface_to; "
    "print([interface_to(host) for host in sys.argv[1:]])"
)


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("ip"), reason="a network of its own needs root and iproute2")
@pytest.mark.parametrize(
    ("route", "expected"),
    [
        (
            "ip route add default via 10.1.0.254 dev data0; ip route add default via 10.2.0.254 dev slow0 metric 9",
            ["data0"],
        ),
        ("true", [None]),
    ],
)
def test_the_interface_that_leads_to_rank_0(route, expected):
    """In a namespace with two networks, where this machine's own name resolves to loopback, as on Debian."""
    network = (
        "ip link set lo up; for name in data slow; do ip link add ${name}0 type veth peer name ${name}1;"
        "ip link set ${name}0 up; ip link set ${name}1 up; done;"
        "ip addr add 10.1.0.1/24 dev data0; ip addr add 10.2.0.1/24 dev slow0; ip addr add 10.2.0.7/24 dev slow0"
    )
    hosts = ["10.1.0.2", "10.2.0.3", "10.1.0.1", "10.2.0.7", "127.0.1.1", "no.such.host.invalid"]
    script = f"set -e; {network}; {route}; exec {sys.executable} -c '{NAMES}' {' '.join(hosts)}"
    done = subprocess.run(
        ["unshare", "--net", "bash", "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(["data0", "slow0", "data0", "slow0", *expected, None])


def test_an_interface_is_chosen_only_where_ranks_are_on_several_nodes(monkeypatch):
    from train.engine.network_interface import choose_interface

    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    for local in (None, "4"):
        monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", local) if local else monkeypatch.delenv(
            "LOCAL_WORLD_SIZE", raising=False
        )
        choose_interface()
        assert "GLOO_SOCKET_IFNAME" not in os.environ
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "mine")
    choose_interface()
    assert os.environ["GLOO_SOCKET_IFNAME"] == "mine"
