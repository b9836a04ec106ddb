"""Kernels, recipe and loader: parts `check`, `kernels`, `recipe` and `loader` of `make gpu`."""

import multiprocessing
import os
import random
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from statistics import median
from typing import TYPE_CHECKING

from benchmarks.gpu.record import ROOT, Record, Session, cores
from benchmarks.photographs import draw_photographs, repeat

if TYPE_CHECKING:
    from catmodel.kernels.check import Case

CHECKERS = 8  # processes; most of their time is spent compiling with Triton


def check(session: Session, record: Record) -> None:
    """Every kernel, forward and backward, compared with float64 on new random numbers."""
    from catmodel.kernels.check import FEW, many

    seed = random.SystemRandom().randrange(2**31)
    with multiprocessing.get_context("spawn").Pool(session.size(CHECKERS, 1)) as pool:
        for row in pool.imap_unordered(partial(check_case, session, seed), session.size(many(), FEW)):
            record.add(seed=seed, **row)


def check_case(session: Session, seed: int, case: "Case") -> dict:
    import torch

    from catmodel.kernels.check import check

    return check(torch.device(session.size("cuda", "cpu")), seed, [case])[0]


def judge_check(rows: list[dict]) -> tuple[bool, str]:
    failed = [row["module"] for row in rows if not row["passed"]]
    more = f": {', '.join(sorted(set(failed)))}" if failed else ""
    return bool(rows) and not failed, f"{len(rows)} cases, {len(failed)} failed{more}, seed {rows[0]['seed']}"


def kernels(session: Session, record: Record) -> None:
    """Each kernel beside plain PyTorch, timed on the device without the host."""
    import torch

    from benchmarks.kernels import STAGES, bench_kernels
    from benchmarks.roofline import measure_roofline

    device, dtype = torch.device(session.size("cuda", "cpu")), session.size(torch.bfloat16, torch.float32)
    roofline = measure_roofline(device, dtype, 1)
    stages = session.size(STAGES, ((7, 16, 1, False),))
    for _ in bench_kernels(device, dtype, session.size(16, 1), roofline, compiled=False, stages=stages):
        pass  # compiles the kernels: sizes that 16 divides, as below, which Triton compiles apart from others
    session.turn()
    roofline = measure_roofline(device, dtype, 1)
    for row in bench_kernels(device, dtype, session.size(128, 1), roofline, compiled=False, stages=stages):
        record.add(batch=session.size(128, 1), precision=session.size("bf16", "fp32"), **row)


def judge_kernels(rows: list[dict]) -> tuple[bool, str]:
    slower = [
        f"{row['name']} {row['stage']} {row['direction']}"
        for row in rows
        if row["way"] == "kernel" and row["speedup"] < 1
    ]
    return bool(rows), f"slower than plain: {', '.join(slower) or 'none'}"


def recipe(session: Session, record: Record) -> None:
    """The augmentation of a micro-batch on the device: launches, kernels' and host's time, equality (recipe.py)."""
    import torch

    from benchmarks.gpu.recipe import RECIPE, batch_of, gpu_recipe, kernels

    if session.rehearsal:
        record.add(kind="not rehearsed: it needs a GPU")
        return
    device = torch.device("cuda")
    kernels(*batch_of(128, 224, 1000, device), 1000, RECIPE)(0)  # compiles them
    session.turn()
    for row in gpu_recipe(device):
        record.add(**row)


def judge_recipe(rows: list[dict]) -> tuple[bool, str]:
    """What the default recipe of 128 images costs, beside the aims, and how far the kernels are from the plain path."""
    said = []
    for row in rows:
        if row.get("kind") == "time" and row["recipe"] == "default":
            said.append(
                f"{row['images']} x {row['size']} {row['way']}: {row['launches']:.0f} launches, "
                f"{row['kernel_ms']:.2f} ms, host {row['host_ms']:.1f} ms"
            )
    far = max((row["largest"] for row in rows if row.get("kind") == "equal"), default=0.0)
    return bool(rows), "; ".join([*said, f"largest difference {far:.1e} (aims: 20 launches, 1 ms for 128 x 224)"])


def loader(session: Session, record: Record) -> None:
    """The loader alone on 16, 8, 4, … cores: each in a process that may use no others. The aim is at 16."""
    session.wait_for_dataset()
    session.turn()
    mine = sorted(os.sched_getaffinity(0))
    for count in (count for count in (16, 8, 4, 2, 1) if count <= len(mine)):

        def measure(count: int = count) -> dict:
            os.sched_setaffinity(0, mine[:count])
            try:
                with multiprocessing.get_context("spawn").Pool(1) as pool:
                    return pool.apply(loader_rates, (str(session.dataset), count, *session.size((512, 5), (8, 1))))
            finally:
                os.sched_setaffinity(0, mine)

        record.measure(f"{count} cores", measure, cores=count)


def loader_rates(dataset: str, count: int, images: int, rounds: int) -> dict:
    """Images/s of the loader with `count` threads, and of the decoder alone in 1 and in `count` threads."""
    import time

    import torch

    from benchmarks.data import BATCH, Images, decoding_alone, loading
    from benchmarks.measure import interleave
    from data_pipeline.config import AugmentConfig, DataConfig
    from data_pipeline.decode import DECODER
    from data_pipeline.manifest import open_manifest

    torch.set_num_threads(1)
    found = Images.read(open_manifest(dataset).split("train"), images, 224, AugmentConfig())
    fast, one = loading(found, DataConfig(path=dataset), BATCH, count).values()
    decoders = [decoding_alone(found) for _ in range(count)]

    def together() -> tuple[int, float]:
        began = time.perf_counter()
        for future in [pool.submit(work) for work in decoders]:
            future.result()
        return count * len(found.ids), time.perf_counter() - began

    with ThreadPoolExecutor(count) as pool:
        ways = {"loader": fast, "decoder": one, "decoders": together}
        rates = interleave(ways, len(found.ids), rounds, time.perf_counter)
    rates = {name: median(values) for name, values in rates.items()}
    return {
        "images_per_second": rates["loader"],
        "per_core": rates["loader"] / count,
        "decoder": DECODER,
        "decoder_alone": rates["decoder"],
        "decoders_together": rates["decoders"],
        "share": rates["loader"] / count / rates["decoder"],
        "share_of_together": rates["loader"] / rates["decoders"],
    }


def judge_loader(rows: list[dict]) -> tuple[bool, str]:
    said = [f"{row['cores']}: {row['images_per_second']:,.0f} ({row['share']:.2f})" for row in rows]
    return bool(rows), f"images/s by cores (share of the decoder's rate x cores, aim 0.9 at 16): {', '.join(said)}"


def draw(session: Session) -> None:
    """Prepare the dataset of full-size JPEGs: given photographs or drawn ones, as hard links until there are enough."""
    if (session.dataset / "ready").exists():
        return
    try:
        shutil.rmtree(session.dataset, ignore_errors=True)  # one that was not finished
        images = session.images
        if images is None:
            images = session.work / "drawn"
            draw_photographs(images, *session.size((400, (500, 375)), (20, (64, 48))), processes=cores())
        folder = session.work / "photographs"
        repeat(images, folder, session.size(4096, 1008))
        subprocess.run([sys.executable, "launch/prepare.py", str(folder), str(session.dataset)], cwd=ROOT, check=True)
        (session.dataset / "ready").touch()
    except Exception as error:
        session.no_dataset.write_text(str(error))
        raise
