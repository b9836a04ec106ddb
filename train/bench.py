"""Speed of a training step beside a bare PyTorch loop, interleaved in one run."""

import time

import torch

from data_pipeline.bench import interleave
from train.config import Config
from train.engine import Engine
from train.optimizer import build_optimizer
from train.runtime import Runtime
from train.tasks.classification import build_model


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
