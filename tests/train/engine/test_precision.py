"""fp32 state of networks that compute in bf16 or fp16: master weights from the beginning, and sums of gradients; and
the steps of networks in fp32, which are those of a plain training loop.

Each case is a real engine on one or two ranks over gloo.
"""

import multiprocessing
import socket
from dataclasses import dataclass
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from tests.runs import _forkserver
from train.config import load_config
from train.engine.loss_scale import INITIAL, LossScale

MICRO_BATCHES = 6  # per step; not a power of two per rank, on one rank and on two
IMAGES = 4

# (ZeRO stage, offload)
WAYS = [(0, False), (1, False), (2, False), (3, False), (1, True), (2, True), (3, True)]
CASES = [(1, "bf16"), (2, "bf16"), *(pytest.param(world, "fp16", marks=pytest.mark.long) for world in (1, 2))]


def on_ranks(world: int, function, *arguments) -> list:
    """Results of function(*arguments) on each of `world` ranks, processes joined over gloo."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    pipes = [multiprocessing.Pipe(duplex=False) for _ in range(world)]
    ranks = [
        _forkserver.Process(target=_rank, args=(rank, world, port, pipes[rank][1], function, arguments))
        for rank in range(world)
    ]
    for rank, (_, sending) in zip(ranks, pipes, strict=True):
        rank.start()
        sending.close()
    results = [receiving.recv() for receiving, _ in pipes]
    for rank in ranks:
        rank.join()
    return results


def _rank(rank: int, world: int, port: int, pipe, function, arguments) -> None:
    import os

    from deepspeed.accelerator import get_accelerator

    from train.engine.deepspeed_start import init_process_group

    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    get_accelerator().is_fp16_supported = lambda: True  # slow on a CPU, but the same arithmetic
    torch.set_num_threads(1)
    init_process_group(torch.device("cpu"), timedelta(seconds=120))
    pipe.send(function(*arguments))
    dist.barrier()
    dist.destroy_process_group()


@dataclass(frozen=True)
class Built:
    config: object
    model: torch.nn.Module
    engine: object


def build(path, stage: int, offload: bool, precision: str, *settings: str) -> Built:
    """An engine, and the fp32 model that it was made from."""
    import copy

    from train.engine.deepspeed_engine import Engine
    from train.tasks.base import build_task

    def losses(network, inputs):
        images, labels = inputs
        return [torch.nn.functional.cross_entropy(network(images).float(), labels)]

    still = ["model.drop_path_rate=0", "model.cpsa_drop=0"]
    config = load_config(
        path, [f"zero.stage={stage}", f"zero.offload={offload}", f"train.precision={precision}", *still, *settings]
    )
    torch.manual_seed(0)
    model = build_task(config, [""] * 10).build_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn_like(parameter)  # zeros and ones would be exact in every type
    return Built(
        config,
        model,
        Engine(copy.deepcopy(model), losses, config, MICRO_BATCHES // dist.get_world_size(), torch.device("cpu")),
    )


def same_masters(path, ways, precision: str) -> list[str]:
    """Descriptions of differences.

    Compared are masters and averages with the fp32 model's weights, and the network's weights with those rounded once.
    """
    from train.engine.ema import Ema

    wrong = []
    for stage, offload in ways:
        built = build(path, stage, offload, precision)
        named, ema = dict(built.model.named_parameters()), Ema(built.engine, 0.9)
        pairs = [(fragment, fragment.master) for fragment in built.engine.fragments(everything=True)]
        pairs += list(zip(ema.fragments, ema.averages, strict=False))
        for fragment, tensor in pairs:
            original = named[fragment.name].detach().view(-1)[fragment.start : fragment.start + fragment.numel]
            if not torch.equal(tensor, original):
                wrong.append(f"ZeRO {stage}, offload {offload}: {fragment.name}")
        images = torch.randn(2, 3, 16, 16)
        with built.engine.evaluating():
            seen = built.engine(images)
            built.engine.publish()
            if not torch.equal(seen, built.engine(images)):
                wrong.append(f"ZeRO {stage}, offload {offload}: the network computes with other weights")
        built.engine.destroy()
    return wrong


@pytest.mark.slow
@pytest.mark.parametrize(("world", "precision"), CASES)
def test_masters_begin_as_the_weights_were(tiny_config, world, precision):
    """Bitwise, at every stage and with offload.

    The average begins with the same weights, and the network with the same weights, rounded.
    """
    assert on_ranks(world, same_masters, tiny_config, WAYS, precision) == [[]] * world


def gradients(path, ways, precision: str) -> dict:
    """By way, the largest distance in this rank's share of the step's gradient from the fp32 mean over micro-batches.

    Relative to the largest element of a parameter's gradient. A plain network in `precision` computes the gradients of
    micro-batches; the step's gradient is read from SGD's momentum after the first step.
    """
    from torch.nn.functional import cross_entropy

    from train.engine.deepspeed_engine import DTYPES

    images = torch.randn(MICRO_BATCHES, IMAGES, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    labels = torch.randint(10, (MICRO_BATCHES, IMAGES), generator=torch.Generator().manual_seed(2))
    rank, world = dist.get_rank(), dist.get_world_size()
    far = {}
    for stage, offload in ways:
        built = build(
            path,
            stage,
            offload,
            precision,
            "optimizer.name=sgd",
            "optimizer.clip_grad=null",
            "optimizer.weight_decay=0",
        )
        engine, dtype = built.engine, DTYPES[precision]
        # The factor of an engine's loss: the loss scale divided by the number of micro-batches. In bf16, which has no
        # scale, ZeRO 3 divides by a rank's number of micro-batches.
        scale = engine.loss_scale_state().get("cur_scale", world if stage == 3 else 1.0) / MICRO_BATCHES
        plain = built.model.to(dtype)
        sums = {name: torch.zeros(parameter.shape) for name, parameter in plain.named_parameters()}
        for x, y in zip(images, labels, strict=True):
            plain.zero_grad()
            (cross_entropy(plain(x.to(dtype)).float(), y) * scale).backward()
            for name, parameter in plain.named_parameters():
                sums[name] += parameter.grad.float() / (scale * MICRO_BATCHES)
        for index in range(rank, MICRO_BATCHES, world):
            engine.accumulate((images[index], labels[index]))
            result = engine.step(0.0)
        assert not result.skipped
        norm = torch.stack([total.norm() for total in sums.values()]).norm()
        distances = [abs(result.grad_norm / norm - 1)]
        for fragment in engine.fragments(everything=True):
            whole = sums[fragment.name].view(-1)
            mine = whole[fragment.start : fragment.start + fragment.numel]
            distances.append((fragment.moments["momentum_buffer"] - mine).abs().max() / whole.abs().max())
        far[stage, offload] = torch.stack(distances).max().item()
        engine.destroy()
    return far


@pytest.mark.slow
@pytest.mark.parametrize(("world", "precision"), CASES)
def test_gradients_of_micro_batches_and_ranks_are_summed_in_fp32(tiny_config, world, precision):
    """Within 2e-6 of the fp32 mean. A sum in bf16 would differ by about 4e-3, in fp16 by 5e-4."""
    for far in on_ranks(world, gradients, tiny_config, WAYS, precision):
        assert all(distance < 2e-6 for distance in far.values()), far


def steps(path, ways, *settings: str) -> dict:
    """By way, the largest distances of the norms (relative), and of the weights in this rank's share, from those of a
    plain training loop; over three steps at different rates.
    """
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(3, MICRO_BATCHES, IMAGES, 3, 16, 16, generator=generator)
    labels = torch.randint(10, (3, MICRO_BATCHES, IMAGES), generator=generator)
    rank, world = dist.get_rank(), dist.get_world_size()
    far = {}
    for stage, offload in ways:
        built = build(path, stage, offload, "fp32", *settings)
        engine, plain, options = built.engine, built.model, built.config.optimizer
        bare = {name for name, value in plain.named_parameters() if value.ndim < 2} | plain.no_weight_decay()
        groups = [
            {
                "params": [value for name, value in plain.named_parameters() if (name in bare) == without],
                "weight_decay": 0.0 if without else options.weight_decay,
            }
            for without in (True, False)
        ]
        if options.name == "adamw":
            optimizer = torch.optim.AdamW(groups, betas=options.betas, eps=options.eps)
        else:
            optimizer = torch.optim.SGD(groups, momentum=options.momentum, nesterov=options.nesterov)
        norms = []
        for lr, of_step, classes in zip((0.01, 0.03, 0.002), images, labels, strict=True):
            optimizer.zero_grad()
            for x, y in zip(of_step, classes, strict=True):
                (torch.nn.functional.cross_entropy(plain(x), y) / MICRO_BATCHES).backward()
            norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), options.clip_grad)
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            for index in range(rank, MICRO_BATCHES, world):
                engine.accumulate((of_step[index], classes[index]))
                result = engine.step(lr)
            norms.append((norm.item(), result.grad_norm.item()))
        named = dict(plain.named_parameters())
        distances = [
            (fragment.master - named[fragment.name].detach().view(-1)[fragment.start :][: fragment.numel]).abs().max()
            for fragment in engine.fragments(everything=True)
        ]
        far[stage, offload] = max(abs(one / other - 1) for one, other in norms), max(distances).item()
        engine.destroy()
    return far


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ways", "settings"),
    [
        ([(0, False), (1, False), (2, True), (3, False)], ["optimizer.betas=[0.8,0.95]", "optimizer.eps=1e-3"]),
        ([(0, False)], ["optimizer.name=sgd", "optimizer.momentum=0.8", "optimizer.nesterov=true"]),
    ],
)
def test_steps_are_those_of_a_plain_training_loop(tiny_config, ways, settings):
    """The gradient's norm is below the limit in the first step, and above it in the others."""
    settings += ["optimizer.clip_grad=2.2", "optimizer.weight_decay=0.3"]
    for far in on_ranks(2, steps, tiny_config, ways, *settings):
        assert all(norm < 1e-5 and distance < 1e-6 for norm, distance in far.values()), far


def scale_goes_on(path) -> list[float]:
    """Loss scales of engines that pass their state on, beginning with the state of DeepSpeed's scaler at ZeRO 1.

    Each halves it at an overflow first.
    """
    one = build(path, 1, True, "fp16").engine
    as_before = one.loss_scale_state() | {
        "cur_scale": 2.0**9,
        "raise_error_at_min_scale": True,
        "scale_factor": 2.0,
        "min_scale": 1,
    }
    one.destroy()
    scales, state = [], as_before  # older checkpoints contain settings, too
    for stage in (3, 0, 2, 3):
        engine = build(path, stage, False, "fp16").engine
        engine.set_loss_scale_state(state)
        if stage == 3:
            assert not engine._optimizer.loss_scaler.raise_error_at_min_scale
            engine._optimizer.loss_scaler.update_scale(True)
        else:
            engine._loss_scale.update(torch.tensor(1.0))
        state = engine.loss_scale_state()
        scales.append(state["cur_scale"])
        engine.destroy()
    return scales


@pytest.mark.slow
def test_a_loss_scale_goes_on_at_another_stage_and_from_older_checkpoints(tiny_config):
    assert on_ranks(1, scale_goes_on, tiny_config) == [[2.0**8, 2.0**7, 2.0**6, 2.0**5]]


def scales_beside_deepspeed(overflows: set[int], steps: int) -> list[tuple[float, float, float]]:
    """After each step the scale of DeepSpeed's scaler, of LossScale, and of a LossScale that took over before it."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

    theirs = DynamicLossScaler(INITIAL, 1000, 1.0, delayed_shift=1, consecutive_hysteresis=False)
    theirs.raise_error_at_min_scale = False
    ours, scales = LossScale(torch.device("cpu")), []
    for step in range(steps):
        again = LossScale(torch.device("cpu"))
        again.load({key: getattr(theirs, key) for key in ours.state()})
        theirs.update_scale(step in overflows)
        for scale in (ours, again):
            scale.update(torch.tensor(float(step in overflows)))
        scales.append((theirs.cur_scale, float(ours.value), float(again.value)))
    return scales


@pytest.mark.slow
def test_a_loss_scale_is_that_of_deepspeed():
    """Halved down to 1 by overflows, doubled after steps without one, and passed on after any step."""
    [scales] = on_ranks(1, scales_beside_deepspeed, {*range(18), 1500, 2600, 2601, 3602, 3603, 4603}, 7000)
    assert all(len(set(of_step)) == 1 for of_step in scales)
    assert scales[17][0] == 1.0 and scales[-1][0] == 4.0
