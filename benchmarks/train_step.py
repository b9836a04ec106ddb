"""Speed of a training step beside a bare PyTorch loop, interleaved in one run; and what the guard costs it."""

import copy
import statistics
import time
from pathlib import Path

import torch

from benchmarks.data import interleave
from benchmarks.model import Clock
from data_pipeline.manifest import Manifest
from data_pipeline.order import Order
from train.checkpoint.saver import snapshot
from train.config import Config
from train.engine.deepspeed_engine import Engine, compile_settings
from train.engine.ema import Ema
from train.engine.optimizer import build_optimizer
from train.engine.prefetch import Prefetcher
from train.engine.runtime import Runtime
from train.guard.agreement import Agreement
from train.guard.rank_store import Store
from train.guard.signals import stop_signals
from train.guard.skips import Skips
from train.guard.watchdog import Watchdog
from train.tasks.base import build_task, training_batches


def bench_train(config: Config, classes: int, runtime: Runtime, steps: int, rounds: int = 5) -> dict[str, list[float]]:
    """Images per second of steps of one micro-batch of random images: the engine, and a bare PyTorch loop that does the same arithmetic,
    in 16 bits with an fp32 master of the weights, too."""
    engine = Engine(build_task(config, [""] * classes).build_model(), config, accumulation=1, device=runtime.device)
    master = build_task(config, [""] * classes).build_model().to(runtime.device)
    optimizer = build_optimizer(master, config.optimizer)
    model = master if engine.dtype == torch.float32 else copy.deepcopy(master).to(engine.dtype)
    masters, weights = list(master.parameters()), list(model.parameters())
    if config.train.compile:
        model.compile(**compile_settings())
    size, batch = config.data.image_size, config.train.micro_batch
    images = torch.randn(batch, 3, size, size, device=runtime.device)
    labels = torch.randint(classes, (batch,), device=runtime.device)

    def finish() -> None:
        if runtime.device.type == "cuda":
            torch.cuda.synchronize()

    def with_engine() -> None:
        for _ in range(steps):
            engine.backward(torch.nn.functional.cross_entropy(engine(images).float(), labels))
            engine.step(1e-4)
        finish()

    def plain() -> None:
        for _ in range(steps):
            torch.nn.functional.cross_entropy(model(images.to(engine.dtype)).float(), labels).backward()
            if model is not master:
                for weight, of_master in zip(weights, masters, strict=True):
                    of_master.grad = weight.grad.float()
            torch.nn.utils.clip_grad_norm_(masters, config.optimizer.clip_grad or float("inf"))
            optimizer.step()
            if model is not master:
                with torch.no_grad():
                    torch._foreach_copy_(weights, masters)
            model.zero_grad()
        finish()

    ways = {f"DeepSpeed ZeRO {engine.stage}": with_engine, "bare PyTorch": plain}
    return interleave(ways, steps * batch, rounds, time.perf_counter)


def split_step(config: Config, manifest: Manifest, runtime: Runtime, steps: int) -> dict[str, float]:
    """Where the time of training steps of one micro-batch from `manifest` goes: milliseconds (medians of `steps`) that the model waits for
    its images, and of forward, backward and optimizer, as the device sees them."""
    order = Order(config.train.seed, manifest.split("train").samples, config.train.micro_batch * runtime.world, config.train.micro_batch)
    task = build_task(config, manifest.classes)
    engine, clock = Engine(task.initial_model(), config, accumulation=1, device=runtime.device), Clock(runtime.device)
    batches = training_batches(task, manifest.split("train"), order, runtime.rank, runtime.world, 0)

    def inputs(batch):
        return task.inputs(batch, order.epoch_of(batch.step), runtime.device)

    with Prefetcher(batches, inputs, runtime.device, waited=lambda seconds: None) as feed:
        for _ in range(-3, steps):  # the first ones warm up
            clock.mark()
            _, inputs_of_batch = next(feed)
            clock.mark()
            loss = sum(task.loss(engine, inputs_of_batch).values())
            clock.mark()
            engine.backward(loss)
            feed.prepare()
            clock.mark()
            engine.step(1e-4)
    clock.mark()
    times = clock.milliseconds()[3 * 4 :]
    return {phase: statistics.median(times[i::4]) for i, phase in enumerate(("data", "forward", "backward", "optimizer"))}


def bench_guard(config: Config, classes: int, runtime: Runtime, steps: int, folder: Path) -> dict[str, float]:
    """What the guard costs a step: milliseconds on the main thread of what the trainer calls, of the step, and their ratio; and how long
    training stands still for a checkpoint of this rank's share.

    A difference of whole steps would drown in their noise, so the calls are timed between the step's own work. `folder`: for stacks.
    """
    engine = Engine(build_task(config, [""] * classes).build_model(), config, accumulation=1, device=runtime.device)
    size, batch = config.data.image_size, config.train.micro_batch
    images = torch.randn(batch, 3, size, size, device=runtime.device)
    labels = torch.randint(classes, (batch,), device=runtime.device)
    watchdog = Watchdog(runtime.rank, runtime.world, config.guard.timeout.model_dump(), folder, config.guard.grace)
    watchdog.connect(Store())
    agreement, skips, guarding = Agreement(runtime.device, config.guard.agree_every), Skips(config.guard.max_skipped), 0.0
    for step in range(-3, steps):
        if step == 0:  # the first ones warm up
            began, guarding = time.perf_counter(), 0.0
        at = [time.perf_counter()]
        watchdog.enter("step", step)
        with agreement.local_work():
            at.append(time.perf_counter())
            loss = torch.nn.functional.cross_entropy(engine(images).float(), labels)
            at.append(time.perf_counter())
        at += [time.perf_counter()]
        engine.backward(loss)
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
