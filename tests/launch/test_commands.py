"""The commands in README.md and docs/, on stand-ins for datasets and recipes; for docs/guide.md: test_guide.py.

As they stand, but for "…" and JOB, which are filled in, and a `tail -f`, which is ended. Commands inside sentences are
not among them.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from tests.data_pipeline import boxes, label_maps
from tests.launch.slurm import Cluster, missing
from tests.launch.test_guide import Account, imagenet_like, wait_for_lines
from tests.runs import ROOT, run

PAGES = ["README.md", *(str(page.relative_to(ROOT)) for page in sorted((ROOT / "docs").glob("*.md")))]
# Synopses in the first, the others have tests of their own.
OTHER_PAGES = ("docs/design.md", "docs/guide.md", "docs/segmentation.md", "docs/detection.md")
PAGES = [page for page in PAGES if page not in OTHER_PAGES]
COMMAND = "(make|source|git|pip|python|deepspeed|torchrun|tensorboard|srun|squeue|scancel|scontrol) "
# Which commands are run by which test; and what is run elsewhere.
READS_RUNS = "python launch/(evaluate|export|goodput|plan|predict|report|watch).py"
STARTS_RUNS = "(deepspeed|torchrun) .*launch/(train|doctor).py"
PREPARES = "python launch/prepare.py"
NEEDS_CLUSTER = "(python launch/submit.py|srun|squeue|scancel|scontrol) "
FETCHES = "pip "
ELSEWHERE = {
    "make (demo|test) ": "make test by .ci/run; make demo by a person, in a fresh clone",
    "source .venv/bin/activate": "by a person, in a fresh clone",
    "python train.py ": "timm's script, which is not installed",
    "tensorboard ": "by a person; test_guide.py starts one on another folder",
}


def long(test: Callable) -> Callable:
    return pytest.mark.long(pytest.mark.timeout(2400)(test))


def commands(pattern: str) -> list[str]:
    """Lines of PAGES' blocks that begin with the given text, in order. "…" repeats the previous arguments."""
    blocks = [
        re.findall(r"^```\n(.*?)^```", (ROOT / page).read_text(), flags=re.MULTILINE | re.DOTALL) for page in PAGES
    ]
    lines = "".join(sum(blocks, [])).replace("\\\n", " ").splitlines()
    return [line for line in lines if re.match(pattern, line)]


def test_every_command_has_its_test():
    run_by = [READS_RUNS, STARTS_RUNS, PREPARES, NEEDS_CLUSTER, FETCHES, *ELSEWHERE]
    found = {command: [pattern for pattern in run_by if re.match(pattern, command)] for command in commands(COMMAND)}
    assert len(found) > 40
    assert not {command: by for command, by in found.items() if len(by) != 1}


def run_all(found: list[str], folder: Path) -> None:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "DS_ACCELERATOR": "cpu"}
    for command in found:
        if "--compare" in command:
            shutil.copy(folder / "plan.json", folder / "other.json")
        done = subprocess.run(["bash", "-c", command], cwd=folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"


@pytest.fixture
def link_at_root():
    """A function that makes a link at the root of the pages' paths: `link_at_root("shared", folder)`."""
    links = []

    def make(name: str, target: Path) -> None:
        link = Path("/") / name
        if link.exists() or not os.access("/", os.W_OK):
            pytest.skip(f"{link} cannot be made here")
        link.symlink_to(target)
        links.append(link)

    yield make
    for link in links:
        link.unlink()


@long
def test_what_prepares(tiny_images, tmp_path, link_at_root):
    """ImageNet, Kaggle's copy of it and CIFAR-10 are replaced by `tiny_images` in their formats; CamVid, ADE20K,
    Cityscapes, BCCD, COCO and Pascal VOC by a few images in theirs.
    """
    imagenet_like(tiny_images, tmp_path)
    shutil.copytree(tiny_images / "train", tmp_path / "CLS-LOC/train")
    (tmp_path / "CLS-LOC/val").mkdir()
    rows = ["ImageId,PredictionString"]
    for image in sorted((tiny_images / "val").rglob("*.jpg")):
        name = f"ILSVRC2012_val_{image.stem}"
        shutil.copy(image, tmp_path / f"CLS-LOC/val/{name}.JPEG")
        rows.append(f"{name},{image.parent.name} 1 2 30 40 ")
    (tmp_path / "LOC_val_solution.csv").write_text("\n".join(rows) + "\n")
    with tarfile.open(tmp_path / "cifar10.tar.xz", "w:xz") as tar:
        for split in ("train", "val"):
            tar.add(tiny_images / split, split)
    label_maps.make_folder(tmp_path / "camvid")
    with tarfile.open(tmp_path / "camvid.tar", "w") as tar:
        tar.add(tmp_path / "camvid", "camvid")
    label_maps.ade20k(tmp_path / "ADEChallengeData2016", label_maps.labels(1, ignored=3))
    label_maps.cityscapes(tmp_path / "cityscapes", "labelIds", label_maps.labels(2, 30, ignored=30))
    boxes.make_coco(tmp_path / "bccd")
    with tarfile.open(tmp_path / "bccd.tar", "w") as tar:
        tar.add(tmp_path / "bccd", "bccd")
    boxes.make_coco(tmp_path / "coco", folders="{}2017", names="{}2017")
    objects = {name: [("bear", 2, 3, 20, 25, 0)] for name in ("a", "b")}
    boxes.make_voc(tmp_path / "VOCdevkit/VOC2007", {"train": ["a"], "val": ["b"]}, objects)
    shutil.copytree(tiny_images, tmp_path / "path/to/images")
    link_at_root("path", tmp_path / "path")
    (tmp_path / "launch").symlink_to(ROOT / "launch")
    (tmp_path / "SOURCE").symlink_to(tiny_images)
    found = commands(PREPARES)
    assert len(found) == 15
    for command in found:
        name = command.split("#")[0].split()[3]
        if " index " in command:  # as others made it: shards and nothing else
            for path in (tmp_path / name).iterdir():
                if path.suffix != ".tar":
                    path.unlink()
        elif " verify " not in command:
            shutil.rmtree(tmp_path / name, ignore_errors=True)
        run_all([command], tmp_path)
        assert (tmp_path / name / "manifest.json").exists()


@long
def test_what_is_asked_of_a_run(tiny_config, tmp_path):
    """Run on finished runs that have the names of the pages."""
    for name in ("launch", "configs", "docs"):
        (tmp_path / name).symlink_to(ROOT / name)
    for name in ("cat_b", "cat_b_lr", "shapes"):
        run(
            tiny_config,
            tmp_path / "runs" / name,
            f"train.seed={len(name)}",
            "train.global_batch=64",
            "train.micro_batch=2",
        )
    for folder in ("folder", "holidays"):
        (tmp_path / folder).mkdir()
        Image.effect_noise((32, 32), 100).convert("RGB").save(tmp_path / folder / "one.jpg")
    shutil.copy(tmp_path / "folder/one.jpg", tmp_path / "photo.jpg")
    found = commands(READS_RUNS)
    assert len(found) > 15
    run_all(found, tmp_path)


@long
def test_what_starts_runs(tiny_config, tiny_dataset, tmp_path):
    """Run with recipes of a tiny CAT under the names of the pages."""
    (tmp_path / "launch").symlink_to(ROOT / "launch")
    for folder in ("configs", "datasets", "runs"):
        (tmp_path / folder).mkdir()
    recipes = {
        name: tiny_config.read_text()
        for name in ("cat_b", "cat_t", "cifar10", "cifar10_300", "quickstart", "finetune_cat_b_448")
    }
    recipes["finetune_cat_b_448"] = (
        recipes["cat_b"].replace("model: {", "model: {init_from: runs/cat_b, ").replace("size: 16", "size: 32")
    )
    for name, text in recipes.items():
        (tmp_path / "configs" / f"{name}.yaml").write_text(text)
    for name in ("mine", "flowers"):
        (tmp_path / "datasets" / name).symlink_to(tiny_dataset)
    run(tiny_config, tmp_path / "runs" / "cat_t")
    found = [command.replace("…", "configs/cat_b.yaml") for command in commands(STARTS_RUNS)]
    assert len(found) == 8
    run_all(found, tmp_path)
    assert "position tables interpolated" in (tmp_path / "runs/finetune_cat_b_448/train.log").read_text()
    assert "first weights from runs/cat_t" in (tmp_path / "runs/flowers/train.log").read_text()


@long
def test_what_fetches(tmp_path):
    (tmp_path / "FOLDER").mkdir()
    run_all(commands(FETCHES), tmp_path)
    assert len(list((tmp_path / "FOLDER").glob("*.whl"))) == 9


@long
@pytest.mark.skipif(missing() is not None, reason=f"no SLURM: {missing()}")
def test_what_needs_a_cluster(tiny_config, tiny_dataset, tmp_path, link_at_root):
    """Two nodes of eight GPUs for SLURM, which are this machine's CPUs."""
    cluster = Cluster(tmp_path / "cluster", cpus=96)
    try:
        on_a_cluster(cluster, tiny_config, tiny_dataset, tmp_path, link_at_root)
    finally:
        cluster.close()


def on_a_cluster(cluster, tiny_config, tiny_dataset, folder, link_at_root):
    (folder / "launch").symlink_to(ROOT / "launch")
    (folder / "configs").mkdir()
    (folder / "configs/cat_b.yaml").write_text(
        f"base: {tiny_config}\ntrain: {{global_batch: 64, micro_batch: 4, epochs: 100}}\nguard: {{grace: 15}}\n"
    )
    (folder / "shared").mkdir()
    (folder / "shared/imagenet").symlink_to(tiny_dataset)
    link_at_root("shared", folder / "shared")
    account, output = Account(cluster, folder, ""), folder / "runs/cat_b"
    found = [command.split("#")[0] for command in commands(NEEDS_CLUSTER)]
    first, full, dry, seeds, look, cancel, requeue = [
        line for line in found if "srun" not in line and "--doctor" not in line
    ]
    arguments = full.split("submit.py ", 1)[1].strip()

    # docs/commands.md: a job of 16 ranks, which is looked at, saves when it is put back into the queue, and goes on.
    job = submitted(account, first)
    wait_for_lines(cluster, output, 2)
    assert job in account.shell(
        look.replace("tail -f", "timeout 1 tail -f") + "|| true"
    )  # of the tail nothing is asked
    account.shell(requeue.replace("JOB", job))
    cluster.wait("a restart", lambda: cluster.job(job).restarts == 1 and cluster.job(job).state == "RUNNING", 180)
    wait_for_lines(cluster, output, 2)
    account.shell(cancel.replace("JOB", job))
    cluster.wait("the end", lambda: cluster.ended(job))
    assert cluster.job(job).state == "CANCELLED"

    # docs/slurm.md: the same with more options, its script only, and one run per seed.
    assert "#SBATCH --cpus-per-task=12" in account.shell(dry.replace("…", arguments))
    of_seeds = f"{seeds.replace('…', arguments)} --output runs/seeds"
    for command, begun in ((full, output), (of_seeds, folder / "runs/seeds/seed_0")):
        job = submitted(account, command)
        wait_for_lines(cluster, begun, 2)
        account.shell(cancel.replace("JOB", job))
        cluster.wait("an empty queue", lambda: not cluster.run("squeue", "-h").strip())

    # What looks at nodes, and what starts a rank on each without a job of submit.py's.
    for command in [line for line in found if "srun" in line]:
        if "train.py" in command:
            command = f"{command.replace('…', 'configs/cat_b.yaml')} --output runs/by_hand train.epochs=1"
        allocation = "salloc --quiet --nodes 2 --ntasks-per-node 1 --gpus-per-node 1 bash -c"
        account.shell(f"{allocation} {shlex.quote(command)}")
    assert (output / "doctor.json").exists() and (folder / "runs/by_hand/checkpoints").exists()
    (doctor,) = [line for line in found if "--doctor" in line]
    job = submitted(account, doctor.replace("…", "--nodes 2 --gpus-per-node 1 --output runs/fit train.epochs=1"))
    cluster.wait("the end", lambda: cluster.ended(job), 300)
    assert cluster.job(job).state == "COMPLETED" and (folder / f"runs/fit/logs/fit_{job}").exists()


def submitted(account: Account, command: str) -> str:
    return re.search(r"job (\d+)", account.shell(command))[1]
