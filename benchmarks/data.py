"""Speed of the data path compared with other libraries, interleaved, in images per CPU-second.

All decoders run on one thread and produce the same: random resized crops of `size` pixels as uint8, half of them
mirrored.
"""

import io
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch

from benchmarks.augment import RECIPE, operation_costs
from benchmarks.gpu.record import installed
from benchmarks.measure import interleave, rates_table, summary
from data_pipeline.augment import augment, sample_keys
from data_pipeline.backends import open_backend
from data_pipeline.backends.stored import stored_in_shards
from data_pipeline.config import AugmentConfig, DataConfig
from data_pipeline.crop import training_windows
from data_pipeline.decode import decode_batch
from data_pipeline.loader import build_loader
from data_pipeline.manifest import Manifest
from data_pipeline.order import Order
from data_pipeline.randomness import Stream, fold, make_key
from data_pipeline.split import DataError, Split
from data_pipeline.views import Crops
from train.config import Config
from train.telemetry.formatting import table

BATCH = 64


@dataclass(frozen=True)
class Images:
    """The images of a benchmark: the first samples of a split, their bytes in memory, and a random window of each."""

    split: Split
    ids: np.ndarray
    encoded: list[bytes]
    dimensions: np.ndarray
    windows: np.ndarray
    size: int

    @classmethod
    def read(cls, split: Split, count: int, size: int, config: AugmentConfig) -> "Images":
        """The first `count` samples, with windows drawn for crops of size x size pixels."""
        ids = np.arange(min(count, split.samples), dtype=np.int64)
        records = split.records[ids]
        encoded, failures = stored_in_shards(split).read(ids)
        if failures:
            raise DataError(f"samples cannot be read: {failures}")
        dimensions = np.stack([records["width"], records["height"]], axis=1)
        windows = training_windows(fold(make_key(0, Stream.CROP, 0), ids), records["width"], records["height"], config)
        return cls(split, ids, encoded, dimensions, windows, size)

    @property
    def shape(self) -> tuple[int, int]:
        return self.size, self.size

    def batches(self) -> Iterator[slice]:
        return (slice(start, start + BATCH) for start in range(0, len(self.ids), BATCH))


def run(config: Config, manifest: Manifest, count: int, rounds: int, gpu_rate: float) -> dict[str, Any]:
    """Measure decoding, the training path, the loader and the recipe's operations; print and return the results.

    count: images per round. gpu_rate: images per second of a GPU, from which the number of cores that it needs is
    computed.
    """
    torch.set_num_threads(1)
    images = Images.read(manifest.split("train"), count, config.data.image_size, config.augment)
    count, cores = len(images.ids), len(os.sched_getaffinity(0))
    results = {"images": count, "size": images.size, "rounds": rounds, "absent": absent(images.split)}

    def measure(
        name: str, title: str, ways: dict, base: str, clock: Callable = time.process_time, unit: str = "img/s/core"
    ) -> dict:
        rows = summary(interleave(ways, count, rounds, clock), base)
        results[name] = {"unit": unit, "base": base, "rows": rows}
        print(f"\n{title}\n{rates_table(rows, unit, base)}", flush=True)
        return rows

    pillow, timm = "Pillow, the same windows", "timm create_transform, the same recipe"
    rows = measure("decoding", f"decode + random resized crop {images.size} + flip → uint8", decoding(images), pillow)
    bare = rows["bare full decode (libjpeg-turbo)"]["median"]
    shares = [[name, f"{row['median'] / bare:.2f}"] for name, row in rows.items()]
    print(table([["", "x bare full decode"], *shares]))
    title = "the whole training path → normalised float batch"
    path = measure("training_path", title, training_path(images), timm)
    title, one = f"ready batches on {cores} cores, wall clock", "this decoder, 1 thread"
    micro_batch = 128 if config.train.micro_batch == "auto" else min(config.train.micro_batch, images.split.samples)
    ways = loading(images, config.data, micro_batch, cores)
    loader = measure("loader", title, ways, one, time.perf_counter, "img/s")
    results["loader"]["share"] = share = next(iter(loader.values()))["ratio"] / cores
    print(f"the loader reaches {share:.2f} of the decoder's own rate x {cores} cores")
    taken = results["taking"] = {"micro_batch": micro_batch, "ms": taking(images, config, micro_batch)}
    print(f"the thread that trains spends {taken['ms']:.2f} ms of CPU time to take a micro-batch of {micro_batch}")
    costs = results["operations"] = operation_costs(images.size)
    print("\nthe recipe")
    print(table([["", "ms per image"], *([name, f"{cost:.3f}"] for name, cost in costs.items())]))
    decoded, augmented = rows["webdataset backend"]["median"], next(iter(path.values()))["median"]
    needed = {"gpu_rate": gpu_rate, "decoding": gpu_rate / decoded, "recipe_too": gpu_rate / augmented}
    results["cores_per_gpu"] = needed
    print(
        f"\na GPU that trains on {gpu_rate:g} images/s needs {needed['decoding']:.1f} of these cores for decoding"
        f" ({needed['recipe_too']:.1f} if they also run the recipe)"
    )
    print("\n".join(results["absent"]))
    return results


# --- decode + crop + resize + flip → uint8 ----------------------------------------------------------------------------


def decoding(images: Images) -> dict[str, Callable[[], None]]:
    """Ways from stored bytes to cropped uint8 pixels, without those whose library or file is missing (`absent`)."""
    out = np.empty((len(images.ids), images.size, images.size, 3), np.uint8)

    def backend(name: str) -> Callable[[], None]:
        opened = open_backend(name, images.split)

        def run() -> None:
            for part in images.batches():
                opened.decode_batch(images.ids[part], images.windows[part], images.shape, "bicubic", out[part])

        return run

    def decoder() -> None:
        for part in images.batches():
            decode_batch(
                images.encoded[part], images.dimensions[part], images.windows[part], images.shape, "bicubic", out[part]
            )

    ways = {"this decoder, bytes in memory": decoder, "webdataset backend": backend("webdataset")}
    if images.split.beton:
        ways["ffcv backend"] = backend("ffcv")
    if installed("nvidia.dali"):
        ways["dali backend (CPU)"] = backend("dali")
        ways["DALI's stock CPU pipeline"] = _dali_stock(images)
    if installed("ffcv") and images.split.beton:
        ways["FFCV's stock loader and decoder"] = _ffcv_stock(images)
    ways["torchvision transforms in a DataLoader"] = _torchvision(images)
    ways["timm create_transform, crop and flip"] = _timm(images, recipe=False)
    ways["Pillow, the same windows"] = lambda: _pillow(images, out)
    ways["bare full decode (libjpeg-turbo)"] = lambda: _bare(images)
    return ways


def absent(split: Split) -> list[str]:
    """One sentence for each way that cannot be measured on this machine or dataset."""
    sentences = [f"{name} is not installed: not measured" for name in ("nvidia.dali", "ffcv") if not installed(name)]
    if not split.beton:
        sentences.append(
            "the dataset has no beton (launch/prepare.py --formats webdataset,ffcv): the ffcv backend is not measured"
        )
    return sentences


def _pillow(images: Images, out: np.ndarray) -> None:
    from PIL import Image

    for row, (data, window) in enumerate(zip(images.encoded, images.windows.tolist(), strict=True)):
        x, y, width, height, flip = window
        image = Image.open(io.BytesIO(data)).convert("RGB")
        box = (x, y, x + width, y + height)
        if x < 0 or y < 0 or x + width > image.width or y + height > image.height:  # resize refuses it, crop pads it
            image, box = image.crop(box), None
        image = image.resize((images.size, images.size), Image.Resampling.BICUBIC, box=box)
        out[row] = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else image


def _bare(images: Images) -> None:
    import simplejpeg

    for data in images.encoded:
        simplejpeg.decode_jpeg(data, colorspace="RGB")


class _Decoded(torch.utils.data.Dataset):
    """Images opened with Pillow, then transformed."""

    def __init__(self, encoded: list[bytes], transform: Callable):
        self.encoded, self.transform = encoded, transform

    def __len__(self) -> int:
        return len(self.encoded)

    def __getitem__(self, row: int):
        from PIL import Image

        return self.transform(Image.open(io.BytesIO(self.encoded[row])).convert("RGB"))


def _through_loader(images: Images, transform: Callable) -> Callable[[], None]:
    loader = torch.utils.data.DataLoader(_Decoded(images.encoded, transform), batch_size=BATCH, num_workers=0)
    return lambda: _exhaust(loader)


def _torchvision(images: Images) -> Callable[[], None]:
    from torchvision import transforms

    bicubic = transforms.InterpolationMode.BICUBIC
    steps = [
        transforms.RandomResizedCrop(images.size, interpolation=bicubic),
        transforms.RandomHorizontalFlip(),
        transforms.PILToTensor(),
    ]
    return _through_loader(images, transforms.Compose(steps))


def _timm(images: Images, *, recipe: bool) -> Callable[[], None]:
    """timm's training transform: crop and flip to uint8, or the full recipe to normalised floats."""
    import timm.data.auto_augment as timm_augment
    from timm.data import create_transform

    if recipe:
        # timm 1.0.31 sometimes posterizes to 0 bits, which Pillow 13 refuses: use at least 1.
        original = timm_augment._posterize_increasing_level_to_arg
        timm_augment.LEVEL_TO_ARG["PosterizeIncreasing"] = lambda level, hparams: (max(1, original(level, hparams)[0]),)
        options = {
            "auto_augment": RECIPE.rand_augment,
            "color_jitter": None,
            "re_prob": RECIPE.erasing,
            "re_mode": "pixel",
        }
    else:
        options = {"color_jitter": None, "use_prefetcher": True}
    transform = create_transform(images.size, is_training=True, interpolation="bicubic", **options)
    return _through_loader(images, transform)


def _ffcv_stock(images: Images) -> Callable[[], None]:
    from ffcv.fields.basics import IntDecoder
    from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder, RGBImageField
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import RandomHorizontalFlip

    crop = RandomResizedCropRGBImageDecoder((images.size, images.size))
    loader = Loader(
        str(images.split.folder / images.split.beton.file),
        batch_size=BATCH,
        num_workers=1,
        order=OrderOption.SEQUENTIAL,
        indices=images.ids,
        drop_last=False,
        pipelines={"image": [crop, RandomHorizontalFlip()], "label": [IntDecoder()]},
        custom_fields={"image": RGBImageField},
    )
    return lambda: _exhaust(loader)


def _dali_stock(images: Images) -> Callable[[], None]:
    from nvidia.dali import fn, pipeline_def, types

    @pipeline_def(batch_size=BATCH, num_threads=1, device_id=None, prefetch_queue_depth=1)
    def stock():
        paths = [str(images.split.folder / shard.file) for shard in images.split.shards]
        jpeg, _ = fn.readers.webdataset(paths=paths, ext=["jpg", "cls"])
        decoded = fn.decoders.image_random_crop(jpeg, random_area=[0.08, 1.0], random_aspect_ratio=[3 / 4, 4 / 3])
        resized = fn.resize(decoded, size=(images.size, images.size), interp_type=types.INTERP_CUBIC, antialias=True)
        return fn.flip(resized, horizontal=fn.random.coin_flip())

    pipeline = stock()
    pipeline.build()
    runs = len(images.ids) // BATCH

    def run() -> tuple[int, float]:
        began = time.process_time()
        for _ in range(runs):
            pipeline.run()
        return runs * BATCH, time.process_time() - began

    return run


def _exhaust(iterable: Iterable) -> None:
    for _ in iterable:
        pass


# --- stored bytes → normalised float batch ----------------------------------------------------------------------------


def training_path(images: Images) -> dict[str, Callable[[], None]]:
    """Stored bytes → decode → crop → RandAugment → erasing → normalised float32 batch, by this project and by timm."""
    opened = open_backend("webdataset", images.split)
    keys = sample_keys(0, 0, images.ids)

    def ours() -> None:
        for part in images.batches():
            pixels = torch.empty((len(images.ids[part]), images.size, images.size, 3), dtype=torch.uint8)
            opened.decode_batch(images.ids[part], images.windows[part], images.shape, "bicubic", pixels.numpy())
            augment(pixels.permute(0, 3, 1, 2), keys[part], RECIPE)

    return {
        "this data path, the whole recipe": ours,
        "timm create_transform, the same recipe": _timm(images, recipe=True),
    }


# --- the loader -------------------------------------------------------------------------------------------------------


def loading(images: Images, data: DataConfig, micro_batch: int, workers: int) -> dict[str, Callable[[], None]]:
    """The loader with `workers` threads in steady state, and the decoder on one thread, for wall-clock timing."""
    config = data.model_copy(update={"image_size": images.size, "workers": workers})
    batches = 2 * -(-len(images.ids) // micro_batch)
    order = Order(0, images.split.samples, micro_batch, micro_batch)

    def ready_batches() -> tuple[int, float]:
        # A new loader every round: a running one would decode ahead while the other way is timed.
        with build_loader(config, Crops(config, AugmentConfig()), images.split, order) as loader:
            _exhaust(islice(loader, config.prefetch))
            began = time.perf_counter()
            _exhaust(islice(loader, batches))
            return batches * micro_batch, time.perf_counter() - began

    return {f"the loader, {workers} threads": ready_batches, "this decoder, 1 thread": decoding_alone(images)}


def taking(images: Images, config: Config, micro_batch: int, batches: int = 20) -> float:
    """The CPU time, in ms, that the thread that takes micro-batches from the loader spends on one."""
    order = Order(0, images.split.samples, micro_batch, micro_batch)
    with build_loader(config.data, Crops(config.data, config.augment), images.split, order) as loader:
        _exhaust(islice(loader, config.data.prefetch))
        began = time.thread_time()
        _exhaust(islice(loader, batches))
        return 1e3 * (time.thread_time() - began) / batches


def decoding_alone(images: Images) -> Callable[[], None]:
    out = np.empty((BATCH, images.size, images.size, 3), np.uint8)

    def run() -> None:
        for part in images.batches():
            rows = slice(0, len(images.ids[part]))
            decode_batch(
                images.encoded[part], images.dimensions[part], images.windows[part], images.shape, "bicubic", out[rows]
            )

    return run
