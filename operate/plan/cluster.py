"""The plan's assumptions about a cluster: numbers with units, default guesses, and the origins of their values."""

import json
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

from train.config import Config, ConfigError


def _number(unit: str, text: str, guess: float | None = None, why: str = "") -> float | None:
    """A field of Cluster. guess: its default value. why: the guess's source."""
    return field(default=guess, metadata={"unit": unit, "help": text, "why": why})


@dataclass(frozen=True)
class Cluster:
    """The assumptions. origins: "given" or "measured: …" by field; fields without an origin are guesses."""

    nodes: int
    gpus_per_node: int
    images_per_second: float | None = _number("img/s", "a GPU alone, forward, backward and optimizer")
    decode_rate: float | None = _number("img/s", "decoded by one core of a node")
    cores_per_gpu: float | None = _number("cores", "that decode for one GPU; not given: as many as it needs")
    link_within: float | None = _number(
        "GB/s", "a GPU to others in its node, one direction", 200, "NVLink of an H100: 450 at best"
    )
    link_between: float | None = _number(
        "GB/s", "a node to others, all its cards, one direction", 25, "200 Gb/s a node"
    )
    latency_within: float | None = _number("µs", "of one message in a node", 5)
    latency_between: float | None = _number("µs", "of one message between nodes", 15)
    node_mtbf: float | None = _number(
        "h",
        "mean time between failures of one node",
        3700,
        "6.5 per 1,000 node-days: Kokolis et al. 2025, arXiv 2410.21680, RSC-1",
    )
    startup: float | None = _number("s", "from a process's start until its first step has compiled and begun", 120)
    requeue: float | None = _number("s", "from a failure until the processes are started again, mean", 300)
    checkpoint_stall: float | None = _number("s", "training stands still for a checkpoint", 1)
    checkpoint_write: float | None = _number("s", "from a checkpoint's begin until it is whole", 10)
    evaluation: float | None = _number("s", "one evaluation, of the weights and of their EMA")
    data_wait: float | None = _number("%", "of a step's time spent waiting for data that had enough cores", 0)
    straggler_every: float | None = _number("h", "from one slow episode of a node to its next, mean", 1000)
    straggler_lasts: float | None = _number("s", "one slow episode", 600)
    straggler_factor: float | None = _number("x", "time of a step while a node is slow / a usual step's", 1.5)
    price: float | None = _number("per GPU-hour", "of running; waiting in the queue costs nothing")
    origins: dict[str, str] = field(default_factory=dict, compare=False)

    @property
    def world(self) -> int:
        return self.nodes * self.gpus_per_node

    def with_values(self, values: dict[str, float], origin: str) -> "Cluster":
        """A copy with these values, and their origin."""
        return replace(self, **values, origins={**self.origins, **dict.fromkeys(values, origin)})

    def origin(self, name: str) -> str:
        """The origin of a field's value, such as "given", "measured: …", or "GUESSED (…)"."""
        why = NUMBERS[name].metadata["why"]
        return self.origins.get(name) or (f"GUESSED ({why})" if why else "GUESSED")


NUMBERS = {entry.name: entry for entry in fields(Cluster) if entry.metadata}


def read_bench(path: str, config: Config) -> tuple[dict[str, float], str]:
    """The fields of Cluster that a JSON file of launch/bench.py gives for this config's model, and their origin.

    path: written by bench.py data, train, model or guard. Raises ConfigError if it gives none.
    """
    try:
        bench = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as a result of launch/bench.py ({error})") from error
    values: dict[str, float] = {}
    name = config.model.name
    if "train" in bench and bench.get("model") == name:
        rows = bench["train"].items()
        values["images_per_second"] = next(row["median"] for way, row in rows if way.startswith("DeepSpeed"))
    row = bench.get("models", {}).get(name, {}).get("training", {}).get("rows", {}).get("ours", {})
    if "median" in row:
        values["images_per_second"] = row["median"]
    if "decoding" in bench:
        values["decode_rate"] = bench["decoding"]["rows"][f"{config.data.backend} backend"]["median"]
    if "save_stall_ms" in bench.get("guard", {}):
        values["checkpoint_stall"] = bench["guard"]["save_stall_ms"] / 1000
    if not values:
        raise ConfigError(
            f"{path} measures neither the training of {name}, nor decoding, nor a checkpoint: see launch/bench.py "
            "--help"
        )
    return values, f"measured: {path}, {bench['date']}, {bench['machine']}"
