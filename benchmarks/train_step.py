"""Speed of a training step compared with a bare PyTorch loop, interleaved; and the cost of the guard in a step."""

import copy
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import DeviceTimer, interleave, rates_table, summary
from data_pipeline.loader import MicroBatch
from data_pipeline.manifest import Manifest
from data_pipeline.order import Order
from train.checkpoint.saver import snapshot
from train.config import Config
from train.engine.deepspeed_engine import Engine, compile_settings
from train.engine.ema import Ema
from train.engine.flops import finish
from train.engine.optimizer import build_optimizer
from train.engine.prefetch import Prefetcher
from train.engine.runtime import Runtime
from train.guard.agreement import Agreement
from train.guard.rank_store import Store
from train.guard.signals import stop_signals
from train.guard.skips import Skips
from train.guard.watchdog import Watchdog
from train.tasks.base import Task, build_task, example_losses, training_batches


def run(config: Config, manifest: Manifest, runtime: Runtime, steps: int, rounds: int) -> dict | None:
    """Measure training steps; print and return the results on the main rank. All ranks call this."""
    task = build_task(config, manifest.classes)
    rows = summary(bench_train(task, runtime, steps, rounds), "bare PyTorch")
    split = split_step(task, manifest, runtime, steps * rounds)
    if not runtime.is_main:
        return None
    overhead = 1 / next(iter(rows.values()))["ratio"] - 1
    print(rates_table(rows, "img/s", "bare PyTorch"))
    print(f"DeepSpeed takes {overhead:+.1%} of a bare step's time")
    print("a step from prepared data: " + ", ".join(f"{phase} {spent:.1f} ms" for phase, spent in split.items()))
    about = {"precision": config.train.precision, "model": config.model.name}
    return {"train": rows, "overhead": overhead, "milliseconds": split, **about}


def run_guard(config: Config, manifest: Manifest, runtime: Runtime, steps: int) -> dict | None:
    """Measure the guard's share of a step; print and return the results on the main rank. All ranks call this."""
    with tempfile.TemporaryDirectory() as folder:
        cost = bench_guard(build_task(config, manifest.classes), runtime, steps, Path(folder))
    if not runtime.is_main:
        return None
    share = f"guard {cost['guard_ms']:.3f} ms of a step of {cost['step_ms']:.0f} ms: {cost['share']:.3%}"
    print(f"{runtime.describe()}: {share}")
    stall, size = cost["save_stall_ms"], cost["save_megabytes"]
    print(f"a checkpoint stops training for {stall:.0f} ms ({size:.0f} MB of rank 0)")
    return {"guard": {"world_size": runtime.world, **cost}}


def random_example(task: Task, device: torch.device) -> Tensor:
    """Random numbers as the network's input for one micro-batch."""
    return torch.randn_like(task.example(task.config.train.micro_batch, device, torch.float32))


def bench_train(task: Task, runtime: Runtime, steps: int, rounds: int = 5) -> dict[str, list[float]]:
    """Images per second in steps of one micro-batch, of the engine and of a bare PyTorch loop of the same arithmetic.

    In 16 bits, the bare loop also keeps fp32 master weights.
    """
    config = task.config
    engine = Engine(task.build_model(), example_losses(task), config, accumulation=1, device=runtime.device)
    master = task.build_model().to(runtime.device)
    optimizer = build_optimizer(master, config.optimizer)
    model = master if engine.dtype == torch.float32 else copy.deepcopy(master).to(engine.dtype)
    masters, weights = list(master.parameters()), list(model.parameters())
    if config.train.compile:
        model.compile(**compile_settings())
    example = random_example(task, runtime.device)

    def with_engine() -> None:
        for _ in range(steps):
            engine.accumulate(example)
            engine.step(1e-4)
        finish(runtime.device)

    def plain() -> None:
        for _ in range(steps):
            task.example_loss(model(example.to(engine.dtype))).backward()
            if model is not master:
                for weight, of_master in zip(weights, masters, strict=True):
                    of_master.grad = weight.grad.float()
            torch.nn.utils.clip_grad_norm_(masters, config.optimizer.clip_grad or float("inf"))
            optimizer.step()
            if model is not master:
                with torch.no_grad():
                    torch._foreach_copy_(weights, masters)
            model.zero_grad()
        finish(runtime.device)

    ways = {f"DeepSpeed ZeRO {engine.stage}": with_engine, "bare PyTorch": plain}
    return interleave(ways, steps * config.train.micro_batch, rounds, time.perf_counter)


def split_step(task: Task, manifest: Manifest, runtime: Runtime, steps: int) -> dict[str, float]:
    """Milliseconds of a step of one micro-batch from `manifest`: waiting for data, forward and backward, and the
    optimizer.

    Measured on the device; medians of `steps` steps.
    """
    config, split, timer = task.config, manifest.split("train"), DeviceTimer(runtime.device)
    size = config.train.micro_batch
    order = Order(config.train.seed, split.samples, size * runtime.world, size)
    engine = Engine(task.initial_model(), task.losses_to_train, config, accumulation=1, device=runtime.device)
    batches = training_batches(task, split, order, runtime.rank, runtime.world, 0)

    def inputs(batch: MicroBatch) -> Any:
        return task.inputs(batch, order.epoch_of(batch.step), runtime.device)

    with Prefetcher(batches, inputs, runtime.device, waited=lambda seconds: None) as feed:
        for _ in range(-3, steps):  # the first three warm up
            timer.mark()
            _, inputs_of_batch = next(feed)
            timer.mark()
            engine.accumulate(inputs_of_batch)
            feed.prepare()
            timer.mark()
            engine.step(1e-4)
    timer.mark()
    times = timer.milliseconds()[3 * 3 :]
    return {
        phase: statistics.median(times[i::3]) for i, phase in enumerate(("data", "forward and backward", "optimizer"))
    }


def bench_guard(task: Task, runtime: Runtime, steps: int, folder: Path) -> dict[str, float]:
    """Milliseconds per step on the main thread of the guard's calls, of the whole step, and their ratio; and how long
    training stops for a checkpoint of this rank's share.

    The guard's calls are timed inside the step, because the difference between steps with and without them would be
    smaller than the noise. folder: for stacks.
    """
    config, example = task.config, random_example(task, runtime.device)
    engine = Engine(task.build_model(), example_losses(task), config, accumulation=1, device=runtime.device)
    watchdog = Watchdog(runtime.rank, runtime.world, config.guard.timeout.model_dump(), folder, config.guard.grace)
    watchdog.connect(Store())
    agreement, skips = Agreement(runtime.device, config.guard.agree_every), Skips(config.guard.max_skipped)
    guarding = 0.0
    for step in range(-3, steps):
        if step == 0:  # the first three warm up
            began, guarding = time.perf_counter(), 0.0
        at = [time.perf_counter()]
        watchdog.enter("step", step)
        with agreement.local_work():
            at.append(time.perf_counter())
            engine.accumulate(example)
            at.append(time.perf_counter())
        at += [time.perf_counter()]
        result = engine.step(1e-4)
        at += [time.perf_counter()]
        skips.add(step, result.skipped)
        skips.known(step)
        agreement.round(stop_signals.received)
        at += [time.perf_counter()]
        guarding += (at[1] - at[0]) + (at[3] - at[2]) + (at[5] - at[4])
    total = time.perf_counter() - began
    agreement.collect_pending()
    watchdog.close()
    ema, stalls = Ema(engine, config.ema.decay), []
    for _ in range(5):
        began = time.perf_counter()
        tensors, _ = snapshot(engine, ema)
        stalls.append(1000 * (time.perf_counter() - began))
    megabytes = sum(tensor.nbytes for tensor in tensors.values()) / 1e6
    cost = {"guard_ms": 1000 * guarding / steps, "step_ms": 1000 * total / steps, "share": guarding / total}
    return {**cost, "save_stall_ms": sorted(stalls)[2], "save_megabytes": megabytes}
