"""Speed of the data path and of a training step, beside plain alternatives, interleaved in one run. Figures are medians of rounds."""

import io
import statistics
import time
from collections.abc import Callable

import numpy as np
import simplejpeg
import torch
from PIL import Image

from data_pipeline.backends import open_backend
from data_pipeline.config import AugmentConfig
from data_pipeline.crop import training_windows
from data_pipeline.manifest import Split
from data_pipeline.randomness import Stream, fold, make_key
from train.config import Config
from train.engine import Engine
from train.optimizer import build_optimizer
from train.runtime import Runtime
from train.tasks.classification import build_model


def bench_data(split: Split, backend: str, size: int, images: int, rounds: int = 5) -> dict[str, list[float]]:
    """Images per CPU-second on one thread, per way a list of rounds: ours, Pillow on the same windows, and a bare decode."""
    torch.set_num_threads(1)
    ids = np.arange(min(images, split.samples), dtype=np.int64)
    records = split.records[ids]
    windows = training_windows(fold(make_key(0, Stream.CROP, 0), ids), records["width"], records["height"], AugmentConfig())
    opened = open_backend(backend, split)
    out = np.empty((len(ids), size, size, 3), np.uint8)
    files = [open(split.folder / shard.file, "rb") for shard in split.shards]

    def read(record: np.void) -> bytes:
        files[record["shard"]].seek(int(record["offset"]))
        return files[record["shard"]].read(int(record["size"]))

    def pillow() -> None:
        for row, record in enumerate(records):
            x, y, width, height, _ = windows[row].tolist()
            image = Image.open(io.BytesIO(read(record))).convert("RGB")
            out[row] = image.resize((size, size), Image.Resampling.BICUBIC, box=(x, y, x + width, y + height))

    def bare() -> None:
        for record in records:
            simplejpeg.decode_jpeg(read(record), colorspace="RGB")

    ways = {
        f"{backend}: decode + crop + resize {size}": lambda: opened.decode_batch(ids, windows, size, "bicubic", out),
        f"Pillow: decode + crop + resize {size}": pillow,
        "bare full decode (libjpeg-turbo)": bare,
    }
    return _interleave(ways, len(ids), rounds, time.process_time)


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

    with_engine(), plain()  # warm up
    return _interleave(
        {f"DeepSpeed ZeRO {config.zero.stage}": with_engine, "bare PyTorch": plain}, steps * batch, rounds, time.perf_counter
    )


def table(rates: dict[str, list[float]], unit: str) -> str:
    """Medians, spread and the ratio to the last row, as text."""
    medians = {name: statistics.median(values) for name, values in rates.items()}
    *_, base = medians.values()
    lines = [f"{'':44}{unit:>14}{'min':>10}{'max':>10}{'ratio':>8}"]
    for name, values in rates.items():
        lines.append(f"{name:44}{medians[name]:14.1f}{min(values):10.1f}{max(values):10.1f}{medians[name] / base:8.2f}")
    return "\n".join(lines)


def _interleave(ways: dict[str, Callable[[], None]], count: int, rounds: int, clock: Callable[[], float]) -> dict[str, list[float]]:
    """Rates of each way, `rounds` times one after the other, so that a busy machine disturbs all of them alike."""
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            began = clock()
            way()
            rates[name].append(count / (clock() - began))
    return rates
