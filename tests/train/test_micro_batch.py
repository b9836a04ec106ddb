"""`train.micro_batch: auto`, in processes with limited memory."""

import resource
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from tests.runs import events, losses, run, start
from tests.train.test_families import TINY, with_model

SETTINGS = ["train.micro_batch=auto", "train.max_steps=2", "train.evaluate_every=0", "zero.stage=0"]
SETTINGS += ["data.image_size=64", "model.patch_size=8"]


@dataclass(frozen=True)
class LimitMemory:
    """The process of rank `rank` may allocate this many megabytes more than at its start."""

    rank: int
    megabytes: int

    def __call__(self, rank: int) -> None:
        if rank != self.rank:
            return
        now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + self.megabytes * 2**20, resource.RLIM_INFINITY))


def micro_batch(output: Path) -> int:
    return yaml.safe_load((output / "config.yaml").read_text())["train"]["micro_batch"]


@pytest.mark.slow
def test_the_largest_that_fits_is_found_and_kept(tiny_config, tmp_path):
    free = run(tiny_config, tmp_path / "free", *SETTINGS, "train.global_batch=256", "train.max_steps=1")
    assert micro_batch(tmp_path / "free") == 256 and "train.micro_batch: 256 is the largest that fits" in free.text()
    bound = run(
        tiny_config,
        tmp_path / "bound",
        *SETTINGS,
        "train.global_batch=256",
        "train.max_steps=1",
        before=LimitMemory(0, 2500),
    )
    size = micro_batch(tmp_path / "bound")
    assert size < 256 and f"train.micro_batch: {size} is the largest that fits ({2 * size} does not)" in bound.text()
    again = run(tiny_config, tmp_path / "bound", *SETTINGS, "train.global_batch=256")
    assert f"train.micro_batch: {size}, as this run has had it before" in again.text()
    assert micro_batch(tmp_path / "bound") == size and sorted(losses(tmp_path / "bound")) == [1, 2]
    assert len(events(tmp_path / "bound", "resume")) == 1


@pytest.mark.slow
@pytest.mark.parametrize("text", ["train: {micro_batch: 3}", ""], ids=["too large", "torn"])
def test_a_size_that_led_to_no_checkpoint_is_not_kept(tiny_config, tmp_path, text):
    """config.yaml of a start that ran out of memory at its first step, or truncated by a full disk or a kill."""
    (tmp_path / "config.yaml").write_text(text)
    job = run(tiny_config, tmp_path, "train.micro_batch=auto", "train.max_steps=1", "train.evaluate_every=0")
    assert "train.micro_batch: 32 is the largest that fits" in job.text() and micro_batch(tmp_path) == 32


@pytest.mark.slow
def test_all_ranks_take_what_fits_on_each(tiny_config, tmp_path):
    run(tiny_config, tmp_path, *SETTINGS, "train.global_batch=256", world=2, before=LimitMemory(1, 2500))
    assert micro_batch(tmp_path) < 128


@pytest.mark.slow
def test_a_network_whose_batch_norms_need_two_images(tiny_config, tmp_path):
    config = with_model(tiny_config, tmp_path, TINY["cotnet"])
    job = run(
        config, tmp_path / "run", "train.micro_batch=auto", "train.max_steps=1", "train.evaluate_every=0", world=2
    )
    assert micro_batch(tmp_path / "run") == 16 and "train.micro_batch: 16 is the largest that fits" in job.text()


@pytest.mark.slow
def test_where_nothing_fits_the_run_ends_with_one_sentence(tiny_config, tmp_path):
    job = start(tiny_config, tmp_path, *SETTINGS, "data.image_size=2048", before=LimitMemory(0, 1000))
    assert job.wait() == [78]
    assert "train.micro_batch=auto: not even 1 fits into memory" in job.text()
