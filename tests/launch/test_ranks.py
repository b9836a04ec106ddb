"""Ranks from SLURM's variables; on real steps: test_slurm.py."""

import pytest

from launch.ranks import first_host, master_port, slurm_ranks, tasks_per_node

# Of task 5 of a step of 6 on three nodes, as srun sets it.
STEP = {
    "SLURM_JOB_ID": "1234",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "6",
    "SLURM_STEP_TASKS_PER_NODE": "3,2,1",
    "SLURM_STEP_NODELIST": "gpu[07-08,11]",
    "SLURM_PROCID": "4",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
}


def test_a_task_of_a_step():
    ranks = slurm_ranks(STEP)
    port = ranks.pop("MASTER_PORT")
    assert ranks == {"RANK": "4", "WORLD_SIZE": "6", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "gpu07"}
    assert slurm_ranks(STEP | {"SLURM_PROCID": "0", "SLURM_NODEID": "0"})["MASTER_PORT"] == port
    assert slurm_ranks(STEP | {"SLURM_RESTART_COUNT": "1"})["MASTER_PORT"] != port


@pytest.mark.parametrize(
    "change",
    [
        {"RANK": "0"},  # deepspeed or torchrun, started by srun
        {"SLURM_STEP_ID": ""},  # a batch script, salloc
        {"SLURM_STEP_ID": "4294967290"},  # salloc where SLURM makes a step of its shell
        {"SLURM_STEP_ID": "interactive"},
        {"SLURM_STEP_NUM_TASKS": "1"},
        {"SLURM_PTY_PORT": "40000"},  # srun --pty bash
    ],
)
def test_elsewhere_nothing_is_adopted(change):
    assert slurm_ranks(STEP | change) == {}


def test_a_task_that_sees_one_gpu_uses_that():
    assert slurm_ranks(STEP | {"CUDA_VISIBLE_DEVICES": "3"})["LOCAL_RANK"] == "0"
    assert slurm_ranks(STEP | {"CUDA_VISIBLE_DEVICES": "0,1,2"})["LOCAL_RANK"] == "1"


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("n1", "n1"),
        ("n[1-2]", "n1"),
        ("gpu[007-009,012],cpu1", "gpu007"),
        ("login,gpu[1-2]", "login"),
        ("rack[2-3]n[01,04]-ib", "rack2n01-ib"),
    ],
)
def test_first_host(nodes, host):
    assert first_host(nodes) == host


def test_tasks_per_node():
    assert tasks_per_node("8") == [8]
    assert tasks_per_node("2(x3),1") == [2, 2, 2, 1]


def test_jobs_that_run_at_the_same_time_have_different_ports():
    ports = [master_port(job, 0, 0) for job in range(50_000, 60_000)]
    assert len(set(ports)) == len(ports)
    assert min(ports) >= 10000 and max(ports) < 29999
