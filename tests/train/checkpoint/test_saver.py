"""A save with a rank that does not report, on a real store. With real ranks and disks: test_save_faults.py, a folder
above.
"""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from train.checkpoint.info import CheckpointInfo, list_checkpoints, read_info
from train.checkpoint.saver import Saver
from train.engine.deepspeed_engine import Fragment
from train.guard.rank_store import Store
from train.telemetry.metrics import Metric


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Events(list):
    """In place of a monitor: keeps what is reported."""

    def event(self, name: str, step: int, text: str, **fields: object) -> None:
        self.append((name, step, fields.get("reason")))


def test_a_rank_that_does_not_report_costs_one_checkpoint(tmp_path):
    """The one of step 4. The other rank's answer to the next save is there."""
    engine = SimpleNamespace(
        rank=0,
        world=2,
        device=torch.device("cpu"),
        fragments=lambda: [Fragment("layer", 6, torch.ones(2), {})],
        whole=dict,
        optimizer_step_count=lambda: 3,
        loss_scale_state=dict,
    )
    settings = SimpleNamespace(
        checkpoint=SimpleNamespace(keep=1), guard=SimpleNamespace(timeout=SimpleNamespace(save=0.5))
    )
    about, metric = (
        CheckpointInfo(0, None, "", [], {"data": {"path": ""}}, 0, {}, {}, {}, 2),
        Metric("a", "a", "%", "higher"),
    )
    store, events = Store(), Events()
    saver = Saver(tmp_path, about, metric, 50.0, engine, None, store, settings)
    saver.save(4, 60.0, events)
    assert (saver.begun, saver.best) == (4, 60.0)
    saver.wait_and_report(events)
    failure = "rank 1 has not written its share after 0.5 s"
    assert events == [("save_failed", 4, failure)] and saver.failure == failure
    assert (saver.saved, saver.best, list(tmp_path.iterdir())) == (0, 50.0, [])
    assert saver.improves(60.0) and not saver.improves(50.0) and not saver.improves(None)
    store.set("save/2/1", f"ok shard_00001.safetensors {'0' * 64}")
    saver.save(8, 60.0, events)
    saver.finish(events)
    assert events[1:] == [("checkpoint", 8, None)] and (saver.saved, saver.best, saver.broken) == (8, 60.0, False)
    (path,) = list_checkpoints(tmp_path)
    info = read_info(path)
    assert (info.step, info.score, info.optimizer_step, len(info.shards)) == (8, 60.0, 3, 2)
    saver.close()
    saver._thread.join(60)
    assert not saver._thread.is_alive()
