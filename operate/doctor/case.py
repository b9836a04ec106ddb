"""A line of the doctor's page, what is judged, and how sentences name nodes."""

from dataclasses import dataclass

from operate.doctor.meeting import Meeting
from train.config import Config

GREEN, YELLOW, RED = "green", "yellow", "red"
NAMED = 4  # nodes that a sentence lists


@dataclass(frozen=True)
class Line:
    """A line of the page: what was looked at, what is the matter, and, where it is red, what to do."""

    check: str
    status: str
    says: str
    remedy: str = ""


@dataclass(frozen=True)
class Case:
    """Everything that is judged. facts: what each rank reported, by check; silent ranks have none. sizes: bytes of a whole checkpoint.

    gpu_rate: images a second that a device takes, and where that number is from; None: the measured step's own.
    """

    config: Config
    meeting: Meeting
    facts: dict[int, dict]
    checkpoint: int
    gpu_rate: tuple[float, str] | None

    def values(self, check: str) -> dict[int, dict]:
        """By rank, where the check came to its end."""
        return {rank: facts[check]["value"] for rank, facts in self.facts.items() if "value" in facts.get(check, {})}

    def names(self, ranks) -> str:
        """The nodes of `ranks`, and the ranks where a node has others, too: "n1, n3 (rank 25)"."""
        hosts: dict[str, list[int]] = {}
        for rank in ranks:
            hosts.setdefault(self.meeting.hosts[rank] or f"rank {rank}", []).append(rank)
        said = []
        for host, own in hosts.items():
            every = [rank for rank in range(self.meeting.world) if self.meeting.hosts[rank] == host]
            partly = len(own) < len(every)
            said.append(f"{host} (rank {', '.join(map(str, own))})" if partly else host)
        return ", ".join(said[:NAMED]) + (f" and {len(said) - NAMED} more" if len(said) > NAMED else "")


def odd_one_out(case: Case, texts: dict[int, str]) -> str:
    """Which ranks differ from the majority, in a sentence; "" where all are alike. Without a majority all are named."""
    groups: dict[str, list[int]] = {}
    for rank, text in sorted(texts.items()):
        groups.setdefault(text, []).append(rank)
    if len(groups) == 1:
        return ""
    largest = max(groups, key=lambda text: len(groups[text]))
    if 2 * len(groups[largest]) > len(texts):
        odd = "; ".join(f"{case.names(ranks)} has {text}" for text, ranks in groups.items() if text != largest)
        return f"{odd}, the others {largest}"
    return ", ".join(f"{case.names(ranks)} has {text}" for text, ranks in groups.items())


def one_micro_batch(config: Config) -> Config:
    """`config` with a number for train.micro_batch, and without what takes minutes to compile."""
    settings = {"micro_batch": config.smallest_micro_batch, "compile": False, "cuda_graphs": False}
    return config.model_copy(update={"train": config.train.model_copy(update=settings)})
