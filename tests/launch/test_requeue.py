"""launch/requeue.py without a cluster; on a real one: test_slurm.py."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from launch.ranks import VERDICT_FILE, verdicts
from launch.requeue import JobState, Starts, Verdict, conclude, decide, find_checkpoints
from tests.launch.test_submit import script
from tests.runs import ROOT
from train.exit_codes import FAILURES, FINAL

RUNNING = JobState(0, "RUNNING", "None")
FIRST = Starts({"step_00000100": 1}, 1)


def of_all(code: int) -> Verdict:
    return Verdict(code, 1, 1)


@pytest.mark.parametrize("code", [1, 69, 71, 74, 75, 134, 137, 143])
def test_what_stopped_or_crashed_comes_back(code):
    assert decide(of_all(code), FIRST, 5, 0, RUNNING)[0]


@pytest.mark.parametrize("code", FINAL)
def test_what_is_over_does_not(code):
    assert decide(of_all(code), FIRST, 5, 0, RUNNING) == (False, FINAL[code])


def test_a_good_configuration_does_not_become_bad():
    """At a restart, 78 means that the folder is still in use by ranks on a lost node."""
    assert decide(of_all(78), FIRST, 5, 1, JobState(1, "RUNNING", "None"))[0]
    assert not decide(of_all(65), FIRST, 5, 1, JobState(1, "RUNNING", "None"))[0]


@pytest.mark.parametrize(
    ("words", "srun", "verdict", "again"),
    [
        ({78: {0, 1}}, 78, Verdict(78, 2, 2), False),
        ({78: {1}}, 78, Verdict(78, 1, 2), True),
        ({78: {1}, 75: {0}}, 143, Verdict(78, 1, 2), True),  # rank 0 was told to stop when rank 1 had left
        ({78: {1}, 1: {0}}, 78, Verdict(78, 1, 2), True),  # it has lost its neighbour
        ({65: {0, 1}, 1: {1}}, 65, Verdict(65, 2, 2), False),
        ({65: {0}, 78: {1}}, 78, Verdict(65, 1, 2), True),
        ({65: {0}, 74: {1}}, 74, Verdict(65, 1, 2), True),
        ({70: {0, 1}}, 143, Verdict(70, 2, 2), False),
        ({69: {0}}, 143, Verdict(69, 1, 2), True),
        ({74: {0, 1}}, 74, Verdict(74, 2, 2), True),
        ({0: {0}, 1: {1}}, 1, Verdict(0, 2, 2), False),
        ({}, 0, Verdict(1, 2, 2), True),  # srun could not start the ranks
        ({}, 78, Verdict(1, 2, 2), True),
        ({}, 137, Verdict(137, 2, 2), True),
        ({75: {0, 1}}, 75, Verdict(75, 2, 2), True),
    ],
)
def test_a_final_code_is_one_that_every_node_says(words, srun, verdict, again):
    assert conclude(words, 2, srun) == verdict
    assert decide(verdict, FIRST, 5, 0, RUNNING)[0] == again


def test_what_one_node_says_is_named():
    assert str(Verdict(78, 1, 2)) == "exit code 78, on 1 of 2 nodes alone" and str(Verdict(74, 1, 2)) == "exit code 74"


def test_the_words_of_two_nodes(tmp_path):
    """Reports are written by ranks and read; those of the previous start are removed."""
    program = (
        "import sys; from launch.ranks import report_verdict, wait_for_verdicts; "
        "report_verdict(int(sys.argv[1]), everywhere=len(sys.argv) > 2); wait_for_verdicts(bool)"
    )
    path = tmp_path / "logs" / "verdict"

    def word(node: int, *arguments: str) -> None:
        environment = {
            "SLURM_NODEID": str(node),
            "SLURM_STEP_NUM_NODES": "2",
            "RANK": str(node),
            VERDICT_FILE: str(path),
        }
        subprocess.run(
            [sys.executable, "-c", program, *arguments], cwd=ROOT, env={**os.environ, **environment}, check=True
        )

    path.parent.mkdir()
    word(0, "78", "for all nodes")
    assert verdicts(str(path)) == {78: {0, 1}}
    word(1, "65")
    assert verdicts(str(path)) == {65: {1}, 78: {0, 1}}
    assert begin(tmp_path, 0, 1).stdout == "0\n"
    assert verdicts(str(path)) == {}


def test_the_table_of_the_docs_is_that_of_the_code():
    rows = [
        [re.sub(r"\[(.*?)\]\(.*?\)", r"\1", cell).strip() for cell in line.strip("|\n").split("|")]
        for line in table_of_failures()
    ]
    codes = lambda failure: ", ".join(map(str, failure.codes)) or "any other, such as 137, 247, -9"  # noqa: E731
    expected = [[codes(failure), failure.what, failure.who, "yes" if failure.again else "no"] for failure in FAILURES]
    assert [row[:4] for row in rows] == expected


def table_of_failures() -> list[str]:
    lines = (ROOT / "docs" / "failures.md").read_text().splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("| exit code "))
    return [line for line in lines[first + 2 : lines.index("", first)]]


@pytest.mark.parametrize(
    ("job", "requeue"),
    [
        (JobState(0, "COMPLETING", "TimeLimit"), True),
        (JobState(0, "COMPLETING", "None"), False),  # cancelled; or preempted or requeued, which SLURM does itself
        (JobState(1, "COMPLETING", "None"), False),
        (JobState(1, "PENDING", "BeginTime"), False),
        (JobState(1, "RUNNING", "None"), False),  # runs elsewhere, while this node was lost
        (JobState(0, "CANCELLED", "None"), False),
    ],
)
def test_only_what_slurm_would_end_is_requeued(job, requeue):
    assert decide(of_all(75), FIRST, 5, 0, job)[0] == requeue


def test_restarts_without_a_newer_checkpoint_are_bounded():
    starts = Starts({}, 4)
    for restart in range(5, 8):
        starts = starts.next({}, restart)
    assert decide(of_all(1), starts, 3, 6, JobState(6, "RUNNING", "None"))[0]
    assert decide(of_all(1), starts, 3, 7, JobState(7, "RUNNING", "None")) == (
        False,
        "no newer checkpoint than the beginning after 3 restarts; see the ranks' logs",
    )
    assert starts.next({"step_00000010": 1}, 8) == Starts({"step_00000010": 1}, 8)


def test_a_new_checkpoint_is_progress_below_a_damaged_one_too(tmp_path):
    """So is one whose step was taken again; one that was removed is none."""
    folder = tmp_path / "checkpoints"
    for name in ("step_00000100", ".step_00000021.tmp", "step_00000007.bad", "step_x"):
        (folder / name).mkdir(parents=True)
    starts = Starts(find_checkpoints(tmp_path), 0)
    assert list(starts.checkpoints) == ["step_00000100"]
    starts = starts.next(find_checkpoints(tmp_path), 1)
    assert (starts.since, starts.newest) == (0, "step 100")
    os.utime(folder / "step_00000100", (1, 1))
    for seconds in (2, 3):
        (folder / "step_00000020").mkdir(exist_ok=True)
        os.utime(folder / "step_00000020", (seconds, seconds))
        starts = starts.next(find_checkpoints(tmp_path), seconds)
        assert (starts.since, starts.newest) == (seconds, "step 20")
    (folder / "step_00000100").rmdir()
    assert starts.next(find_checkpoints(tmp_path), 4).since == 3


def requeue(
    run: Path,
    restart: int,
    max_restarts: int,
    *moment: str,
    fault: Path | None = None,
    lasts=False,
    log=subprocess.PIPE,
):
    """The command that the batch script runs when job 7 starts, and when srun has ended with an exit code.

    SLURM answers that the job is running, but the first answer is empty. fault: opening this fails, once, or always if
    it `lasts`. log: its stderr.
    """
    (run / "logs").mkdir(exist_ok=True)
    commands = {
        "squeue": f"[ -e {run}/asked ] && echo '{restart}|RUNNING|None'; touch {run}/asked",
        "scontrol": f'echo "$@" >> {run}/requeued',
    }
    for name, command in commands.items():
        (run / name).write_text(f"#!/bin/sh\n{command}\n")
        (run / name).chmod(0o755)
    environment = {
        "PATH": f"{run}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "n1",
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_RESTART_COUNT": str(restart),
        VERDICT_FILE: str(run / "logs" / "verdict"),
    }
    program, count = str(ROOT / "launch" / "requeue.py"), ["--max-restarts", str(max_restarts)]
    command = [sys.executable, program, moment[0], str(run), *count, *moment[1:]]
    if fault:
        inject = "inject=openat:error=ESTALE" + ":when=1" * (not lasts)
        command = ["strace", "-qq", "-o", "/dev/null", "-e", "trace=openat", "-e", inject, "-P", str(fault), *command]
    return subprocess.run(command, env={**os.environ, **environment}, stdout=subprocess.PIPE, stderr=log, text=True)


def begin(run: Path, restart: int, max_restarts: int, **options) -> subprocess.CompletedProcess:
    return requeue(run, restart, max_restarts, "begin", **options)


def count(run: Path) -> dict:
    return json.loads((run / "logs" / "restarts_7.json").read_text())


def test_starts_are_counted(tmp_path):
    assert [begin(tmp_path, restart, 1).stdout for restart in range(3)] == ["0\n", "0\n", "1\n"]
    assert count(tmp_path) == {"checkpoints": {}, "since": 0}


def test_where_the_counter_cannot_be_written_restarts_count_from_what_it_says(tmp_path):
    """Where it says nothing, from the first one on."""
    (tmp_path / "logs" / "restarts_7.tmp").mkdir(parents=True)
    assert begin(tmp_path, 3, 3).stdout == "0\n"
    result = begin(tmp_path, 3, 2)
    assert result.stdout == "1\n" and "cannot be written" in result.stderr and "not started" in result.stderr
    (tmp_path / "logs" / "restarts_7.json").write_text('{"checkpoints": {}, "since": 20}')
    (tmp_path / "checkpoints" / "step_00000004").mkdir(parents=True)
    assert [begin(tmp_path, restart, 2).stdout for restart in (21, 22, 23)] == ["0\n", "0\n", "1\n"]


def test_a_full_disk_under_the_jobs_log_ends_no_job(tmp_path):
    with open("/dev/full", "w") as full:
        assert begin(tmp_path, 0, 1, log=full).stdout == "0\n"
        (tmp_path / "asked").touch()
        assert requeue(tmp_path, 0, 1, "end", "--code=74", log=full).stdout == "74\n"
    assert (tmp_path / "requeued").read_text() == "requeue 7\n"


@pytest.mark.skipif(shutil.which("strace") is None, reason="making system calls fail needs strace")
@pytest.mark.parametrize("name", ["logs/restarts_7.json", "checkpoints"])
def test_a_fault_of_the_file_system_that_passes_ends_no_job(tmp_path, name):
    """At the start, and when the job is to be requeued; nor does an empty answer of squeue's."""
    (tmp_path / "checkpoints" / "step_00000004").mkdir(parents=True)
    assert begin(tmp_path, 0, 1).stdout == "0\n"
    result = begin(tmp_path, 1, 1, fault=tmp_path / name)
    assert result.stdout == "0\n", result.stderr
    assert count(tmp_path)["since"] == 0
    (tmp_path / "checkpoints" / "step_00000008").mkdir()
    result = requeue(tmp_path, 1, 1, "end", "--code=137", fault=tmp_path / name)
    assert result.stdout == "137\n" and "squeue answered ''" in result.stderr, result.stderr
    assert (tmp_path / "requeued").read_text() == "requeue 7\n"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("strace") is None, reason="making system calls fail needs strace")
def test_where_nothing_can_be_counted_at_the_end_the_next_start_counts(tmp_path):
    """A run that has restarted often, as one that is preempted does, survives that its folder cannot be read."""
    result = requeue(tmp_path, 20, 1, "end", "--code=74", fault=tmp_path / "checkpoints", lasts=True)
    assert "exit code 74, checkpoints cannot be read: put back into the queue" in result.stderr
    assert (tmp_path / "requeued").read_text() == "requeue 7\n"


@pytest.mark.parametrize("text", ["", None])
def test_a_count_that_cannot_be_read_ends_no_job(tmp_path, text):
    """An empty file, as a node that lost its power may leave it; and a folder in the file's place."""
    path = tmp_path / "logs" / "restarts_7.json"
    path.mkdir(parents=True) if text is None else (path.parent.mkdir(), path.write_text(text))
    assert begin(tmp_path, 1, 1).stdout == "0\n"


def batch(
    config: Path, run: Path, fails: str, setup: str = "", logs=True, state: str = ""
) -> tuple[int, str, list[str]]:
    """Run the batch script of submit.py, with a SLURM of which only the job's own state is asked.

    fails: when Python cannot run requeue.py, as a condition of the shell, in which $n is how often it was tried. logs:
    whether the run's folder is there. state: the job's, and its comment. Returns the exit code, what the script said,
    and the commands that SLURM got.
    """
    folder = run / "bin"
    folder.mkdir(parents=True)
    (folder / "setup").write_text(setup)
    programs = {
        "python": f'n=$(wc -l < {run}/tries); echo >> {run}/tries; {fails} && exit 1; exec {sys.executable} "$@"',
        "srun": f"echo srun >> {run}/slurm; exit 137",
        "scontrol": f'echo "$@" >> {run}/slurm',
        "squeue": f"case $* in *%T*) echo '{state}';; *) echo '0|RUNNING|None';; esac",
        "sleep": "",
    }
    for name, command in programs.items():
        (folder / name).write_text(f"#!/bin/sh\n{command}\n")
        (folder / name).chmod(0o755)
    for name in ("tries", "slurm"):
        (run / name).touch()
    text = script(config, "--output", str(run), "--max-restarts=1", "--setup", str(folder / "setup"))
    if logs:
        (run / "logs").mkdir()
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1", "SLURM_JOB_NUM_NODES": "1", "SLURMD_NODENAME": "n1"}
    environment = {**os.environ, **job, "SLURM_RESTART_COUNT": "0"}
    environment["PATH"] = f"{folder}:{os.environ['PATH']}"
    text = re.sub("(?m)^python=.*$", f"python={folder}/python", text)
    result = subprocess.run(["bash", "-s"], input=text, env=environment, capture_output=True, text=True)
    log = run / "logs" / "job_7.log"
    said = log.read_text() if logs else result.stdout + result.stderr
    return result.returncode, said, (run / "slurm").read_text().splitlines()


def test_a_python_that_cannot_start_for_a_while_ends_no_job(tiny_config, tmp_path):
    code, said, slurm = batch(tiny_config, tmp_path, "[ $n -eq 0 -o $n -eq 2 ]")
    assert (code, slurm) == (137, ["srun", "requeue 7"]), said


@pytest.mark.parametrize("logs", [True, False])
@pytest.mark.parametrize(
    ("state", "failed", "requeued"),
    [("RUNNING (null)", 1, ["requeue 7"]), ("RUNNING failed starts: 1, …", 2, []), ("COMPLETING (null)", 1, [])],
)
def test_a_node_without_the_files_leads_to_another_start(tiny_config, tmp_path, logs, state, failed, requeued):
    """Those of Python, or the run's folder. At most --max-restarts times, and not if the job was cancelled."""
    code, said, slurm = batch(tiny_config, tmp_path, "true", logs=logs, state=state)
    why = f"failed starts: {failed}, the last on n1: the log, Python or the repository cannot be used"
    assert (code, slurm) == (74, [f"update JobId=7 Comment={why}", *requeued]) and why in said


def test_strict_setup_commands_do_not_end_the_script(tiny_config, tmp_path):
    code, said, slurm = batch(tiny_config, tmp_path, "false", setup="set -euo pipefail\n")
    assert (code, slurm) == (137, ["srun", "requeue 7"]), said
