"""`train.compile`: results equal eager ones up to rounding, and resume is exact."""

import pytest

from tests.oracle import assert_same_state, state
from tests.runs import losses, run, start

# One stage of one block, because compilation takes most of the time.
SMALL = ["model.depths=[1]", "model.num_heads=[2]", "train.max_steps=4", "checkpoint.every_steps=2"]


@pytest.mark.slow
def test_a_compiled_run_is_the_same_but_for_rounding_and_resumes_exactly(tiny_config, tmp_path):
    """With dropout and drop-path, whose random numbers must be the same with and without compilation."""
    run(tiny_config, tmp_path / "eager", *SMALL)
    run(tiny_config, tmp_path / "whole", *SMALL, "train.compile=true")
    assert losses(tmp_path / "whole") == pytest.approx(losses(tmp_path / "eager"), rel=1e-4)
    run(tiny_config, tmp_path / "resumed", *SMALL, "train.compile=true", "train.max_steps=2")
    run(tiny_config, tmp_path / "resumed", *SMALL, "train.compile=true")
    assert losses(tmp_path / "resumed") == losses(tmp_path / "whole")
    assert_same_state(state(tmp_path / "resumed", 4), state(tmp_path / "whole", 4))


def test_zero_3_is_refused(tiny_config, tmp_path):
    job = start(tiny_config, tmp_path, "train.compile=true", "zero.stage=3")
    assert job.wait() == [78]
    assert "train.compile needs zero.stage 0, 1 or 2" in job.text()
