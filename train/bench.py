"""Speed of a training step beside a bare PyTorch loop, interleaved in one run; and what the guard costs it."""

import time
from pathlib import Path

import torch

from data_pipeline.bench import interleave
from train.config import Config
from train.ema import Ema
from train.engine import Engine
from train.guard import Agreement, Skips
from train.optimizer import build_optimizer
from train.runtime import Runtime
from train.saver import snapshot
from train.signals import stop_signals
from train.store import Store
from train.tasks.classification import build_model
from train.watchdog import Watchdog


def bench_train(config: Config, classes: int, runtime: Runtime, steps: int, rounds: int = 5) -> dict[str, list[float]]:
    """Images per second of steps of one micro-batch of random images: the engine, and a bare PyTorch loop in the same precision."""
    engine = Engine(build_model(config, classes), config, accumulation=1, device=runtime.device)
    model = build_model(config, classes).to(runtime.device, engine.dtype)
    optimizer = build_optimizer(model, config.optimizer)
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
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.clip_grad or float("inf"))
            optimizer.step()
            optimizer.zero_grad()
        finish()

    ways = {f"DeepSpeed ZeRO {config.zero.stage}": with_engine, "bare PyTorch": plain}
    return interleave(ways, steps * batch, rounds, time.perf_counter)


def bench_guard(config: Config, classes: int, runtime: Runtime, steps: int, folder: Path) -> dict[str, float]:
    """What the guard costs a step: milliseconds on the main thread of what the trainer calls, of the step, and their ratio; and how long
    training stands still for a checkpoint of this rank's share.

    A difference of whole steps would drown in their noise, so the calls are timed between the step's own work. `folder`: for stacks.
    """
    engine = Engine(build_model(config, classes), config, accumulation=1, device=runtime.device)
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
        with agreement.alone():
            at.append(time.perf_counter())
            loss = torch.nn.functional.cross_entropy(engine(images).float(), labels)
            at.append(time.perf_counter())
        at += [time.perf_counter()]
        engine.backward(loss)
        result = engine.step(1e-4)
        at += [time.perf_counter()]
        skips.too_many(step, result.skipped)
        agreement.round(stop_signals.received)
        at += [time.perf_counter()]
        guarding += (at[1] - at[0]) + (at[3] - at[2]) + (at[5] - at[4])
    total = time.perf_counter() - began
    agreement.close()
    watchdog.close()
    ema, stalls = Ema(engine, config.ema.decay), []
    for _ in range(5):
        began = time.perf_counter()
        tensors, _ = snapshot(engine, ema)
        stalls.append(1000 * (time.perf_counter() - began))
    megabytes = sum(tensor.nbytes for tensor in tensors.values()) / 1e6
    cost = {"guard_ms": 1000 * guarding / steps, "step_ms": 1000 * total / steps, "share": guarding / total}
    return {**cost, "save_stall_ms": sorted(stalls)[2], "save_megabytes": megabytes}
