"""What is reported of samples and reads that fail, and when it is too much; on one rank.

On several: test_data_faults.py, a folder above.
"""

from types import SimpleNamespace

import pytest
import torch.distributed as dist

from data_pipeline.faults import PassingFault
from data_pipeline.loader import BadSample
from data_pipeline.split import DataError
from train.guard.bad_samples import BadSamples


@pytest.fixture(autouse=True)
def alone():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Events(list):
    """In place of a monitor: keeps what is reported."""

    def event(self, name: str, step: int, text: str, **fields: object) -> None:
        self.append((name, step, fields.get("id", fields.get("count"))))


def batch(*ids: int, faults: tuple[PassingFault, ...] = ()) -> SimpleNamespace:
    return SimpleNamespace(bad=[BadSample(number, f"sample {number} is bad", None) for number in ids], faults=faults)


def test_a_sample_of_a_split_is_reported_once_and_the_budget_is_what_is_allowed():
    bad, events = BadSamples(3, "somewhere", 0), Events()
    bad.meet("train", 1, batch(4, 7))
    bad.meet("train", 2, batch(7))
    assert bad.new == 2
    bad.agree(events)
    assert bad.new == 0 and events == [("bad_sample", 1, 4), ("bad_sample", 1, 7)]
    bad.meet("train", 9, batch(4))
    bad.meet("val", 10, batch(4))
    assert bad.new == 1
    bad.agree(events)
    assert events[2:] == [("bad_sample", 10, 4)]
    bad.meet("val", 20, batch(5))
    with pytest.raises(DataError, match="sample 5 is bad That makes 4 samples .* guard.bad_samples allows 3"):
        bad.agree(events)
    assert events[3:] == [("bad_sample", 20, 5)]


def test_faults_of_a_kind_are_one_report_with_their_number():
    bad, events = BadSamples(0, "somewhere", 0), Events()
    timeouts = (PassingFault("a.tar", "Connection timed out", 2), PassingFault("b.tar", "Connection timed out", 3))
    bad.meet("train", 1, batch(faults=timeouts))
    bad.meet("train", 2, batch(faults=(PassingFault("a.tar", "Input/output error", 1),)))
    assert bad.new == 2
    bad.agree(events)
    assert events == [("io_retry", 1, 5), ("io_retry", 2, 1)] and bad.new == 0
    bad.agree(events)
    assert len(events) == 2
