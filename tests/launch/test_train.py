"""launch/train.py as a command: mistakes, exit codes, and the deepspeed launcher."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.runs import ROOT, metrics
from train.checkpoint.info import list_checkpoints, step_of

DEEPSPEED = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", "2"]


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(ROOT / "launch" / "train.py"), *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **environment},
    )


def assert_one_sentence(result: subprocess.CompletedProcess, code: int, sentence: str) -> None:
    assert result.returncode == code, result.stderr
    assert "Traceback" not in result.stderr
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr
    assert sentence in result.stderr


def test_help_names_the_exit_codes():
    result = command("--help")
    assert result.returncode == 0
    assert "75 (stopped on request)" in " ".join(result.stdout.split()) and "--resume-with-changes" in result.stdout


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("train.epoch=3", "unknown key train.epoch; did you mean train.epochs?"),
        ("train.epochs=three", "train.epochs: input should be a valid integer"),
        ("train.micro_batch=7", "train.global_batch 32 is not a multiple of train.micro_batch 7"),
    ],
)
def test_a_mistake_in_the_config(tiny_config, tmp_path, override, sentence):
    assert_one_sentence(command("--config", str(tiny_config), "--output", str(tmp_path), override), 78, sentence)


def test_a_missing_config(tmp_path):
    assert_one_sentence(
        command("--config", str(tmp_path / "no.yaml")), 78, "no.yaml cannot be read: No such file or directory"
    )


def test_a_missing_dataset(tiny_config, tmp_path):
    result = command("--config", str(tiny_config), "--output", str(tmp_path), f"data.path={tmp_path / 'nowhere'}")
    assert_one_sentence(result, 65, "Make one with: python launch/prepare.py")


def test_a_dataset_smaller_than_a_batch(tiny_config, tmp_path):
    result = command("--config", str(tiny_config), "--output", str(tmp_path), "train.global_batch=512")
    assert_one_sentence(result, 78, "260")


def test_a_world_size_that_does_not_divide_lists_those_that_do(tiny_config, tmp_path):
    result = command("--config", str(tiny_config), "--output", str(tmp_path), RANK="0", WORLD_SIZE="3")
    assert_one_sentence(result, 78, "1, 2, 4")


def test_a_damaged_manifest(tiny_config, tiny_dataset, tmp_path):
    copy = tmp_path / "dataset"
    shutil.copytree(tiny_dataset, copy)
    (copy / "manifest.json").write_text((copy / "manifest.json").read_text()[:100])
    assert_one_sentence(
        command("--config", str(tiny_config), "--output", str(tmp_path / "run"), f"data.path={copy}"), 65, "is damaged"
    )


def test_a_truncated_shard(tiny_config, tiny_dataset, tmp_path):
    copy = tmp_path / "dataset"
    shutil.copytree(tiny_dataset, copy)
    shard = next(copy.glob("*.tar"))
    shard.write_bytes(shard.read_bytes()[:-1024])
    assert_one_sentence(
        command("--config", str(tiny_config), "--output", str(tmp_path / "run"), f"data.path={copy}"), 65, shard.name
    )


@pytest.mark.slow
def test_model_settings_that_do_not_fit(tiny_config, tmp_path):
    result = command("--config", str(tiny_config), "--output", str(tmp_path), "data.image_size=20")
    assert result.returncode == 78 and "Traceback" not in result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: model: ")


@pytest.mark.slow
def test_fp16_where_the_device_has_none(tiny_config, tmp_path):
    from deepspeed.accelerator import get_accelerator

    if get_accelerator().is_fp16_supported():
        pytest.skip("this device has fp16")
    result = command("--config", str(tiny_config), "--output", str(tmp_path), "train.precision=fp16")
    assert result.returncode == 78
    assert (
        result.stderr.splitlines()[-1]
        == "error: train.precision=fp16 is not supported by this device; use bf16 or fp32"
    )


@pytest.mark.slow
def test_under_the_deepspeed_launcher(tiny_config, tmp_path):
    arguments = ["--config", str(tiny_config), "--output", str(tmp_path), "train.max_steps=3"]
    result = subprocess.run(
        [*DEEPSPEED, "launch/train.py", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert [line["step"] for line in metrics(tmp_path, "train")] == [1, 2, 3]
    start = metrics(tmp_path, "event")[0]
    assert (start["event"], start["world_size"]) == ("start", 2)
    assert (tmp_path / "model.safetensors").is_file()
    ids = [
        json.loads(line)["ids"]
        for rank in (0, 1)
        for line in (tmp_path / "samples" / f"rank_{rank}.jsonl").read_text().splitlines()
    ]
    assert sum(map(len, ids)) == 3 * 32


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_the_end_of_the_deepspeed_command_stops_the_run(tiny_config, tmp_path, number):
    """The launcher forwards no signal: its ranks notice that it is gone, save, and all exit."""
    arguments = ["--config", str(tiny_config), "--output", str(tmp_path), "train.epochs=1000", "train.evaluate_every=0"]
    command = subprocess.Popen([*DEEPSPEED, "--master_port", free_port(), "launch/train.py", *arguments], cwd=ROOT)
    wait = lambda what, seconds: wait_for(what, seconds, command)  # noqa: E731
    wait(lambda: any(line["step"] >= 3 for line in metrics(tmp_path, "train", missing_ok=True)), 200)
    command.send_signal(number)
    assert command.wait() == -number
    wait(lambda: any(line["event"] == "preempted" for line in metrics(tmp_path, "event")), 60)
    wait(lambda: not processes_of(tmp_path), 60)
    last = metrics(tmp_path, "train")[-1]["step"]
    assert [step_of(path) for path in list_checkpoints(tmp_path / "checkpoints")][0] == last


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def wait_for(what: Callable[[], bool], seconds: float, command: subprocess.Popen) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        if time.monotonic() > deadline:
            command.kill()
            raise AssertionError(f"not within {seconds} s")
        time.sleep(0.1)


def processes_of(output: Path) -> list[bytes]:
    """The command lines that name the run's folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            found += [line for line in [path.read_bytes()] if str(output).encode() in line]
    return found


@pytest.mark.slow
def test_the_deepspeed_launcher_hands_the_exit_code_on(tiny_config, tmp_path):
    arguments = ["--config", str(tiny_config), "--output", str(tmp_path), "train.epoch=3"]
    result = subprocess.run(
        [*DEEPSPEED, "launch/train.py", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 78
    # On a busy machine rank 1 may fail some seconds before rank 0, and then says it, too, as rank 1.
    errors = [line for line in result.stderr.splitlines() if "error: " in line]
    assert 1 <= len(errors) == len(set(errors)) and all("did you mean train.epochs?" in line for line in errors)


@pytest.mark.slow
def test_a_diverging_run_fails_with_its_own_code(tiny_config, tmp_path):
    settings = ["optimizer.name=sgd", "optimizer.lr=1e30", "optimizer.clip_grad=null", "guard.max_skipped=3"]
    result = command("--config", str(tiny_config), "--output", str(tmp_path), *settings)
    assert result.returncode == 70
    last = result.stderr.splitlines()[-1]
    assert (
        last.startswith("error: steps ")
        and "had no finite gradient, and there is no checkpoint to go back to; lower optimizer.lr" in last
    )
