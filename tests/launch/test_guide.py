"""The commands of docs/guide.md, run unchanged and in order on a SLURM cluster."""

import io
import re
import shlex
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from tests.launch.slurm import Cluster, missing
from tests.runs import ROOT, events

pytestmark = [pytest.mark.long, pytest.mark.timeout(1500)]

BLOCKS = re.findall(r"^```\n(.*?)^```", (ROOT / "docs/guide.md").read_text(), flags=re.MULTILINE | re.DOTALL)
RECIPE = """
base: {tiny}
train: {{epochs: 60, log_every: 4}}
checkpoint: {{every_steps: 40}}
guard: {{grace: 15}}
"""


def imagenet_like(images: Path, folder: Path) -> None:
    """`tiny_images` as ILSVRC2012's two tars: one per class; validation images without classes, with a label file."""
    with tarfile.open(folder / "ILSVRC2012_img_train.tar", "w") as outer:
        for kind in sorted((images / "train").iterdir()):
            content = io.BytesIO()
            with tarfile.open(fileobj=content, mode="w") as inner:
                for image in sorted(kind.iterdir()):
                    inner.add(image, image.name)
            member = tarfile.TarInfo(f"{kind.name}.tar")
            member.size = content.tell()
            content.seek(0)
            outer.addfile(member, content)
    val = sorted((images / "val").rglob("*.jpg"), key=lambda image: image.name)
    with tarfile.open(folder / "ILSVRC2012_img_val.tar", "w") as tar:
        for image in val:
            tar.add(image, image.name)
    (folder / "synset_labels.txt").write_text("".join(f"{image.parent.name}\n" for image in val))
    (folder / "photo.jpg").write_bytes(val[0].read_bytes())


class Account:
    """A shell on the cluster's head node, in a copy of the checkout, with .venv's programs."""

    path = f"{Path(sys.executable).parent}:/usr/sbin:/sbin:/usr/bin:/bin"

    def __init__(self, cluster: Cluster, home: Path, settings: str):
        self.cluster, self.home, self.settings = cluster, home, settings

    def shell(self, commands: str) -> str:
        script = f"cd {shlex.quote(str(self.home))}\n{self.settings}\n{commands}"
        return self.cluster.run("bash", "-e", "-c", script, env={"PATH": self.path})


@pytest.fixture
def account(tiny_images, tiny_config, tmp_path):
    cluster = Cluster(tmp_path / "cluster")
    for name in ("launch", "configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    imagenet_like(tiny_images, tmp_path)
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(tiny=tiny_config))
    own = {"CONFIG": "recipe.yaml", "SHARED": tmp_path / "shared", "NODES": 2, "GPUS": 1, "SPEED": 300}
    settings = (
        "\n".join(f"{name}={value}" for name, value in own.items()) + '\nLIMITS="--cpus-per-task 1 --time 0:30:00"'
    )
    assert re.findall(r"^(\w+)=", BLOCKS[0], flags=re.MULTILINE) == [*list(own)[:4], "LIMITS", "SPEED"]
    yield Account(cluster, tmp_path, settings)
    cluster.close()


def wait_for_lines(cluster: Cluster, output: Path, more: int) -> None:
    """Wait until a run has written that many more lines."""
    path = output / "metrics.jsonl"
    seen = len(path.read_text().splitlines()) if path.exists() else 0
    cluster.wait("lines", lambda: path.exists() and len(path.read_text().splitlines()) > seen + more, 180)


@pytest.mark.skipif(missing() is not None, reason=f"no SLURM: {missing()}")
def test_every_command_of_the_guide(account):
    _, _, dataset, before, submit, watching, stopping, after = BLOCKS
    cluster, output = account.cluster, account.home / "shared" / "run"
    account.shell(dataset)
    assert "days" in account.shell(before)

    job = re.search(r"job (\d+)", account.shell(submit))[1]
    wait_for_lines(cluster, output, 5)
    back, away = stopping.strip().splitlines()
    account.shell(away.replace("JOB", job))
    cluster.wait("the end", lambda: cluster.ended(job))
    assert cluster.job(job).state == "CANCELLED" and len(events(output, "preempted")) == 1
    job = re.search(r"job (\d+)", account.shell(submit))[1]
    cluster.wait("a resume", lambda: len(events(output, "resume")) == 1, 180)
    wait_for_lines(cluster, output, 5)
    account.shell(back.replace("JOB", job))
    cluster.wait("another resume", lambda: len(events(output, "resume")) == 2, 180)

    watch, board, *rest = watching.strip().splitlines()
    assert "finished" in account.shell(watch)
    board = f"PATH={account.path} SHARED={shlex.quote(str(account.home / 'shared'))}; exec {board}"
    with subprocess.Popen(["bash", "-c", board], stderr=subprocess.PIPE, text=True) as server:
        assert any("TensorBoard" in line for line in server.stderr)
        server.terminate()
    assert "productive" in account.shell("\n".join(rest))
    assert (account.home / "report.html").stat().st_size > 50_000
    said = account.shell(after)
    assert "top-1" in said and "class_" in said
    assert (account.home / "model.onnx").exists() and (output / "logs" / f"fit_{job}").exists()
