"""Are gradients on a GPU the same to the bit, pass for pass? Part `exact` of `make gpu`, which names those that differ.

Each family's network as its recipe trains it, with all dropout that it has, eager, compiled, and compiled and replayed
as a CUDA graph.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.gpu.record import Record, Session
from benchmarks.graphs import record as record_graph
from train.config import load_config
from train.engine.deepspeed_engine import DTYPES, compile_settings
from train.engine.runtime import start_runtime, stop_runtime
from train.tasks.base import build_task

PASSES = 4
CLASSES = 1000
WAYS = ("eager", "compiled", "graphs")
# Family -> the recipe, its settings for this part, and those of a rehearsal.
FAMILIES = {
    "cat": ("configs/cat_t.yaml", ["model.ipsa_drop=0.1"], ["model.name=cat_nano"]),
    "pvt": ("configs/pvt_tiny.yaml", [], []),
    "cotnet": ("configs/cotnet50.yaml", ["model.drop_path_rate=0.1"], []),
}


@dataclass(frozen=True)
class Pass:
    """The loss and the gradients, by name, of one forward and backward pass."""

    loss: float
    gradients: dict[str, Tensor]


def compare(session: Session, record: Record, family: str) -> None:
    """The job of a family: a row per way, with the gradients that were not the same in all passes."""
    config_file, settings, rehearsed = FAMILIES[family]
    settings = [*settings, *session.size([], [*rehearsed, "data.image_size=32", "train.precision=fp32"])]
    runtime = start_runtime()  # sets what makes torch's own operators deterministic, as in a run
    config = load_config(config_file, ["data.path=none", "train.compile=false", *settings])
    task = build_task(config, [str(number) for number in range(CLASSES)])
    dtype, device, batch = DTYPES[config.train.precision], runtime.device, session.size(32, 2)
    model = task.initial_model().to(device, dtype).train()
    side = config.data.image_size
    images = torch.randn(batch, 3, side, side, device=device, dtype=dtype)
    targets = torch.rand(batch, CLASSES, device=device).softmax(dim=1)

    network: nn.Module | Callable = model
    found: dict[str, list[Pass]] = {}
    for way in WAYS:
        if way == "compiled":
            network = compiled(model, session)

        def work(network: Callable = network) -> tuple[Tensor, tuple[Tensor, ...]]:
            loss = sum(task.loss(network, (images, targets)).values())
            return loss, torch.autograd.grad(loss, list(model.parameters()))

        def measure(way: str = way, work: Callable = work) -> dict:
            found[way] = passes(model, work, device, graphs=way == "graphs")
            compared = described(found[way], found.get("compiled") if way == "graphs" else None)
            return compared | ({"lost": lost(found[way][0], found["eager"][0])} if way != "eager" else {})

        record.measure(f"{family}, {way}", measure, family=family, way=way)
    stop_runtime()


def compiled(model: nn.Module, session: Session) -> Callable:
    """The model as a run compiles it. A rehearsal skips the last stage, which would take minutes."""
    return (
        torch.compile(model, dynamic=False, backend="aot_eager")
        if session.rehearsal
        else (torch.compile(model, **compile_settings()))
    )


def passes(model: nn.Module, work: Callable, device: torch.device, graphs: bool) -> list[Pass]:
    """PASSES passes with one seed, then one with another seed."""
    if graphs:
        result, replay = record_graph(work, device)
    found = []
    for number in range(PASSES + 1):
        torch.manual_seed(1 + number // PASSES)
        if graphs:
            result = replay() or result
        else:
            result = work()
        loss, gradients = result
        names = (name for name, _ in model.named_parameters())
        found.append(Pass(loss.item(), {name: one.clone() for name, one in zip(names, gradients, strict=True)}))
    return found


def described(found: list[Pass], same: list[Pass] | None) -> dict:
    """A row: what differs between the passes of one seed, and from `same`, the passes of another way."""
    first, *again, other = found
    row = {
        "passes": len(found) - 1,
        "gradients": len(first.gradients),
        "losses": [one.loss for one in found],
        "different": differing(first, *again),
        "other_seed_differs": bool(differing(first, other)),
    }
    if same:
        row["different_from_compiled"] = differing(first, same[0]) + differing(other, same[-1])
    return row


def lost(one: Pass, eager: Pass) -> list[str]:
    """The names of the gradients that are zero here and not zero eager: they are equal to the bit in every pass."""
    return [
        name
        for name, gradient in one.gradients.items()
        if not gradient.count_nonzero() and eager.gradients[name].count_nonzero()
    ]


def differing(first: Pass, *others: Pass) -> list[str]:
    """The names of the gradients (and "loss") that are not equal to the bit in all passes."""
    names = ["loss"] if any(other.loss != first.loss for other in others) else []
    return names + [
        name
        for name, gradient in first.gradients.items()
        if not all(torch.equal(gradient, other.gradients[name]) for other in others)
    ]


def judge(rows: list[dict]) -> tuple[bool, str]:
    """Passed if nothing differs anywhere, replays equal what they were recorded from, and no gradient is lost."""
    said = []
    for row in rows:
        for key, text in (
            ("different", "differ between passes"),
            ("different_from_compiled", "differ from compiled"),
            ("lost", "are zero, and not eager"),
        ):
            if names := row.get(key):
                more = f" and {len(names) - 3} more" if len(names) > 3 else ""
                said.append(f"{row['name']}: {len(names)} of {row['gradients']} {text}: {', '.join(names[:3])}{more}")
    # What draws no random numbers is the same for every seed.
    still = [row["name"] for row in rows if row["family"] == "cat" and not row["other_seed_differs"]]
    said += [f"{name}: the masks do not follow the seed" for name in still]
    return bool(rows) and not said, "; ".join(said) or f"{len(rows)} ways, all gradients equal to the bit"
