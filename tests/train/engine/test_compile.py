"""`train.compile`: results equal eager ones up to rounding, and resume is exact."""

import pytest
import torch

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


def test_a_network_is_compiled_for_every_shape():
    """torch's own limit is 8 shapes; it then goes on without compilation."""
    from train.engine.deepspeed_engine import allow_shapes

    def compiled_shapes(shapes: int) -> int:
        found = []

        def backend(graph, inputs):
            found.append(graph)
            return graph

        torch.compiler.reset()
        network = torch.nn.Sequential(torch.nn.Conv2d(3, 3, 1))  # PyTorch 2.11 does not compile a layer of its own
        network.compile(backend=backend, dynamic=False)
        for number in range(shapes):
            network(torch.zeros(1, 3, 4, 4 + number))
        return len(found)

    with torch._dynamo.config.patch(recompile_limit=8, accumulated_recompile_limit=16):
        assert compiled_shapes(20) == 8
        allow_shapes(20)
        assert compiled_shapes(20) == 20
        allow_shapes(1)
        assert compiled_shapes(20) == 20
