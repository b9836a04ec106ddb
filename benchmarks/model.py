"""Speed of a model's steps compared with other implementations of it and with timm's models of its size, interleaved.

Weights and images have the requested precision, as under DeepSpeed. The optimizer is a fused AdamW on those weights,
for all ways: the fp32 master weights that DeepSpeed keeps would cost all of them the same.
"""

import copy
import time
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import catmodel
from benchmarks.measure import DeviceTimer, interleave, summary
from benchmarks.roofline import Roofline, bytes_per_image, flops_per_image, replaced
from catmodel import attention
from catmodel.cat import Stage
from catmodel.patches import Patches
from train.engine.deepspeed_engine import DTYPES, compile_settings
from train.engine.flops import finish
from train.telemetry.formatting import table

WAYS = ("ours", "compiled", "plain", "released", "timm")
OTHERS = ("channels_last",)  # measured only on request
MODES = ("training", "inference")
PHASES = ("forward", "backward", "optimizer")
CONTIGUOUS = torch.contiguous_format
# timm's models with about the same GMACs at 224 x 224 (CAT-T 2.8, S 6.1, B 8.9): Swin-T 4.5, S 8.7; PVTv2-B1 2.1, B3
# 6.9, B4 10.1.
SAME_SIZE = {
    "cat_tiny": ("swin_tiny_patch4_window7_224", "pvt_v2_b1"),
    "cat_small": ("swin_tiny_patch4_window7_224", "pvt_v2_b3"),
    "cat_base": ("swin_small_patch4_window7_224", "pvt_v2_b4"),
}


class ReleasedStage(Stage):
    """A stage with the cost of the released code's: the backward pass always recomputes each block, and tokens are
    stored row by row, so that every attention copies them into patches and back. To be run inside
    `released_attention`."""

    grad_checkpointing = True

    def patches(self, x_BHWC: Tensor) -> Patches:
        return Patches(x_BHWC.shape[1], x_BHWC.shape[2], self.patch_size, by_row=True)


def released_attention() -> AbstractContextManager[None]:
    """Replace attention by the released code's: unfused, with PyTorch's own dropout.

    For its cost only: a recomputed block draws another mask than in the forward pass.
    """

    def attend(
        q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, rate: float = 0.0, seed: Tensor | None = None
    ) -> Tensor:
        weights = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        weights = (weights if bias is None else weights + bias).softmax(dim=-1)
        return (F.dropout(weights, rate) if rate else weights) @ v

    return replaced(attention, "attend", attend)


@dataclass(frozen=True)
class Setting:
    """What all ways of a benchmark share."""

    device: torch.device
    dtype: torch.dtype
    batch: int
    training: bool

    def images(self, count: int, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """`count` random images and labels."""
        return torch.randn(count, 3, size, size, device=device).to(self.dtype), torch.randint(
            10, (count,), device=device
        )


@dataclass
class Way:
    """One implementation of a step.

    flops, moved: floating-point operations and bytes of an image; moved is None if not known. milliseconds: of the
    phases of every step. peak_bytes: of device memory, in the first call.
    """

    name: str
    model: nn.Module
    flops: float
    moved: Counter | None
    released: bool = False
    memory_format: torch.memory_format = CONTIGUOUS  # of images and weights
    milliseconds: list[list[float]] = field(default_factory=list)
    peak_bytes: int | None = None


def run(
    names: list[str],
    modes: tuple[str, ...],
    ways: tuple[str, ...],
    device: torch.device,
    precision: str,
    roofline: Roofline,
    batch: int,
    steps: int,
    rounds: int,
    profile_folder: str | None,
) -> dict[str, dict[str, dict]]:
    """Measure (on the meta device: count) each model in each mode; print and return model → mode → rows."""
    results: dict[str, dict[str, dict]] = {}
    for name in names:
        for mode in modes:
            setting = Setting(device, DTYPES[precision], batch, mode == "training")
            title = f"\n{name}, {mode}, {precision}, batch {batch}"
            found = results.setdefault(name, {})[mode] = {}
            if device.type == "meta":
                found["rows"] = count_model(name, setting, roofline, ways)
                print(f"{title}\n{count_table(found['rows'])}")
                continue
            found["rows"] = bench_model(name, setting, roofline, ways, steps, rounds)
            print(f"{title}\n{model_table(found['rows'])}", flush=True)
            if profile_folder:
                top = found["profile"] = profile(name, setting, Path(profile_folder))
                cells = [[row["name"][:110], f"{row['milliseconds']:.2f}", f"{row['calls']:.0f}"] for row in top]
                print(f"\ntrace: {profile_folder}/{name}-{mode}.json")
                print(table([["", "ms per step", "calls"], *cells]), flush=True)
    return results


def count_model(name: str, setting: Setting, roofline: Roofline, ways: tuple[str, ...]) -> dict[str, dict[str, float]]:
    """Per way whose operators are known: gflops, megabytes and floor as in `bench_model`, and the megabytes of the
    operators that move most. The setting's device is the meta device."""
    rows = {}
    for way in build_ways(name, setting, ways):
        if way.moved:
            row = rows[way.name] = {"gflops": way.flops / 1e9, "megabytes": way.moved.total() / 1e6}
            row["floor"] = roofline.floor(way.flops, way.moved.total())
            row["operators"] = {operator: moved / 1e6 for operator, moved in way.moved.most_common(15)}
    return rows


def build_ways(name: str, setting: Setting, ways: tuple[str, ...]) -> list[Way]:
    """The model `name` in the given ways (of WAYS and OTHERS). Raises ValueError for an unknown model."""
    built, dtype, training, meta = [], setting.dtype, setting.training, torch.device("meta")

    def add(
        title: str,
        create: Callable[[], nn.Module],
        compiled: bool = False,
        released: bool = False,
        layout: torch.memory_format = CONTIGUOUS,
    ) -> None:
        with setting.device:  # drawing the weights is fast there
            model = create().to(dtype, memory_format=layout).train(training)
        if released:
            for stage in model.layers:
                stage.__class__ = ReleasedStage
                del stage.grad_checkpointing  # the instance's, which hides the class's
        shadow = copy.deepcopy(model).to(meta)
        size, step = image_size(model), one_step(shadow, training, released)
        fused = setting.device.type != "cpu"
        moved = (
            None if compiled else bytes_per_image(lambda n: step(*setting.images(n, size, meta)), setting.batch, fused)
        )
        flops = flops_per_image(plain(shadow), size, training=training)
        built.append(
            Way(
                title, torch.compile(model, **compile_settings()) if compiled else model, flops, moved, released, layout
            )
        )

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
    """The model itself, with its Triton kernels turned off."""
    if hasattr(model, "set_kernels"):
        model.set_kernels(False)
    return model


def image_size(model: nn.Module) -> int:
    return model.img_size[0] if hasattr(model, "img_size") else 224


def one_step(
    model: nn.Module,
    training: bool,
    released: bool = False,
    timer: DeviceTimer | None = None,
    optimizer: torch.optim.Optimizer | None = None,
) -> Callable[[Tensor, Tensor], None]:
    """A function (images, labels) that runs one step of the model; `timer` is marked before and after each phase."""
    mark = timer.mark if timer else lambda: None

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

    def run(images: Tensor, labels: Tensor) -> None:
        with torch.set_grad_enabled(training):
            if not released:
                return step(images, labels)
            with released_attention():  # around the backward pass too, because it recomputes
                step(images, labels)

    return run


def bench_model(
    name: str, setting: Setting, roofline: Roofline, ways: tuple[str, ...], steps: int, rounds: int
) -> dict[str, dict]:
    """Per way: `summary` of its images/s relative to the way "released" (or the first one), and

    gflops: of an image. per_gflop: images/s per GFLOP of an image. mfu: share of the measured rate of matrix products.
    megabytes: moved per image by forward and backward; None if compiled, because the operators are not known. floor:
    the most images/s that the roofline allows. of_floor: the share of it. peak_gb: of device memory; None on a CPU.
    milliseconds: medians over the steps of forward, backward and optimizer.
    """
    built = build_ways(name, setting, ways)
    rates = interleave(
        {way.name: runner(way, setting, steps) for way in built}, steps * setting.batch, rounds, time.perf_counter
    )
    rows = summary(rates, "released" if "released" in rates else next(iter(rates)))
    for way in built:
        row = rows[way.name]
        speed, gflops = row["median"], way.flops / 1e9
        row |= {
            "gflops": gflops,
            "per_gflop": speed / gflops,
            "mfu": speed * way.flops / roofline.flops,
            "megabytes": None,
            "floor": None,
        }
        row |= {"of_floor": None, "peak_gb": way.peak_bytes and way.peak_bytes / 1e9}
        if way.moved:
            floor = roofline.floor(way.flops, way.moved.total())
            row |= {"megabytes": way.moved.total() / 1e6, "floor": floor, "of_floor": speed / floor}
        phases = zip(*way.milliseconds[steps:], strict=True)  # without the warm-up round
        medians = [sorted(times)[len(times) // 2] for times in phases]
        row["milliseconds"] = dict(zip(PHASES, medians, strict=False))
    return rows


def runner(way: Way, setting: Setting, steps: int) -> Callable[[], None]:
    """A function that runs `steps` steps of one batch and records their times and, the first time, peak memory."""
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
        timers = [DeviceTimer(device) for _ in range(steps)]
        for timer in timers:
            one_step(model, setting.training, way.released, timer, optimizer)(images, labels)
        finish(device)
        way.milliseconds += [timer.milliseconds() for timer in timers]
        if first:
            way.peak_bytes = torch.cuda.max_memory_allocated(device) - before

    return run


def profile(name: str, setting: Setting, folder: Path, steps: int = 3) -> list[dict]:
    """Write a Chrome trace of `steps` steps into `folder`. Returns the 20 operators or kernels that took longest."""
    from torch.profiler import ProfilerActivity

    device, training = setting.device, setting.training
    cuda = device.type == "cuda"
    model = catmodel.create_model(name).to(device, setting.dtype).train(training)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True) if training else None
    step, batch = (
        one_step(model, training, optimizer=optimizer),
        setting.images(setting.batch, image_size(model), device),
    )
    step(*batch)
    finish(device)
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if cuda else [])
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(steps):
            step(*batch)
        finish(device)
    folder.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(folder / f"{name}-{MODES[not training]}.json"))
    spent = [
        (event.self_device_time_total if cuda else event.self_cpu_time_total, event)
        for event in profiler.key_averages()
    ]
    # On a GPU only kernels: an operator's device time is that of the kernels it launches.
    spent = [(time, event) for time, event in spent if not cuda or event.device_type == torch.autograd.DeviceType.CUDA]
    spent.sort(key=lambda pair: -pair[0])
    return [
        {"name": event.key, "calls": event.count / steps, "milliseconds": time / 1000 / steps}
        for time, event in spent[:20]
    ]


def model_table(rows: dict[str, dict]) -> str:
    """`bench_model`'s result as text."""
    keys = ("median", "min", "max", "ratio", "mfu", "per_gflop", "megabytes", "of_floor", "peak_gb")
    titles = ["", "img/s", "min", "max", "ratio", "MFU", "img/s/GFLOP", "MB/img", "of floor", "GB"]
    cells = []
    for name, row in rows.items():
        values = [row[key] for key in keys] + [row["milliseconds"].get(phase) for phase in PHASES]
        cells.append([name, *(_number(value) for value in values)])
    return table([[*titles, "fwd ms", "bwd ms", "opt ms"], *cells])


def count_table(rows: dict[str, dict]) -> str:
    """`count_model`'s result as text."""
    cells = [
        [name, f"{row['gflops']:.1f}", f"{row['megabytes']:.0f}", f"{row['floor']:.0f}"] for name, row in rows.items()
    ]
    return table([["", "GFLOP/img", "MB/img", "at most, img/s"], *cells])


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
