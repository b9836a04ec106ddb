"""What torch.compile makes of a training step for a GPU, without one: ATen graphs, and the code with Triton kernels."""

import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from unittest import mock

import torch
import torch._functorch.config
import torch._inductor.config
import torch._inductor.lowering  # its decompositions refer to it
from torch import Tensor, fx
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.device_interface import CudaInterface
from torch._guards import detect_fake_mode
from torch._inductor.compile_fx import compile_fx_inner
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime.hints import DeviceProperties
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

GPU = torch.device("cuda", 0)
H200 = dict(multi_processor_count=132, major=9, minor=0, regs_per_multiprocessor=65536)
H200 |= dict(max_threads_per_multi_processor=2048, warp_size=32)


def graphs_of(step: Callable[..., Tensor], *inputs: Tensor) -> list[tuple[fx.GraphModule, list]]:
    """The ATen graphs of `step`, forward then backward, each with its fake inputs; nothing is run.

    step: from tensors to a loss that depends on parameters.
    """
    found = []

    def keep(graph: fx.GraphModule, arguments: list) -> Callable:
        found.append((graph, arguments))
        return lambda arguments: None

    made = aot_autograd(fw_compiler=keep, bw_compiler=keep, decompositions=select_decomp_table())

    def backend(graph: fx.GraphModule, arguments: list) -> Callable:
        with _pretend():
            made(graph, arguments)
        return lambda *arguments: (torch.zeros(()),)

    torch._dynamo.reset()
    with torch._functorch.config.patch(force_non_lazy_backward_lowering=True):
        torch.compile(step, backend=backend, fullgraph=True, dynamic=False)(*inputs)
    forward, backward = found
    return [forward, backward]


def code_of(graphs: list[tuple[fx.GraphModule, list]], options: dict) -> list[str]:
    """Inductor's code for each graph on an H200. options: as for torch.compile."""
    codes = []

    def generate(lowering: GraphLowering) -> SimpleNamespace:
        codes.append(lowering.codegen()[0].value)
        return SimpleNamespace(call=lambda arguments: None)

    for index, (graph, arguments) in enumerate(graphs):
        moved = _on_gpu(graph, arguments)
        with _pretend(), torch._inductor.config.patch(force_disable_caches=True, compile_threads=1, **options):
            with mock.patch.object(GraphLowering, "compile_to_module", generate):
                compile_fx_inner(graph, moved, is_backward=index == 1)
    return codes


def adds_atomically(code: str) -> bool:
    """Whether a kernel in Inductor's code, its own or one of ours, uses an atomic operation."""
    return "tl.atomic" in code or "'atomic_add_found': True" in code


def _on_gpu(graph: fx.GraphModule, arguments: list) -> list:
    """Move the graph, and return its fake inputs on the GPU."""
    mode = detect_fake_mode(arguments)
    for node in graph.graph.nodes:
        if node.kwargs.get("device") is not None:
            node.kwargs = {**node.kwargs, "device": GPU}
    graph.recompile()
    with mode:
        moved = [
            torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=GPU)
            if isinstance(value, Tensor)
            else value
            for value in arguments
        ]
    FakeTensorProp(graph, mode).propagate_dont_convert_inputs(*moved)
    return moved


@contextlib.contextmanager
def _pretend() -> Iterator[None]:
    """Answer Inductor's and Triton's questions for the GPU."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver

    target = SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", 90, 32), get_current_device=lambda: 0)
    properties = SimpleNamespace(**H200, name="NVIDIA H200", total_memory=140 << 30, gcnArchName="")
    with contextlib.ExitStack() as stack:
        for place, name, value in (
            (DeviceProperties, "create", lambda device: DeviceProperties(type="cuda", index=0, cc=90, **_known())),
            (torch.cuda, "get_device_properties", lambda *device: properties),
            (torch.cuda, "get_device_capability", lambda *device: (9, 0)),
            (torch.cuda, "current_device", lambda: 0),
            (torch._C, "_cuda_getDevice", lambda: 0),
            (CudaInterface, "is_bf16_supported", lambda **emulated: True),
            (CudaInterface, "raise_if_triton_unavailable", lambda *device: None),
            (torch._inductor.scheduler, "has_triton", lambda: True),
            (driver, "_active", target),
        ):
            stack.enter_context(mock.patch.object(place, name, value, create=True))
        yield


def _known() -> dict[str, int]:
    return {key: value for key, value in H200.items() if key != "minor"}
