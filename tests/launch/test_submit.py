"""launch/submit.py without a cluster; on a real one: test_slurm.py."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from launch.sbatch_forms import parse_minutes, parse_seeds
from tests.runs import ROOT


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
        *("--signal=USR1@76", "--requeue"),  # 45.5 s of grace, and 30
    }
    assert "srun --kill-on-bad-exit=1 --open-mode=append" in text and "--cpus-per-task=12 " in text
    assert not (tmp_path / "run").exists()


def test_a_dataset_that_only_the_nodes_see_is_not_checked(tiny_config, tmp_path):
    """And first weights are not needed by a run that has a checkpoint."""
    (tmp_path / "run" / "checkpoints" / "step_00000005").mkdir(parents=True)
    arguments = [f"--output={tmp_path}/run", f"data.path={tmp_path}/gone", "model.init_from=gone"]
    result = submit("--config", str(tiny_config), "--dry-run", "--gpus-per-node=2", *arguments)
    assert result.returncode == 0
    assert result.stderr == f"data.path {tmp_path}/gone is not on this machine: not checked here\n"


def test_a_rank_gets_the_cores_that_its_config_needs(tiny_config, tmp_path):
    """One for each decoding thread and two more, in the job and in its steps."""
    text = script(tiny_config, "--output", str(tmp_path / "run"), "data.workers=7")
    assert "#SBATCH --cpus-per-task=9\n" in text and re.search(r"srun --kill-on-bad-exit=1 .* --cpus-per-task=9 ", text)


HINT = "3 cores a rank (data.workers + 2): --cpus-per-task asks for another number"


@pytest.mark.parametrize(
    ("reason", "hint"),
    [
        ("Requested node configuration is not available", True),
        ("CPU count per node can not be satisfied", True),
        ("invalid partition specified: gpu", False),
    ],
)
def test_a_job_that_sbatch_refuses_leaves_nothing_behind(tiny_config, tmp_path, reason, hint):
    """And where cores may be the reason, their default number is named."""
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.parent.mkdir()
    sbatch.write_text(f"#!/bin/sh\necho 'sbatch: error: {reason}' >&2\nexit 1\n")
    sbatch.chmod(0o755)
    path = f"{sbatch.parent}:{os.environ['PATH']}"
    (tmp_path / "begun" / "logs").mkdir(parents=True)
    (tmp_path / "begun" / "logs" / "job_1.log").touch()
    for arguments in (["--output", f"{tmp_path}/run"], ["--output", f"{tmp_path}/run", "--seeds=0-1"]):
        result = submit("--config", str(tiny_config), "--gpus-per-node=2", *arguments, PATH=path)
        assert result.returncode == 78 and f"sbatch refused the job: sbatch: error: {reason}" in result.stderr
        assert (HINT in result.stderr) == hint
        assert not (tmp_path / "run").exists()
    submit("--config", str(tiny_config), "--gpus-per-node=2", "--output", f"{tmp_path}/begun", PATH=path)
    assert [path.name for path in (tmp_path / "begun").rglob("*")] == ["logs", "job_1.log"]


def test_the_command_in_the_script_is_the_one_that_submits_it(tiny_config, tmp_path):
    text = script(tiny_config, "--output", str(tmp_path / "a run"), "--seeds=0-2%2", "--job-name=my run")
    assert (
        f"sbatch --parsable '--job-name=my run' --chdir={os.getcwd()} "
        f"--output=/dev/null '{tmp_path}/a run/submitted/" in text
    )
    assert "#SBATCH --array=0-2%2" in text and 'train.seed="$SLURM_ARRAY_TASK_ID"' in text


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["train.epoch=3"], "unknown key train.epoch; did you mean train.epochs?"),
        (["--nodes=3"], "6 ranks cannot share the 4 micro-batches"),
        (["train.global_batch=512"], "has 260 samples, fewer than one global_batch of 512: set a smaller train.global"),
        (["schedule.warmup_steps=500"], "the warm-up takes 500 of the run's 16 steps: lower schedule.warmup_steps"),
        (["model.init_from=missing"], "or a checkpoint's, or set model.init_from=null for fresh weights"),
        (["model.num_heads=[3,6]"], "model: num_heads 3 does not divide the"),
        (["data.image_size=40", "data.path=gone"], "model: img_size (40, 40) cannot be cut into whole patches"),
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
        (["--seeds=1,5-3"], "--seeds 1,5-3: 5-3 is empty, write 3-5"),
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
