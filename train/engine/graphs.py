"""CUDA graphs: a function's kernels, recorded once and then started together.

A training step of these models has about two thousand kernels, most of which take less time than the host needs to
start one. Replaying a graph starts all of them in some microseconds.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from train.config import Config, ConfigError


class Recording(NamedTuple):
    """A recorded call. replay: repeat it, from what is in `inputs` now, into `outputs`."""

    inputs: list[Tensor]
    outputs: Any
    replay: Callable[[], None]


class Replayed:
    """A function from a structure of tensors to another one, replayed as a CUDA graph from its second call on.

    The first call with inputs of certain shapes runs the function as it is, which compiles and warms up what it uses;
    the second one records it. Random numbers of torch's generators in a graph are the same functions of the seed as
    without: `torch.manual_seed` applies to replays, too. The function must neither wait for the device nor read a
    generator's state, and its only effects beside the result may be changes of tensors that exist when it is recorded.

    All graphs of a process use one pool of memory. That is safe because the results are copied out of it before the
    next graph is replayed.
    """

    pool: Any = None

    def __init__(self, function: Callable[[Any], Any]):
        self._function = function
        self._warm: set[tuple] = set()
        self._recordings: dict[tuple, Recording] = {}

    def __call__(self, inputs: Any) -> Any:
        leaves, structure = tree_flatten(inputs)
        shapes = tuple((leaf.shape, leaf.dtype) for leaf in leaves)
        if shapes not in self._warm:
            self._warm.add(shapes)
            return self._function(inputs)
        if shapes not in self._recordings:
            copies = [leaf.clone() for leaf in leaves]
            self._recordings[shapes] = Recording(copies, *self.record(tree_unflatten(copies, structure)))
        recording = self._recordings[shapes]
        for copy, leaf in zip(recording.inputs, leaves, strict=True):
            copy.copy_(leaf)
        recording.replay()
        return tree_map(torch.clone, recording.outputs)

    def record(self, inputs: Any) -> tuple[Any, Callable[[], None]]:
        """Record a call. Returns the tensors that replays write, and the function that replays it."""
        Replayed.pool = Replayed.pool or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # thread_local: other threads of this process may use the device meanwhile (pinned copies, checkpoints).
        where = dict(pool=Replayed.pool, stream=torch.cuda.current_stream(), capture_error_mode="thread_local")
        with torch.cuda.graph(graph, **where):
            outputs = self._function(inputs)
        return outputs, graph.replay


def graphs_wanted(
    config: Config, device: torch.device, gradients_here: bool, shapes: int = 1
) -> tuple[bool, str | None]:
    """Whether steps are replayed as CUDA graphs (train.cuda_graphs), and a sentence about it for the log.

    shapes: how many shapes the inputs may have. Each would be a graph of its own, which keeps a gradient in memory.
    Raises ConfigError if they are demanded where they cannot be.
    """
    wanted = config.train.cuda_graphs
    if device.type != "cuda":
        if wanted is True:
            raise ConfigError("train.cuda_graphs=true needs a GPU; auto uses CUDA graphs where they can be")
        return False, None
    if wanted is False or (wanted == "auto" and not config.train.compile):
        return False, None
    if not gradients_here:
        why = "zero.offload" if config.zero.offload else f"zero.stage={config.zero.stage}"
        if wanted is True:
            raise ConfigError(f"train.cuda_graphs=true does not work with {why}; auto leaves them out")
        return False, f"steps are not replayed as CUDA graphs, which {why} does not allow"
    if shapes > 1 and wanted == "auto":
        return False, f"steps are not replayed as CUDA graphs, as training inputs may have {shapes} shapes"
    return True, "steps are replayed as CUDA graphs from the second micro-batch on"
