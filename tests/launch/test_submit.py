"""launch/submit.py and launch/requeue.py without a cluster; on a real one: test_slurm.py."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from launch.ranks import VERDICT_FILE, verdicts
from launch.requeue import JobState, Starts, Verdict, conclude, decide, newest_step
from launch.submit import parse_minutes, parse_seeds
from tests.runs import ROOT
from train.exit_codes import FAILURES, FINAL

RUNNING = JobState(0, "RUNNING", "None")
FIRST = Starts(100, 0)


def submit(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "launch" / "submit.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env={**os.environ, **environment})


def script(config: Path, *arguments: str) -> str:
    result = submit("--config", str(config), "--dry-run", "--gpus-per-node=2", *arguments)
    assert result.returncode == 0, result.stderr
    assert subprocess.run(["bash", "-n"], input=result.stdout, text=True).returncode == 0
    return result.stdout


def test_the_options_of_a_job(tiny_config, tmp_path):
    arguments = [
        "--nodes=2",
        "--time=1-12:00:00",
        "--partition=gpu,big",
        "--account=vision",
        "--qos=high",
        "--cpus-per-task=12",
        "--mem=200G",
    ]
    text = script(
        tiny_config,
        "--output",
        str(tmp_path / "run"),
        *arguments,
        "--sbatch=--constraint=a100&nvlink",
        "guard.grace=45.5",
    )
    lines = {line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH ")}
    assert lines == {
        *(
            "--nodes=2",
            "--ntasks-per-node=2",
            "--gpus-per-node=2",
            "--cpus-per-task=12",
            "--mem=200G",
            "--time=1-12:00:00",
        ),
        *("--partition=gpu,big", "--account=vision", "--qos=high", "--constraint=a100&nvlink"),
        *("--signal=USR1@76", "--requeue", "--open-mode=append"),  # 45.5 s of grace, and 30
    }
    assert "srun --kill-on-bad-exit=1 --open-mode=append" in text and "--cpus-per-task=12 " in text
    assert not (tmp_path / "run").exists()


def test_a_dataset_that_only_the_nodes_see_is_not_checked(tiny_config, tmp_path):
    """And first weights are not needed by a run that has a checkpoint."""
    (tmp_path / "run" / "checkpoints" / "step_00000005").mkdir(parents=True)
    script(tiny_config, f"--output={tmp_path}/run", f"data.path={tmp_path}/gone", "model.init_from=gone")


def test_a_rank_gets_the_cores_that_its_config_needs(tiny_config, tmp_path):
    """One for each decoding thread and two more, in the job and in its steps."""
    text = script(tiny_config, "--output", str(tmp_path / "run"), "data.workers=7")
    assert "#SBATCH --cpus-per-task=9\n" in text and re.search(r"srun --kill-on-bad-exit=1 .* --cpus-per-task=9 ", text)


def test_where_sbatch_refuses_the_default_is_said(tiny_config, tmp_path):
    sbatch = tmp_path / "sbatch"
    sbatch.write_text("#!/bin/sh\necho 'sbatch: error: Requested node configuration is not available' >&2\nexit 1\n")
    sbatch.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    result = submit("--config", str(tiny_config), "--gpus-per-node=2", "--output", str(tmp_path / "run"), PATH=path)
    assert (
        result.returncode == 78
        and "3 cores a rank (data.workers + 2): --cpus-per-task asks for another" in result.stderr
    )


def test_the_command_in_the_script_is_the_one_that_submits_it(tiny_config, tmp_path):
    text = script(tiny_config, "--output", str(tmp_path / "a run"), "--seeds=0-2%2", "--job-name=my run")
    assert (
        f"sbatch --parsable '--job-name=my run' --chdir={os.getcwd()} "
        f"'--output={tmp_path}/a run/seed_%a/logs/job_%A_%a.log'" in text
    )
    assert "#SBATCH --array=0-2%2" in text and 'train.seed="$SLURM_ARRAY_TASK_ID"' in text


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["train.epoch=3"], "unknown key train.epoch; did you mean train.epochs?"),
        (["--nodes=3"], "6 ranks cannot share the 4 micro-batches"),
        (["train.global_batch=512"], "has 260 samples, fewer than one global_batch of 512: set a smaller train.global"),
        (["schedule.warmup_steps=500"], "the warm-up takes 500 of the run's 16 steps: lower schedule.warmup_steps"),
        (["model.init_from=missing"], "model.init_from: there is no missing; name a file of weights"),
        (["--nodes=0"], "'0' is not a whole number of at least 1"),
        (["--time=1"], "--time 1 leaves no time to train: ranks are asked to stop 90 s before its end"),
        (["--time=tomorrow"], "--time tomorrow is not a time"),
        (["--partition=a b"], "--partition 'a b': spaces, quotes"),
        (["--account=a\n#SBATCH --wrap=x"], "spaces, quotes"),
        (["--qos=a#b"], "spaces, quotes"),
        (["--sbatch=-x"], "--sbatch=-x is not an option of sbatch"),
        (["--sbatch=--comment=two words"], "spaces, quotes"),
        (["--output=a%b"], "SLURM interprets % and backslashes"),
        (["--output=a\\b"], "SLURM interprets % and backslashes"),
        (["--output=a\nb"], "control characters"),
        (["--job-name=a\nb"], "control characters"),
        (["--seeds=0-4;x"], "--seeds 0-4;x is not of the form 0-4"),
        (["--seeds=0-5000"], "more than 1000"),
        (["--env=A-B=1"], "--env A-B=1 is not of the form KEY=VALUE"),
        (["--env=A"], "--env A is not of the form KEY=VALUE"),
        (["--setup=nowhere.sh"], "--setup nowhere.sh cannot be read: No such file or directory"),
        (["--resume=nowhere"], "--resume nowhere is not a checkpoint's folder"),
        (["--resume=."], "--resume . is not a checkpoint's folder: name a run's …/checkpoints/step_N"),
        (["--resume=.", "--seeds=0-1"], "leave out --seeds"),
        (["--tasks-per-node=2"], "--tasks-per-node is for --gpus-per-node 0"),
    ],
)
def test_a_mistake_is_answered_in_one_sentence(tiny_config, arguments, sentence):
    result = submit("--config", str(tiny_config), "--gpus-per-node=2", *arguments)
    assert result.returncode == 78, result.stderr
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr
    assert sentence in result.stderr


def test_setup_that_is_not_shell(tiny_config, tmp_path):
    (tmp_path / "setup.sh").write_text("echo 'open\n")
    result = submit("--config", str(tiny_config), "--gpus-per-node=2", "--setup", str(tmp_path / "setup.sh"))
    assert result.returncode == 78 and "is not shell" in result.stderr


def test_without_sbatch_nothing_is_written(tiny_config, tmp_path):
    result = submit(
        "--config", str(tiny_config), "--gpus-per-node=2", "--output", str(tmp_path / "run"), PATH=str(tmp_path)
    )
    assert result.returncode == 78 and "there is no sbatch on this machine" in result.stderr
    assert not (tmp_path / "run").exists()


def test_resume_waits_for_the_run_to_have_a_checkpoint(tiny_config, tmp_path):
    """Run the lines of the script that choose the checkpoint; a run with checkpoints of its own is refused."""
    given, run = tmp_path / "given $(touch pwned)", tmp_path / "[r]un $(touch pwned)"
    given.mkdir()
    (given / "manifest.json").touch()
    text = script(tiny_config, "--output", str(run), "--resume", str(given))
    lines = text.splitlines()
    chosen = [line for line in lines if line.startswith(("run=", "arguments=", "ls ", "  arguments+="))] + [
        'printf "%s\\n" "${arguments[@]}"'
    ]

    def arguments() -> list[str]:
        result = subprocess.run(
            ["bash", "-c", "\n".join(chosen)], capture_output=True, text=True, cwd=tmp_path, check=True
        )
        return result.stdout.splitlines()

    assert arguments()[-2:] == ["--resume", str(given)]
    (run / "checkpoints" / "step_00000002.bad").mkdir(parents=True)  # set aside by the user
    assert arguments()[-2:] == ["--resume", str(given)]
    script(tiny_config, "--output", str(run), "--resume", str(given))
    (run / "checkpoints" / "step_00000005").mkdir()
    assert "--resume" not in arguments()
    assert not list(tmp_path.rglob("pwned"))
    result = submit("--config", str(tiny_config), "--gpus-per-node=2", "--output", str(run), "--resume", str(given))
    assert result.returncode == 78 and "has checkpoints of its own" in result.stderr


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
    assert begin(tmp_path, 0, 1).returncode == 0
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
    starts = Starts(-1, 0)
    for _ in range(3):
        starts = starts.next(-1)
    assert starts.idle == 3
    assert decide(of_all(1), starts, 3, 0, RUNNING)[0]
    assert not decide(of_all(1), starts.next(-1), 3, 0, RUNNING)[0]
    assert starts.next(10) == Starts(10, 0)


def test_newest_step_counts_whole_checkpoints(tmp_path):
    assert newest_step(tmp_path) == -1
    for name in ("step_00000007", "step_00000014", ".step_00000021.tmp", "step_x"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert newest_step(tmp_path) == 14


def requeue(run: Path, restart: int, max_restarts: int, *moment: str, fault: Path | None = None):
    """The command that the batch script runs when job 7 starts, and when srun has ended with an exit code.

    SLURM answers that the job is running, but the first answer is empty. fault: opening this fails, once.
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
        inject = "inject=openat:error=ESTALE:when=1"
        command = ["strace", "-qq", "-o", "/dev/null", "-e", "trace=openat", "-e", inject, "-P", str(fault), *command]
    return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)


def begin(run: Path, restart: int, max_restarts: int, fault: Path | None = None) -> subprocess.CompletedProcess:
    return requeue(run, restart, max_restarts, "begin", fault=fault)


def test_starts_are_counted(tmp_path):
    assert [begin(tmp_path, restart, 1).returncode for restart in range(3)] == [0, 0, 1]
    assert json.loads((tmp_path / "logs" / "restarts_7.json").read_text()) == {"step": -1, "idle": 2}


def test_where_the_counter_cannot_be_written_every_restart_counts(tmp_path):
    (tmp_path / "logs" / "restarts_7.tmp").mkdir(parents=True)
    assert begin(tmp_path, 3, 3).returncode == 0
    result = begin(tmp_path, 3, 2)
    assert result.returncode == 1 and "cannot be written" in result.stdout and "not started" in result.stdout


@pytest.mark.skipif(shutil.which("strace") is None, reason="making system calls fail needs strace")
@pytest.mark.parametrize("name", ["logs/restarts_7.json", "checkpoints"])
def test_a_fault_of_the_file_system_that_passes_ends_no_job(tmp_path, name):
    """At the start, and when the job is to be requeued; nor does an empty answer of squeue's."""
    (tmp_path / "checkpoints" / "step_00000004").mkdir(parents=True)
    assert begin(tmp_path, 0, 1).returncode == 0
    result = begin(tmp_path, 1, 1, fault=tmp_path / name)
    assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / "logs" / "restarts_7.json").read_text())["idle"] == 1
    (tmp_path / "checkpoints" / "step_00000008").mkdir()
    result = requeue(tmp_path, 1, 1, "end", "--code=137", fault=tmp_path / name)
    assert result.returncode == 137 and "squeue answered ''" in result.stdout, result.stderr
    assert (tmp_path / "requeued").read_text() == "requeue 7\n"


@pytest.mark.parametrize("text", ["", None])
def test_a_count_that_cannot_be_read_ends_no_job(tmp_path, text):
    """An empty file, as a node that lost its power may leave it; and a folder in the file's place."""
    path = tmp_path / "logs" / "restarts_7.json"
    path.mkdir(parents=True) if text is None else (path.parent.mkdir(), path.write_text(text))
    assert begin(tmp_path, 1, 1).returncode == 0


def test_forms_of_seeds_and_times():
    assert parse_seeds("0-2") == [0, 1, 2]
    assert parse_seeds("7,1-2%2") == [7, 1, 2]
    minutes = {
        "90": 90,
        "90:30": 90.5,
        "1:30:00": 90,
        "1-0": 1440,
        "1-12:30": 2190,
        "1-00:00:30": 1440.5,
        "UNLIMITED": None,
    }
    assert {text: parse_minutes(text) for text in minutes} == minutes


def test_stage_in_leaves_the_folder_to_the_cache(tiny_config, tmp_path):
    """It creates a folder of this user, and checks that no other user created it."""
    lines = [line for line in script(tiny_config, "--stage-in").splitlines() if line.startswith("arguments")]
    lines = ["run=r", *lines, 'printf "%s\\n" "${arguments[@]}"']
    for variables, folder in (([], "/tmp"), (["TMPDIR=/a b"], "/a b"), (["TMPDIR=/a", "SLURM_TMPDIR=/c"], "/c")):
        command = ["env", "-u", "TMPDIR", "-u", "SLURM_TMPDIR", *variables, "bash", "-c", "\n".join(lines)]
        result = subprocess.run(command, capture_output=True, text=True, check=True)
        assert result.stdout.splitlines()[-1] == f"data.cache_dir={folder}"
