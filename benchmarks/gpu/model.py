"""Speed of whole steps: parts `model`, `inference` and `layout` of `make gpu`.

Ours is CAT-B as configs/cat_b.yaml trains it, beside timm's Swin-S of the same size (2 % fewer FLOPs). All ways of one
job run one after the other in one process and free their memory in between; images lie on the device.

engine    what a run does but for the data: train/engine/ with its fp32 master weights, norm, clipping, AdamW and EMA
step      the bare network: forward, loss, backward, and a fused AdamW on its own bf16 weights
"""

import gc
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.gpu.parts import OURS, SWIN
from benchmarks.gpu.record import Record, Session
from benchmarks.graphs import host_seconds, rounds_of
from benchmarks.graphs import record as record_graph
from train.config import Config, load_config
from train.engine.deepspeed_engine import Engine, compile_settings
from train.engine.ema import Ema
from train.engine.flops import finish
from train.engine.runtime import Runtime, start_runtime, stop_runtime
from train.tasks.base import build_task

CLASSES = 1000
AT, AIM = 256, 5200  # a batch size, and the images/s of ours that are asked for
COMPILED = ("graphs", "compiled", "plain graphs", "plain compiled")  # ways of `training`


@dataclass
class Bench:
    """What the ways of one job share."""

    session: Session
    record: Record
    runtime: Runtime
    batch: int
    kept: Callable[[], object] | None = None  # the last way's step, before it was recorded
    step: Callable[[], object] | None = None  # the engine's

    def __post_init__(self):
        self.batch = self.session.size(self.batch, 2)
        side = self.session.size(224, 32)
        self.device, self.dtype = self.runtime.device, self.session.size(torch.bfloat16, torch.float32)
        self.images = torch.randn(self.batch, 3, side, side, device=self.device)
        self.targets = torch.rand(self.batch, CLASSES, device=self.device).softmax(dim=1)

    def config(self) -> Config:
        small = ["model.name=cat_nano", "data.image_size=32", "train.precision=fp32", "train.compile=false"]
        sizes = [f"train.micro_batch={self.batch}", f"train.global_batch={self.batch}"]
        return load_config("configs/cat_b.yaml", ["data.path=none", *sizes, *self.session.size([], small)])

    def build(self, model: str, plain: bool = False) -> nn.Module:
        """cat_base, with the recipe's dropout and drop-path, or a model of timm with the same drop-path. plain: without
        the Triton kernels."""
        if model == OURS:
            network = build_task(self.config(), [str(number) for number in range(CLASSES)]).initial_model()
            network.set_kernels(not plain)
        else:
            import timm

            size = self.session.size({}, {"img_size": 32, "window_size": 2})
            network = timm.create_model(model, drop_path_rate=0.3, num_classes=CLASSES, **size)
        return network.to(self.device, self.dtype)

    def compiled(self, network: nn.Module) -> Callable:
        """As a run compiles it; a rehearsal skips the last stage, which would take minutes."""
        if self.session.rehearsal:
            return torch.compile(network, dynamic=False, backend="aot_eager")
        return torch.compile(network, **compile_settings())

    def way(self, name: str, prepare: Callable[[], Callable[[], object]], keep: bool = False, **about: object) -> None:
        """Measure the step that `prepare` returns, in this job's turn. keep: what the last way compiled."""
        if not keep:
            self.kept = None
            torch.compiler.reset()
        release(self.device)
        before = memory(self.device).get("reserved_gb")

        def measure() -> dict:
            step = prepare()
            step()
            finish(self.device)
            self.session.turn()
            seconds = rounds_of(step, self.device, *self.session.size((10, 7), (1, 1)))
            rates = sorted(self.batch / one for one in seconds)
            speed = {"images_per_second": median(rates), "min": rates[0], "max": rates[-1]}
            times = {"ms": 1000 * median(seconds), "host_ms": 1000 * host_seconds(step, self.device)}
            return {**speed, **times, **memory(self.device), "before_gb": before}

        self.record.measure(f"{name}, batch {self.batch}", measure, batch=self.batch, **about)


def release(device: torch.device) -> None:
    """Return unused memory to the device, and begin to measure the peak anew."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def memory(device: torch.device) -> dict[str, float]:
    """GB of device memory: reserved now, with all graphs; and since `release` the most reserved and the most in use."""
    if device.type != "cuda":
        return {}
    held, most = torch.cuda.memory_reserved(device), torch.cuda.max_memory_reserved(device)
    return {
        "reserved_gb": held / 1e9,
        "peak_gb": most / 1e9,
        "allocated_gb": torch.cuda.max_memory_allocated(device) / 1e9,
    }


def training(session: Session, record: Record, model: str, batch: int, ways: tuple[str, ...]) -> None:
    """The job of a model and batch. ways: engine, graphs, compiled (without graphs), eager, plain (eager, without the
    kernels), plain graphs, plain compiled, eager graphs (not compiled). The engine's at AT comes with its kernels."""
    runtime = start_runtime()
    bench = Bench(session, record, runtime, batch)
    if profiled := "engine" in ways and batch == AT:
        kernels = Record(session.output / "gpu-profile.json", judge_profile, record.command)
        kernels.begin(["engine"])
    for way, last in zip(ways, (None, *ways), strict=False):
        about = {"model": model, "way": way, "mode": "training"}
        if way == "engine":
            bench.way(f"{model}, engine", lambda: engine_step(bench), **about)
            if profiled and bench.step:
                profile(bench, kernels)
                kernels.finish("engine")
        else:
            keep = (last, way) in (("graphs", "compiled"), ("plain graphs", "plain compiled"))  # what is compiled
            bench.way(f"{model}, {way}", lambda way=way: bare_step(bench, model, way), keep, **about)
    stop_runtime()


def engine_step(bench: Bench) -> Callable[[], object]:
    """A step of train/engine/, without data. Its own second call records the graph."""
    config = bench.config()
    task = build_task(config, [str(number) for number in range(CLASSES)])
    engine = Engine(task.initial_model(), task.losses_to_train, config, accumulation=1, device=bench.device)
    ema = Ema(engine, config.ema.decay)
    numbers = itertools.count()

    def step() -> None:
        number = next(numbers)
        torch.manual_seed(number)  # as a run does, for every micro-batch
        engine.accumulate((bench.images, bench.targets))
        ema.update(number, engine.step(1e-5).skipped)

    step()
    bench.step = step
    return step


def bare_step(bench: Bench, model: str, way: str) -> Callable[[], object]:
    """A step of the network alone in a way of `training`."""
    if bench.kept:
        return bench.kept
    network = bench.build(model, plain="plain" in way).train()
    call = bench.compiled(network) if way in COMPILED else network
    cuda = bench.device.type == "cuda"
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-5, fused=True, capturable=cuda)
    parameters, images = list(network.parameters()), bench.images.to(bench.dtype)

    def step() -> Tensor:
        loss = F.cross_entropy(call(images).float(), bench.targets)
        gradients = torch.autograd.grad(loss, parameters)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
        return loss.detach()

    bench.kept = step
    return record_graph(step, bench.device)[1] if "graphs" in way else step


def inference(session: Session, record: Record, model: str, batch: int) -> None:
    """The job of a model: eager, compiled, and compiled as a graph, without gradients."""
    runtime = start_runtime()
    bench = Bench(session, record, runtime, batch)

    network = bench.build(model).eval()
    images = bench.images.to(bench.dtype)
    calls = {"compiled": bench.compiled(network), "eager": network}

    def prepare(way: str) -> Callable[[], object]:
        call = calls.get(way, calls["compiled"])

        def step() -> Tensor:
            with torch.no_grad():
                return call(images)

        return record_graph(step, bench.device)[1] if way == "graphs" else step

    for way in ("graphs", "compiled", "eager"):
        bench.way(f"{model}, {way}", lambda way=way: prepare(way), keep=True, model=model, way=way, mode="inference")
    stop_runtime()


def layout(session: Session, record: Record, layout: str) -> None:
    """CoTNet-50 as a graph, with contiguous or with channels-last tensors."""
    import catmodel

    runtime = start_runtime()
    bench = Bench(session, record, runtime, 128)
    memory_format = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last}[layout]

    def prepare() -> Callable[[], object]:
        network = catmodel.create_model("cotnet50", img_size=session.size(224, 64))
        network = network.to(bench.device, bench.dtype, memory_format=memory_format).train()
        call, parameters = bench.compiled(network), list(network.parameters())
        images = bench.images.to(bench.dtype).contiguous(memory_format=memory_format)

        def step() -> tuple[Tensor, ...]:
            return torch.autograd.grad(F.cross_entropy(call(images).float(), bench.targets), parameters)

        return record_graph(step, bench.device)[1]

    bench.way(f"cotnet50, {layout}", prepare, layout=layout)
    stop_runtime()


def profile(bench: Bench, record: Record, steps: int = 5, most: int = 60) -> None:
    """Where a step's time on the device goes: gpu-profile.json, a row per kernel of the engine's step."""
    wall = median(rounds_of(bench.step, bench.device, *bench.session.size((5, 3), (1, 1))))
    total, events = kernels_of(bench.step, bench.device, steps)
    record.add(name="all kernels", **total, step_ms=1000 * wall)
    for event in events[:most]:
        record.add(**event)


def kernels_of(step: Callable[[], object], device: torch.device, steps: int) -> tuple[dict, list[dict]]:
    """The kernels of a step, as profiled: of all and of each, by time, "ms" on the device and "calls" per step.

    Without a GPU, PyTorch's operators instead.
    """
    from torch.profiler import ProfilerActivity

    cuda = device.type == "cuda"
    with torch.profiler.profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as profiler:
        for _ in range(steps):
            step()
        finish(device)
    events = [
        {
            "name": event.key[:150],
            "ms": (event.self_device_time_total if cuda else event.self_cpu_time_total) / 1000 / steps,
            "calls": event.count / steps,
        }
        for event in profiler.key_averages()
        if not cuda or event.device_type == torch.autograd.DeviceType.CUDA
    ]
    events.sort(key=lambda event: -event["ms"])
    return {key: sum(event[key] for event in events) for key in ("ms", "calls")}, events


def judge(rows: list[dict]) -> tuple[bool, str]:
    """The fastest way of ours at the largest batch, beside the aim and Swin-S."""
    speeds = {(row["model"], row["way"], row["batch"]): row["images_per_second"] for row in rows}
    batch = max(row["batch"] for row in rows)
    said = []
    if own := [speeds[key] for key in ((OURS, "engine", batch), (OURS, "graphs", batch)) if key in speeds]:
        said.append(f"{OURS}, batch {batch}: {max(own):,.0f} images/s (aim {AIM:,})")
        if (SWIN, "graphs", batch) in speeds:
            said.append(f"{max(own) / speeds[SWIN, 'graphs', batch]:.2f} x Swin-S")
    for way, plain, aim in (("eager", "plain", 1.3), ("compiled", "plain compiled", 1)):
        for at in (key[2] for key in speeds if key[:2] == (OURS, way)):
            if (OURS, plain, at) in speeds:
                ratio = speeds[OURS, way, at] / speeds[OURS, plain, at]
                said.append(f"{way} {ratio:.2f} x plain {way} (aim {aim})")
    return bool(said), ", ".join(said)


def judge_inference(rows: list[dict]) -> tuple[bool, str]:
    return bool(rows), ", ".join(f"{row['name']}: {row['images_per_second']:,.0f} images/s" for row in rows)


def judge_profile(rows: list[dict]) -> tuple[bool, str]:
    total = rows[0]
    return (
        True,
        f"{total['ms']:.1f} ms of kernels in {total['calls']:.0f} launches, in a step of {total['step_ms']:.1f} ms",
    )
