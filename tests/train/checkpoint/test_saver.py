"""Saves of rank 0 of two, whose other rank's answers are in a real store. Of both: ../test_save_faults.py."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from train.checkpoint.info import CheckpointInfo, list_checkpoints, read_info, step_of
from train.checkpoint.saver import Saver
from train.engine.deepspeed_engine import Fragment
from train.guard.rank_store import Store
from train.telemetry.metrics import Metric


@pytest.fixture
def alone(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Events(list):
    """In place of a monitor: keeps what is reported."""

    def event(self, name: str, step: int, text: str, **fields: object) -> None:
        self.append((name, step, fields.get("reason")))


@pytest.fixture
def saver(alone, tmp_path):
    """It has a best score of 50. The state is one weight of two numbers."""
    engine = SimpleNamespace(
        rank=0,
        world=2,
        device=torch.device("cpu"),
        weight=torch.ones(2),
        fragments=lambda: [Fragment("layer", 6, engine.weight, {})],
        whole=dict,
        optimizer_step_count=lambda: 3,
        loss_scale_state=dict,
    )
    about = CheckpointInfo(0, None, "", [], {"data": {"path": ""}}, 0, {}, {}, {}, 2)
    limits = SimpleNamespace(timeout=SimpleNamespace(save=0.5))
    settings = SimpleNamespace(checkpoint=SimpleNamespace(keep=1), guard=limits)
    saver = Saver(tmp_path, about, Metric("a", "a", "%", "higher"), 50.0, engine, None, Store(), settings)
    yield saver
    saver.close()
    saver._thread.join(60)
    assert not saver._thread.is_alive()


def answer(saver: Saver, number: int) -> None:
    """The other rank has written its share of save `number`."""
    saver.store.set(f"save/{number}/1", f"ok shard_00001.safetensors {'0' * 64}")


def test_a_rank_that_does_not_report_costs_one_checkpoint(saver, tmp_path):
    events = Events()
    saver.save(4, 60.0, events)
    assert (saver.begun, saver.best) == (4, 60.0)
    saver.wait_and_report(events)
    failure = "rank 1 has not written its share after 0.5 s"
    assert events == [("save_failed", 4, failure)] and saver.failure == failure
    assert (saver.saved, saver.best, list(tmp_path.iterdir())) == (0, 50.0, [])
    answer(saver, 2)
    saver.save(8, 60.0, events)
    saver.finish(events)
    assert events[1:] == [("checkpoint", 8, None)] and (saver.saved, saver.best, saver.broken) == (8, 60.0, False)
    (path,) = list_checkpoints(tmp_path)
    info = read_info(path)
    assert (info.step, info.score, info.optimizer_step, len(info.shards)) == (8, 60.0, 3, 2)


def test_a_worse_score_or_none_leaves_the_best(saver, tmp_path):
    events = Events()
    for number, (step, score) in enumerate([(4, 60.0), (8, 60.0), (12, 55.0), (16, None)], start=1):
        assert saver.improves(score) == (number == 1)
        answer(saver, number)
        saver.save(step, score, events)
        saver.finish(events)
        assert saver.best == 60.0
    assert [(name, step) for name, step, _ in events] == [("checkpoint", step) for step in (4, 8, 12, 16)]
    assert [step_of(path) for path in list_checkpoints(tmp_path)] == [16, 4]


def test_a_state_that_is_not_finite_is_not_saved_and_no_later_one(saver, tmp_path):
    """Until training has gone back."""
    events = Events()
    saver.engine.weight[1] = torch.nan
    answer(saver, 1)
    saver.save(4, None, events)
    saver.finish(events)
    assert events == [("save_failed", 4, "rank 0: model/layer is not finite: such a state is not saved")]
    assert saver.broken and list(tmp_path.iterdir()) == [] and not saver.state_is_finite()
    saver.engine.weight[1] = 1
    saver.save(8, None, events)
    assert saver.broken and (saver.begun, len(events)) == (4, 1) and saver.state_is_finite()
    saver.go_back(0, None)
    answer(saver, 2)
    saver.save(8, None, events)
    saver.finish(events)
    assert not saver.broken and events[1:] == [("checkpoint", 8, None)]
