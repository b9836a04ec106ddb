"""Speed of a model's steps beside the same model done otherwise and beside models of its size, interleaved in one run.

The weights and images are in the precision that is asked for, as under DeepSpeed. The optimizer is a plain fused AdamW on those weights
for all alike: DeepSpeed keeps fp32 masters beside bf16 weights, which costs all of them the same.
"""

import copy
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import catmodel
from benchmarks.data import interleave, summary
from benchmarks.roofline import Roofline, bytes_per_image, flops_per_image, replaced
from catmodel import attention
from catmodel.attention import Patches
from catmodel.cat import Stage
from train.engine.deepspeed_engine import compile_settings
from train.engine.flops import finish

WAYS = ("ours", "compiled", "plain", "released", "timm")
OTHERS = ("channels_last",)  # that are done when they are asked for
MODES = ("training", "inference")
CONTIGUOUS = torch.contiguous_format
# timm's models of about the same GMACs at 224 x 224 (CAT-T 2.8, S 6.1, B 8.9): Swin-T 4.5, S 8.7; PVTv2-B1 2.1, B3 6.9, B4 10.1.
SAME_SIZE = {
    "cat_tiny": ("swin_tiny_patch4_window7_224", "pvt_v2_b1"),
    "cat_small": ("swin_tiny_patch4_window7_224", "pvt_v2_b3"),
    "cat_base": ("swin_small_patch4_window7_224", "pvt_v2_b4"),
}


class ReleasedStage(Stage):
    """What the released code's stage costs: each block is recomputed in the backward pass, always, and tokens are kept row by row, so that
    every attention copies them into patches and back. To be run inside `released_attention`."""

    grad_checkpointing = True

    def patches(self, x_BHWC: Tensor) -> Patches:
        return Patches(x_BHWC.shape[1], x_BHWC.shape[2], self.patch_size, by_row=True)


def released_attention():
    """Attention as the released code has it, step by step, with PyTorch's dropout (ours draws a mask that the kernels can draw, too)."""

    def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, rate: float = 0.0, seed: Tensor | None = None) -> Tensor:
        weights = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        weights = (weights if bias is None else weights + bias).softmax(dim=-1)
        return (F.dropout(weights, rate) if rate else weights) @ v

    return replaced(attention, "attend", attend)


@dataclass(frozen=True)
class Setting:
    """What all ways of a bench share."""

    device: torch.device
    dtype: torch.dtype
    batch: int
    training: bool

    def images(self, count: int, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """`count` random images and labels."""
        return torch.randn(count, 3, size, size, device=device).to(self.dtype), torch.randint(10, (count,), device=device)


@dataclass
class Way:
    """One way to do a step: a model, and where its time went, in milliseconds of every step since the first call."""

    name: str
    model: nn.Module
    flops: float
    moved: Counter | None
    released: bool = False
    memory_format: torch.memory_format = CONTIGUOUS  # of images and weights
    milliseconds: list[list[float]] = field(default_factory=list)
    peak_bytes: int | None = None


class Clock:
    """Times between marks, as the device sees them: on a GPU nobody waits for it until they are read."""

    def __init__(self, device: torch.device):
        self.device, self.marks = device, []

    def mark(self) -> None:
        if self.device.type == "cuda":
            self.marks.append(torch.cuda.Event(enable_timing=True))
            self.marks[-1].record()
        else:
            self.marks.append(time.perf_counter())

    def milliseconds(self) -> list[float]:
        """Between one mark and the next. Waits for the device."""
        finish(self.device)
        if self.device.type == "cuda":
            return [one.elapsed_time(two) for one, two in zip(self.marks, self.marks[1:], strict=False)]
        return [1000 * (two - one) for one, two in zip(self.marks, self.marks[1:], strict=False)]


def count_model(name: str, setting: Setting, roofline: Roofline, ways: tuple[str, ...]) -> dict[str, dict[str, float]]:
    """Per way that can be counted: gflops, megabytes and floor as in `bench_model`, and the megabytes of the operators that move most.

    The setting's device is the meta device.
    """
    rows = {}
    for way in build_ways(name, setting, ways):
        if way.moved:
            row = rows[way.name] = {"gflops": way.flops / 1e9, "megabytes": way.moved.total() / 1e6}
            row["floor"] = roofline.floor(way.flops, way.moved.total())
            row["operators"] = {operator: moved / 1e6 for operator, moved in way.moved.most_common(15)}
    return rows


def build_ways(name: str, setting: Setting, ways: tuple[str, ...]) -> list[Way]:
    """The model `name` in the given ways (of WAYS and OTHERS), and timm's of its size. Raises ValueError where there is no such model."""
    built, dtype, training, meta = [], setting.dtype, setting.training, torch.device("meta")

    def add(
        title: str,
        create: Callable[[], nn.Module],
        compiled: bool = False,
        released: bool = False,
        layout: torch.memory_format = CONTIGUOUS,
    ) -> None:
        with setting.device:  # where drawing weights takes no time
            model = create().to(dtype, memory_format=layout).train(training)
        if released:
            for stage in model.layers:
                stage.__class__ = ReleasedStage
                del stage.grad_checkpointing  # the instance's, so that the class's is seen
        shadow = copy.deepcopy(model).to(meta)
        size, step = image_size(model), one_step(shadow, training, released)
        fused = setting.device.type != "cpu"
        moved = None if compiled else bytes_per_image(lambda n: step(*setting.images(n, size, meta)), setting.batch, fused)
        flops = flops_per_image(plain(shadow), size, training=training)
        built.append(Way(title, torch.compile(model, **compile_settings()) if compiled else model, flops, moved, released, layout))

    def ours() -> nn.Module:
        return catmodel.create_model(name)

    for way in ways:
        if way == "timm":
            import timm

            for other in SAME_SIZE.get(name, ()):
                add(other, lambda other=other: timm.create_model(other, drop_path_rate=0.1))
        elif way == "compiled":
            add("ours, compiled", ours, compiled=True)
        elif way == "plain":
            add("plain", lambda: plain(ours()))
        elif way == "channels_last":
            add("ours, channels-last", ours, layout=torch.channels_last)
        else:
            add(way, ours, released=way == "released")
    return built


def plain(model: nn.Module) -> nn.Module:
    if hasattr(model, "set_kernels"):
        model.set_kernels(False)
    return model


def image_size(model: nn.Module) -> int:
    return model.img_size[0] if hasattr(model, "img_size") else 224


def one_step(
    model: nn.Module, training: bool, released: bool = False, clock: Clock | None = None, optimizer: torch.optim.Optimizer | None = None
) -> Callable[[Tensor, Tensor], None]:
    """A function (images, labels) that does a step of the model, and marks on the clock where its forward, backward and optimizer end."""
    mark = clock.mark if clock else lambda: None

    def step(images: Tensor, labels: Tensor) -> None:
        mark()
        loss = F.cross_entropy(model(images).float(), labels)
        mark()
        if training:
            loss.backward()
            mark()
            if optimizer:
                optimizer.step()
            model.zero_grad()
            mark()

    def in_its_way(images: Tensor, labels: Tensor) -> None:
        with torch.set_grad_enabled(training):
            if not released:
                return step(images, labels)
            with released_attention():  # around the backward pass, too, which recomputes
                step(images, labels)

    return in_its_way


def bench_model(name: str, setting: Setting, roofline: Roofline, ways: tuple[str, ...], steps: int, rounds: int) -> dict[str, dict]:
    """Per way of doing a step: `benchmarks.data.summary` of its images/s against the released design (or what is
    first), and beside it

    gflops, of an image; per_gflop: images/s for each of them; mfu: the share of the measured matrix products' rate. megabytes: moved per
    image by forward and backward (None where compiled: its operators are not known); floor: the most images/s that the roofline allows;
    of_floor. peak_gb: of device memory, None on a CPU. milliseconds: of a step's forward, backward and optimizer, medians.
    """
    built = build_ways(name, setting, ways)
    rates = interleave({way.name: runner(way, setting, steps) for way in built}, steps * setting.batch, rounds, time.perf_counter)
    rows = summary(rates, "released" if "released" in rates else next(iter(rates)))
    for way in built:
        row = rows[way.name]
        speed, gflops = row["median"], way.flops / 1e9
        row |= {"gflops": gflops, "per_gflop": speed / gflops, "mfu": speed * way.flops / roofline.flops, "megabytes": None, "floor": None}
        row |= {"of_floor": None, "peak_gb": way.peak_bytes and way.peak_bytes / 1e9}
        if way.moved:
            floor = roofline.floor(way.flops, way.moved.total())
            row |= {"megabytes": way.moved.total() / 1e6, "floor": floor, "of_floor": speed / floor}
        phases = zip(*way.milliseconds[steps:], strict=True)  # without the round that warms up
        medians = [sorted(times)[len(times) // 2] for times in phases]
        row["milliseconds"] = dict(zip(("forward", "backward", "optimizer"), medians, strict=False))
    return rows


def runner(way: Way, setting: Setting, steps: int) -> Callable[[], None]:
    """A function that does `steps` steps of one batch, and notes their times; the first time, the memory they need, weights included."""
    model, weights = way.model, sum(weight.nbytes for weight in way.model.parameters())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True) if setting.training else None
    device = setting.device
    images, labels = setting.images(setting.batch, image_size(model), device)
    images = images.contiguous(memory_format=way.memory_format)

    def run() -> None:
        first = way.peak_bytes is None and device.type == "cuda"
        if first:
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device) - weights
        clocks = [Clock(device) for _ in range(steps)]
        for clock in clocks:
            one_step(model, setting.training, way.released, clock, optimizer)(images, labels)
        finish(device)
        way.milliseconds += [clock.milliseconds() for clock in clocks]
        if first:
            way.peak_bytes = torch.cuda.max_memory_allocated(device) - before

    return run


def profile(name: str, setting: Setting, folder: Path, steps: int = 3) -> list[dict]:
    """A Chrome trace of `steps` of our way in `folder`, and the 20 operators or kernels that took longest, in milliseconds per step."""
    from torch.profiler import ProfilerActivity

    device, training = setting.device, setting.training
    cuda = device.type == "cuda"
    model = catmodel.create_model(name).to(device, setting.dtype).train(training)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True) if training else None
    step, batch = one_step(model, training, optimizer=optimizer), setting.images(setting.batch, image_size(model), device)
    step(*batch)
    finish(device)
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if cuda else [])
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(steps):
            step(*batch)
        finish(device)
    folder.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(folder / f"{name}-{MODES[not training]}.json"))
    spent = [(event.self_device_time_total if cuda else event.self_cpu_time_total, event) for event in profiler.key_averages()]
    # On a GPU only kernels: an operator's time there is that of the kernels it starts.
    spent = [(time, event) for time, event in spent if not cuda or event.device_type == torch.autograd.DeviceType.CUDA]
    spent.sort(key=lambda pair: -pair[0])
    return [{"name": event.key, "calls": event.count / steps, "milliseconds": time / 1000 / steps} for time, event in spent[:20]]


def model_table(rows: dict[str, dict]) -> str:
    """`bench_model`'s result as text."""
    titles = ("img/s", "min", "max", "ratio", "MFU", "img/s/GFLOP", "MB/img", "of floor", "GB", "fwd ms", "bwd ms", "opt ms")
    lines = ["".join([f"{'':32}", *(f"{title:>{max(9, len(title) + 2)}}" for title in titles)])]
    for name, row in rows.items():
        phases = [row["milliseconds"].get(phase) for phase in ("forward", "backward", "optimizer")]
        values = [row[key] for key in ("median", "min", "max", "ratio", "mfu", "per_gflop", "megabytes", "of_floor", "peak_gb")] + phases
        cells = ["-" if value is None else f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}" for value in values]
        lines.append("".join([f"{name:32}", *(f"{cell:>{max(9, len(title) + 2)}}" for cell, title in zip(cells, titles, strict=True))]))
    return "\n".join(lines)
