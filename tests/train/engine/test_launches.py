"""How many kernels a GPU would launch for a step's norm, clipping, optimizer, EMA and casts.

Counted on a CPU, from the operators that two ranks call and the sizes of their tensors. The norm is a GPU's.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.runs import metrics, run

LIMIT = 20
# cat_base has this many parameters; the network that runs has the same layers with fewer channels, and each of its
# tensors is counted as if it were larger by the same factor.
PARAMETERS = 51_531_922
LAYERS = ["model.name=cat_base", "model.embed_dim=8", "model.depths=[1, 1, 6, 1]", "model.num_heads=[1, 1, 1, 1]"]
LAYERS += ["model.patch_size=2", "model.embed_patch_size=2", "data.image_size=32"]

# What launches nothing: views, memory without values, records of the profiler.
FREE = {"view", "_unsafe_view", "slice", "select", "detach", "alias", "as_strided", "split", "split_with_sizes"}
FREE |= {"empty", "empty_like", "new_empty", "_record_function_enter_new", "_record_function_exit"}

# Of torch's operators on lists of tensors (aten/src/ATen/native/cuda/MultiTensorApply.cuh): elements of a block, blocks
# of a launch, and tensors of a launch by the number of lists.
BLOCK, BLOCKS, TENSORS = 65_536, 320, (110, 64, 48, 36, 30)


def launches(name: str, arguments: tuple, larger: float) -> int:
    """Kernels of one call of an operator, for tensors that are `larger` times as large."""
    lists = [argument for argument in arguments if isinstance(argument, list) and argument]
    if not lists:
        return 1
    assert name in ("_foreach_add_", "_foreach_sub_", "_fused_adamw_", "_fused_sgd_"), f"{name}: how many kernels?"
    blocks = [-(-int(tensor.numel() * larger if tensor.ndim else 1) // BLOCK) for tensor in lists[0]]
    return max(-(-sum(blocks) // BLOCKS), -(-len(blocks) // TENSORS[len(lists) - 1]))


@dataclass(frozen=True)
class CountLaunches:
    """Rank 0 writes, for each of its steps, [operator, launches] of `Engine.step` and of the EMA."""

    path: Path

    def __call__(self, rank: int) -> None:
        from torch.utils._python_dispatch import TorchDispatchMode

        from train.engine.deepspeed_engine import Engine
        from train.engine.ema import Ema

        initialise = Engine.__init__

        def as_on_a_gpu(engine: Engine, *arguments: Any) -> None:
            initialise(engine, *arguments)
            engine._norm_at_once = True

        Engine.__init__ = as_on_a_gpu
        if rank:
            return
        steps: list[list[tuple[str, int]]] = []
        step, update = Engine.step, Ema.update

        class Count(TorchDispatchMode):
            def __init__(self, engine: Engine):
                super().__init__()
                self.larger = PARAMETERS / sum(parameter.numel() for parameter in engine.names)

            def __torch_dispatch__(self, function: Any, types: Iterable, arguments: tuple = (), options: Any = None):
                name = function.overloadpacket.__name__
                after_scatter = steps[-1] and steps[-1][-1][0] == "_reduce_scatter_base_"
                if function.namespace == "c10d":
                    steps[-1].append((name, 0))  # NCCL launches its own
                elif name not in FREE and not (after_scatter and name == "copy_"):  # gloo copies its result
                    steps[-1].append((name, launches(name, arguments, self.larger)))
                return function(*arguments, **(options or {}))

        def counted(engine: Engine, lr: float):
            steps.append([])
            with Count(engine):
                return step(engine, lr)

        def updated(ema: Ema, *arguments: Any):
            with Count(ema.engine):
                update(ema, *arguments)
            self.path.write_text(json.dumps(steps))

        Engine.step, Ema.update = counted, updated


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_step_launches_few_kernels(tiny_config, tmp_path, stage):
    """AdamW in bf16 with clipping and EMA, one micro-batch per rank. A further one adds one launch."""
    settings = [*LAYERS, f"zero.stage={stage}", "train.precision=bf16", "optimizer.clip_grad=1.0"]
    settings += ["train.global_batch=4", "train.micro_batch=2", "train.max_steps=2", "train.evaluate_every=0"]
    counted, plain = tmp_path / "counted", tmp_path / "plain"
    run(tiny_config, counted, *settings, world=2, before=CountLaunches(tmp_path / "steps.json"))
    first, second = json.loads((tmp_path / "steps.json").read_text())
    assert first == second
    assert {"_fused_adamw_", "_fused_sgd_", "linalg_vector_norm", "clamp"} <= {name for name, _ in second}
    assert sum(count for _, count in second) <= LIMIT, second
    if stage == 1:  # the norm at once is the norm by parameters
        run(tiny_config, plain, *settings, world=2)
        norms = [[line["grad_norm"] for line in metrics(folder, "train")] for folder in (counted, plain)]
        assert norms[0] == pytest.approx(norms[1], rel=1e-3, abs=0) and len(norms[0]) == 2
