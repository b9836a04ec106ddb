"""A real SLURM cluster of a few nodes on this machine: munged, slurmctld and one slurmd per node, in namespaces.

The cluster lives in a PID, mount, UTS and network namespace, and every node in a further UTS and network namespace,
joined by a bridge: hosts have names and addresses, and nothing of it is seen outside. Its process 1 ends when this
process does, however that ends; then the kernel ends every process in it, and bridge, namespaces and mounts are gone
with them.
"""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "ip", "unshare", "nsenter")
NODES = ("n1", "n2")
HEAD = "10.0.0.254"
# Ends with the pipe from the process that made the cluster; reaps what daemons leave behind.
INIT = "import signal, sys; signal.signal(signal.SIGCHLD, signal.SIG_IGN); print('up', flush=True); sys.stdin.read()"

CONFIG = """\
ClusterName=test
SlurmctldHost=head({head})
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# Once requeued, a job waits for a second more than the time for which a credential is good: two minutes by default, 5 s
# at least.
AuthInfo=socket={folder}/munge/socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0,sched_min_interval=0
GresTypes=gpu
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
KillWait=20
SlurmdTimeout=10
MailProg=/bin/true
SlurmdParameters=config_overrides
PropagateResourceLimits=NONE
{nodes}
PartitionName=low Nodes=ALL Default=YES MaxTime=UNLIMITED PriorityTier=1 PreemptMode=REQUEUE GraceTime={grace}
PartitionName=high Nodes=ALL MaxTime=UNLIMITED PriorityTier=10 PreemptMode=OFF
"""
THROTTLE = Path("/sys/fs/cgroup/blkio/blkio.throttle.write_bps_device")  # of the whole system, by device
GRACE = 20  # seconds that a preempted job has


def missing() -> str | None:
    """The reason why no cluster can be started here, or None."""
    programs = [program for program in PROGRAMS if not shutil.which(program, path=_path())]
    if programs:
        return f"not installed: {', '.join(programs)} (apt-get install slurm-wlm munge iproute2)"
    if os.geteuid():
        return "a SLURM cluster of our own needs root"
    probe = subprocess.run(
        ["unshare", "--pid", "--fork", "--mount", "--uts", "--net", "true"], capture_output=True, text=True
    )
    return f"namespaces cannot be made: {probe.stderr.strip()}" if probe.returncode else None


@dataclass(frozen=True)
class JobInfo:
    state: str
    restarts: int
    exit_code: str  # SLURM's: "70:0" is exit code 70, "0:9" signal 9
    nodes: str


class Cluster:
    """A running cluster, to be closed after use. folder: its files.

    cpus: of a node, as SLURM counts them; the machine may have fewer. As many GPUs, eight at most.
    """

    def __init__(self, folder: Path, cpus: int = 2):
        self.folder, self.cpus, self.gpus = folder, cpus, min(cpus, 8)
        folder.mkdir(parents=True)
        own = {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": _path(), "DS_ACCELERATOR": "cpu"}
        self.environment = {**os.environ, **own}
        self._unshare = subprocess.Popen(
            [
                "unshare",
                "--pid",
                "--fork",
                "--kill-child",
                "--mount-proc",
                "--mount",
                "--uts",
                "--net",
                sys.executable,
                "-c",
                INIT,
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # a Ctrl-C is for pytest, which closes the cluster
        )
        try:
            assert self._unshare.stdout.readline() == "up\n"
            children = Path(f"/proc/{self._unshare.pid}/task/{self._unshare.pid}/children")
            self._init = int(children.read_text())
            self._set_up()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._unshare.stdin.close()
        self._unshare.wait(30)

    def run(self, *command: str, check: bool = True, **options) -> str:
        """The output of a command on the head node."""
        result = self.execute(*command, **options)
        assert not check or result.returncode == 0, (
            f"{command}: {result.returncode}\n{result.stdout}{result.stderr}\n{self.log()}"
        )
        return result.stdout

    def execute(self, *command: str, **options) -> subprocess.CompletedProcess:
        inside = ["nsenter", f"--target={self._init}", "--pid", "--mount", "--uts", "--net", "--"]
        environment = {**self.environment, **options.pop("env", {})}
        return subprocess.run(
            [*inside, *command], capture_output=True, text=True, timeout=300, env=environment, **options
        )

    def job(self, number: str) -> JobInfo:
        fields = dict(word.split("=", 1) for word in self.run("scontrol", "show", "job", number).split() if "=" in word)
        return JobInfo(fields["JobState"], int(fields["Restarts"]), fields["ExitCode"], fields["NodeList"])

    def wait(self, what: str, condition: Callable[[], bool], timeout: float = 120) -> None:
        deadline = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < deadline, (
                f"{what} has not come in {timeout} s:\n{self.run('squeue')}\n{self.log()}"
            )
            time.sleep(0.1)

    def ended(self, number: str) -> bool:
        return self.job(number).state in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")

    def has_rank(self, number: str, rank: int) -> bool:
        return self._find_rank(number, rank) is not None

    def rank(self, number: str, rank: int) -> int:
        """The process id, outside the namespaces, of a rank of a job's training."""
        process = self._find_rank(number, rank)
        assert process is not None, f"job {number} has no rank {rank}:\n{self.log()}"
        return process

    def _find_rank(self, number: str, rank: int) -> int | None:
        wanted = {
            f"SLURM_CONF={self.environment['SLURM_CONF']}",
            f"SLURM_JOB_ID={number}",
            f"SLURM_PROCID={rank}",
            "SLURM_STEP_ID=0",
        }
        for process in Path("/proc").iterdir():
            try:
                if b"launch/train.py" in (process / "cmdline").read_bytes():
                    if wanted <= set((process / "environ").read_bytes().decode().split("\0")):
                        return int(process.name)
            except (OSError, ValueError):  # not a process, or one that has ended
                continue
        return None

    def kill_slurmd(self, node: str) -> None:
        """kill -9 a node's slurmd. The processes that it started keep running, as on a real node."""
        self.run("kill", "-9", (self.folder / f"{node}.pid").read_text().strip())

    def start_slurmd(self, node: str, prepare: str = "") -> None:
        """prepare: shell commands that change the mounts of this node only."""
        # A core of its own, if there are as many: jobs find out how many threads they may have.
        cores = sorted(os.sched_getaffinity(0))
        core = cores[NODES.index(node) % len(cores)]
        start = f'{prepare or "true"} && hostname "$1" && exec slurmd -N "$1"'
        unshare = ["unshare", "--uts", *(["--mount"] if prepare else [])]
        self.run(
            "nsenter", f"--net=/run/netns/{node}", "taskset", "-c", str(core), *unshare, "sh", "-c", start, "sh", node
        )

    def kill_slurmctld(self) -> None:
        self.run("kill", "-9", (self.folder / "slurmctld.pid").read_text().strip())

    def start_slurmctld(self) -> None:
        self.run("slurmctld")

    @contextmanager
    def slow_link(self, node: str, rate: str) -> Iterator[None]:
        """In this context the node sends through a token bucket of tc with the given rate, such as "20mbit"."""
        inside = ["nsenter", f"--net=/run/netns/{node}", "tc", "qdisc"]
        self.run(*inside, "add", "dev", "eth0", "root", "tbf", "rate", rate, "burst", "64kb", "latency", "400ms")
        try:
            yield
        finally:
            self.run(*inside, "del", "dev", "eth0", "root")

    @contextmanager
    def slow_disk(self, folder: Path, bytes_per_second: int) -> Iterator[None]:
        """In this context a disk of 500 MB with a limited write speed is mounted on `folder` for all nodes."""
        image = folder.with_name(f"{folder.name}.img")
        self.run("truncate", "--size=500M", str(image))
        self.run("mkfs.ext4", "-q", "-F", str(image))
        self.run("mount", "-o", "loop", str(image), str(folder))
        device = self.run("findmnt", "--noheadings", "--output=MAJ:MIN", "--mountpoint", str(folder)).strip()
        THROTTLE.write_text(f"{device} {bytes_per_second}")
        try:
            yield
        finally:
            THROTTLE.write_text(f"{device} 0")
            self.run("umount", str(folder))

    def log(self) -> str:
        """The ends of all daemons' logs."""
        return "\n".join(f"--- {path.name}\n{path.read_text()[-3000:]}" for path in sorted(self.folder.glob("*.log")))

    def _set_up(self) -> None:
        folder = self.folder
        for name in ("munge", "state", *(f"spool.{node}" for node in NODES)):
            (folder / name).mkdir()
        addresses = {node: f"10.0.0.{number}" for number, node in enumerate(NODES, 1)}
        lines = [
            f"{address} {node}\n" for node, address in {"localhost": "127.0.0.1", "head": HEAD, **addresses}.items()
        ]
        (folder / "hosts").write_text("".join(lines))
        nodes = [
            f"NodeName={node} NodeAddr={address} CPUs={self.cpus} RealMemory=1000 Gres=gpu:{self.gpus}"
            for node, address in addresses.items()
        ]
        (folder / "slurm.conf").write_text(CONFIG.format(folder=folder, head=HEAD, nodes="\n".join(nodes), grace=GRACE))
        # What stands for a GPU: SLURM counts them and tells the tasks their numbers.
        (folder / "gres.conf").write_text(f"Name=gpu File=/dev/tty[0-{self.gpus - 1}]\n")

        self.run("mount", "--bind", str(folder / "hosts"), "/etc/hosts")
        self.run("sh", "-c", "mkdir -p /run/netns && mount -t tmpfs tmpfs /run/netns && hostname head")
        network = [
            "set -e; ip link set lo up; ip link add bridge0 type bridge; ip link set bridge0 up",
            f"ip addr add {HEAD}/24 dev bridge0",
        ]
        for node, address in addresses.items():
            network += [
                f"ip netns add {node}; ip link add {node} type veth peer name eth0 netns {node}",
                f"ip link set {node} master bridge0 up",
                f"ip -n {node} addr add {address}/24 dev eth0; ip -n {node} link set eth0 up",
                f"ip -n {node} link set lo up",
            ]
        self.run("sh", "-c", "\n".join(network))

        munge = folder / "munge"
        (munge / "key").write_bytes(os.urandom(64))
        munge.chmod(0o711)
        (munge / "key").chmod(0o600)
        files = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        self.run("munged", "--force", *(f"--{option}={munge / name}" for option, name in files.items()))
        self.start_slurmctld()
        for node in NODES:
            self.start_slurmd(node)
        self.wait(
            "an idle cluster",
            lambda: self.run("sinfo", "-h", "-p", "low", "-t", "idle", "-o", "%D", check=False).strip() == "2",
            30,
        )


def _path() -> str:
    return f"{os.environ['PATH']}:/usr/sbin:/sbin"
