#!/usr/bin/env python
"""Train on SLURM: python launch/submit.py --config configs/cat_b.yaml --nodes 4 --gpus-per-node 8 --time 1-00:00:00"""

import argparse
import contextlib
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from launch.cli import Parser, add_overrides, number, run
from launch.sbatch_forms import parse_minutes, parse_seeds

TEMPLATE = ROOT / "launch" / "templates" / "job.sh"
MARGIN = 30  # seconds between the end of guard.grace and the time limit, for ending the step and requeueing
BESIDE_WORKERS = 2  # cores of a rank in addition to its decoding threads'


@dataclass(frozen=True)
class BatchJob:
    """The validated values of a batch script. Paths are absolute."""

    run: str  # the run's folder, or the parent of the seeds' folders
    config: str  # the resolved config, written at submission
    name: str
    seeds: list[int]
    options: list[str]  # sbatch options that are lines of the script
    srun_options: list[str]
    environment: list[str]  # lines of shell, including the user's
    resume: str | None
    with_changes: bool
    stage_in: bool
    doctor: bool
    max_restarts: int

    def folders(self) -> list[str]:
        """The run folders, one per seed."""
        return [f"{self.run}/seed_{seed}" for seed in self.seeds] or [self.run]


def main(arguments: argparse.Namespace) -> None:
    from train.config import ConfigError, dump_config, load_config

    config = load_config(arguments.config, arguments.overrides)
    stamp = time.strftime("%Y%m%d-%H%M%S")
    job = make_job(arguments, config, stamp)
    script_path = Path(job.run) / "submitted" / f"{stamp}.sh"
    command = sbatch_command(job, script_path)
    script = render(job, command)
    if arguments.dry_run:
        print(script, end="")
        return
    if not shutil.which("sbatch"):
        raise ConfigError(
            "there is no sbatch on this machine: submit from a node of the cluster, or print the script with --dry-run"
        )
    for folder in job.folders():
        os.makedirs(f"{folder}/logs", exist_ok=True)
    script_path.parent.mkdir(exist_ok=True)
    try:
        with open(job.config, "x") as file:
            file.write(dump_config(config))
        with open(script_path, "x") as file:
            file.write(script)
    except FileExistsError as error:
        raise ConfigError(f"{error.filename} was made this second: submit one job at a time into {job.run}") from error
    # If this shell runs in a job, sbatch would take that job's variables for the new job's.
    environment = {
        key: value for key, value in os.environ.items() if not key.startswith("SLURM_") or key == "SLURM_CONF"
    }
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    if result.returncode:
        remove_submission(job, script_path)
        reason = " ".join(result.stderr.split())
        if not arguments.cpus_per_task and re.search(r"\bCPUs?\b|node configuration", reason, re.IGNORECASE):
            asked = f"{config.data.workers + BESIDE_WORKERS} cores a rank (data.workers + {BESIDE_WORKERS})"
            reason += f". It was asked for {asked}: --cpus-per-task asks for another number"
        raise ConfigError(f"sbatch refused the job: {reason}")
    number = result.stdout.strip().split(";")[0]
    print(f"job {number}")
    for folder in job.folders():
        print(f"logs: {folder}/logs")


def remove_submission(job: BatchJob, script: Path) -> None:
    """Remove the files of a job that sbatch has refused, and the folders that are empty without them."""
    os.remove(script)
    os.remove(job.config)
    for folder in (script.parent, *(f"{path}/logs" for path in job.folders()), *job.folders(), job.run):
        with contextlib.suppress(OSError):
            os.rmdir(folder)


def make_job(arguments: argparse.Namespace, config, stamp: str) -> BatchJob:
    """Check the arguments and convert them to the values of the template. Raises ConfigError."""
    folder = _printable("--output", os.path.abspath(arguments.output or f"runs/{Path(arguments.config).stem}"))
    seeds = parse_seeds(arguments.seeds) if arguments.seeds else []
    resume = _printable("--resume", os.path.abspath(arguments.resume)) if arguments.resume else None
    _check(arguments, folder, resume)
    cores = arguments.cpus_per_task or config.data.workers + BESIDE_WORKERS  # SLURM's default is one
    srun_options = [f"--cpus-per-task={cores}"]  # since 22.05 srun does not inherit it from sbatch
    if arguments.cpu_bind:
        srun_options.append(f"--cpu-bind={arguments.cpu_bind}")
    job = BatchJob(
        run=folder,
        config=f"{folder}/submitted/{stamp}.yaml",
        name=_printable("--job-name", arguments.job_name or Path(folder).name),
        seeds=seeds,
        options=_sbatch_options(arguments, config, cores),
        srun_options=srun_options,
        environment=_environment(arguments),
        resume=resume,
        with_changes=arguments.resume_with_changes,
        stage_in=arguments.stage_in,
        doctor=arguments.doctor,
        max_restarts=arguments.max_restarts,
    )
    check_run(config, arguments.nodes * (arguments.gpus_per_node or arguments.tasks_per_node), job)
    return job


def _check(arguments: argparse.Namespace, folder: str, resume: str | None) -> None:
    """Raise ConfigError if arguments do not go together."""
    from train.checkpoint.info import list_checkpoints
    from train.config import ConfigError

    if not arguments.gpus_per_node and not arguments.tasks_per_node:
        raise ConfigError("--gpus-per-node 0 trains on CPUs: say how many ranks a node gets with --tasks-per-node")
    if arguments.gpus_per_node and arguments.tasks_per_node:
        raise ConfigError("--tasks-per-node is for --gpus-per-node 0: every GPU gets one rank")
    if "\\" in folder or "%" in folder:
        raise ConfigError(f"--output {folder}: SLURM interprets % and backslashes in a path; choose another folder")
    if resume and arguments.seeds:
        raise ConfigError("--resume continues one run: leave out --seeds")
    if resume and not os.path.isfile(f"{resume}/manifest.json"):
        raise ConfigError(
            f"--resume {arguments.resume} is not a checkpoint's folder: name a run's …/checkpoints/step_N"
        )
    if resume and list_checkpoints(Path(folder, "checkpoints")):
        raise ConfigError(
            f"{folder} has checkpoints of its own, from which it continues: give --resume with another --output"
        )


def _sbatch_options(arguments: argparse.Namespace, config, cores: int) -> list[str]:
    """The options of sbatch, for the script's lines. Raises ConfigError."""
    from train.config import ConfigError

    signal_before = math.ceil(config.guard.grace) + MARGIN
    limit = parse_minutes(arguments.time) if arguments.time else None
    if limit is not None and limit * 60 <= signal_before:
        raise ConfigError(
            f"--time {arguments.time} leaves no time to train: ranks are asked to stop {signal_before} s before its "
            f"end (guard.grace {config.guard.grace:g} s and {MARGIN} s)"
        )
    options = {
        "nodes": arguments.nodes,
        "ntasks-per-node": arguments.gpus_per_node or arguments.tasks_per_node,
        "gpus-per-node": arguments.gpus_per_node or None,
        "cpus-per-task": cores,
        "mem": arguments.mem,
        "time": arguments.time,
        "partition": arguments.partition,
        "account": arguments.account,
        "qos": arguments.qos,
        "array": arguments.seeds,
        "signal": f"USR1@{signal_before}",
    }
    lines = [f"--{name}={_word(f'--{name}', str(value))}" for name, value in options.items() if value is not None]
    for option in arguments.sbatch:
        if not re.match(r"--\w", option):
            raise ConfigError(
                f"--sbatch={option} is not an option of sbatch in its long form, such as --sbatch=--constraint=a100"
            )
        lines.append(_word("--sbatch", option))
    return [*lines, "--requeue"]


def check_run(config, world: int, job: BatchJob) -> None:
    """Raise ConfigError if the job's first start would be refused, as far as this machine can tell."""
    from train.checkpoint.resume_point import Resume
    from train.checks import check_start, checked_order, visible_dataset

    for folder in job.folders():
        check_start(config, 0, world, Resume.decide(Path(folder), job.resume or "auto", job.with_changes))
    manifest = visible_dataset(config)
    if manifest:
        checked_order(config, manifest)
    from operate.task_model import meta_model, task_of  # last, because it imports torch

    meta_model(task_of(config, manifest))
    if not manifest:
        print(f"data.path {config.data.path} is not on this machine: not checked here", file=sys.stderr)


def sbatch_command(job: BatchJob, script: Path) -> list[str]:
    """The sbatch command. Values that may need quoting are given here, because lines of the script cannot be quoted."""
    here = _printable("the working directory", os.getcwd())
    options = [f"--job-name={job.name}", f"--chdir={here}", "--output=/dev/null"]  # the script opens its log itself
    return ["sbatch", "--parsable", *options, str(script)]


def render(job: BatchJob, command: list[str]) -> str:
    """The batch script. All values from the user are quoted, or were checked by `_word`."""
    quote, seed = shlex.quote, '"$SLURM_ARRAY_TASK_ID"'
    inside = f"/seed_{seed}" if job.seeds else ""
    arguments = [f"train.seed={seed}"] * bool(job.seeds) + ["--resume-with-changes"] * job.with_changes
    environment = list(job.environment)
    if job.stage_in:
        environment += [
            "# The node's own disk; training creates a folder there that only this user can read.",
            'arguments+=("data.cache_dir=${SLURM_TMPDIR:-${TMPDIR:-/tmp}}")',
        ]
    if job.resume:
        environment += [
            "# Start from this checkpoint until the run has one of its own.",
            'ls "$run/checkpoints" 2> /dev/null | grep -qxE "step_[0-9]{8,}" ||',
            f"  arguments+=(--resume {quote(job.resume)})",
        ]
    values = {
        "command": shlex.join(command),
        "options": "\n".join(f"#SBATCH {option}" for option in job.options),
        "python": quote(sys.executable),
        "repository": quote(str(ROOT)),
        "run": quote(job.run) + inside,
        "config": quote(job.config),
        "arguments": "".join(f" {argument}" for argument in arguments),
        "max_restarts": str(job.max_restarts),
        "doctor": "yes" if job.doctor else "no",
        "environment": "".join(f"{line}\n" for line in environment),
        "srun_options": "".join(f" {quote(option)}" for option in job.srun_options),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda match: values[match[1]], TEMPLATE.read_text())


def _environment(arguments: argparse.Namespace) -> list[str]:
    from train.config import ConfigError

    lines = []
    if arguments.interface:
        lines += [
            f"export {name}={shlex.quote(arguments.interface)}" for name in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME")
        ]
    for setting in arguments.env:
        name, equals, value = setting.partition("=")
        if not equals or not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII):
            raise ConfigError(f"--env {setting} is not of the form KEY=VALUE")
        lines.append(f"export {name}={shlex.quote(value)}")
    for path in arguments.setup:
        try:
            text = Path(path).read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--setup {path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
        check = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True)
        if check.returncode:
            raise ConfigError(f"--setup {path} is not shell: {' '.join(check.stderr.split())}")
        lines += [f"# --setup {_printable('--setup', path)}", text.rstrip("\n"), "# ---"]
    return lines


def _word(option: str, value: str) -> str:
    """`value`, checked to be one word without quotes or comments, for a line of the script that sbatch parses."""
    from train.config import ConfigError

    if not re.fullmatch(r"[^\s\x00-\x1f\x7f\"'\\#]+", value):
        raise ConfigError(f"{option} {value!r}: spaces, quotes, backslashes and # are not allowed")
    return _printable(option, value)


def _printable(option: str, value: str) -> str:
    from train.config import ConfigError

    if not value.isprintable():  # newlines and other control characters; bytes that are not UTF-8
        raise ConfigError(f"{option} {value!r}: control characters and bytes that are not UTF-8 are not allowed")
    return value


def parse_arguments() -> argparse.Namespace:
    parser = Parser(
        description="Submit a training run to SLURM. The run stops before its time limit. After that, after "
        "preemption, a crash or a lost node, it is requeued and continues from its newest checkpoint. See "
        "docs/slurm.md.",
    )
    count = number(int, 1)
    parser.add_argument("--config", required=True, metavar="FILE", help="recipe, e.g. configs/cat_b.yaml")
    parser.add_argument(
        "--output",
        metavar="DIR",
        help="the run's folder, on a file system that all nodes share (default: runs/<config name>)",
    )
    parser.add_argument("--nodes", type=count, default=1, metavar="N", help="number of nodes (default: 1)")
    parser.add_argument(
        "--gpus-per-node",
        type=number(int, 0),
        required=True,
        metavar="G",
        help="GPUs per node, with one rank each; 0: train on CPUs",
    )
    parser.add_argument("--tasks-per-node", type=count, metavar="T", help="ranks per node, with --gpus-per-node 0")
    parser.add_argument(
        "--time", metavar="TIME", help="time limit of a start, in sbatch's formats (default: the partition's)"
    )
    parser.add_argument("--partition", metavar="NAME", help="SLURM partition")
    parser.add_argument("--account", metavar="NAME", help="SLURM account")
    parser.add_argument("--qos", metavar="NAME", help="SLURM quality of service")
    parser.add_argument("--cpus-per-task", type=count, metavar="N", help="cores of a rank (default: data.workers + 2)")
    parser.add_argument("--mem", metavar="SIZE", help="memory per node, such as 200G")
    parser.add_argument("--cpu-bind", metavar="TYPE", help="srun's option: cores, none, map_cpu:…")
    parser.add_argument("--interface", metavar="NAME", help="network interface for NCCL and gloo, such as ib0")
    parser.add_argument(
        "--env",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="environment variable of the job; can be repeated",
    )
    parser.add_argument(
        "--setup",
        action="append",
        default=[],
        metavar="FILE",
        help="shell commands to run first, such as module load …; copied into the script",
    )
    parser.add_argument(
        "--sbatch",
        action="append",
        default=[],
        metavar="OPTION",
        help="any other option of sbatch, such as --sbatch=--constraint=a100",
    )
    parser.add_argument("--job-name", metavar="NAME", help="(default: the name of the run's folder)")
    parser.add_argument(
        "--seeds",
        metavar="RANGE",
        help="a job array with one run per seed, such as 0-4 or 1,3,7, in OUTPUT/seed_<seed>",
    )
    parser.add_argument(
        "--stage-in",
        action="store_true",
        help="copy the dataset's files to the nodes' own disks before use (data.cache_dir)",
    )
    parser.add_argument(
        "--doctor",
        action="store_true",
        help="check the nodes first (launch/doctor.py), and end the job if they are not fit",
    )
    parser.add_argument(
        "--resume", metavar="CHECKPOINT", help="start from this checkpoint until the run has one of its own"
    )
    parser.add_argument("--resume-with-changes", action="store_true", help="as for launch/train.py")
    parser.add_argument(
        "--max-restarts",
        type=number(int, 0),
        default=5,
        metavar="N",
        help="maximum of restarts in a row without a newer checkpoint (default: 5)",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print the batch script, without writing or submitting anything"
    )
    add_overrides(parser)
    return parser.parse_intermixed_args()


if __name__ == "__main__":
    sys.exit(run(main, parse_arguments()))
