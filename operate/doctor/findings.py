"""What the checks found on all ranks, the lines that are printed of it, and how sentences name nodes."""

from collections.abc import Iterable
from dataclasses import dataclass

from operate.doctor.meeting import Meeting
from train.config import Config

GREEN, YELLOW, RED = "green", "yellow", "red"
NAMED = 4  # nodes that a sentence lists


@dataclass(frozen=True)
class Line:
    """A line of the page: the check, its status, a sentence about the finding, and for a red line the remedy."""

    check: str
    status: str
    says: str
    remedy: str = ""


@dataclass(frozen=True)
class Findings:
    """Everything that is assessed.

    facts: what each rank reported, by check; a rank that did not report is absent. checkpoint: bytes of a checkpoint.
    gpu_rate: images per second that a device takes, and the source of that number; None: use the measured step's.
    """

    config: Config
    meeting: Meeting
    facts: dict[int, dict]
    checkpoint: int
    gpu_rate: tuple[float, str] | None

    def values(self, check: str) -> dict[int, dict]:
        """The check's results by rank, of the ranks that completed it."""
        return {rank: facts[check]["value"] for rank, facts in self.facts.items() if "value" in facts.get(check, {})}

    def names(self, ranks: Iterable[int]) -> str:
        """The nodes of `ranks`, with the ranks if they are not all of a node's: "n1, n3 (rank 25)"."""
        hosts: dict[str, list[int]] = {}
        for rank in ranks:
            hosts.setdefault(self.meeting.hosts[rank] or f"rank {rank}", []).append(rank)
        names = []
        for host, own in hosts.items():
            every = [rank for rank in range(self.meeting.world) if self.meeting.hosts[rank] == host]
            partly = len(own) < len(every)
            names.append(f"{host} (rank {', '.join(map(str, own))})" if partly else host)
        return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")

    def differences(self, texts: dict[int, str]) -> str:
        """A sentence that names the ranks whose text differs from the majority's; "" if all are equal.

        Without a majority all ranks are named.
        """
        groups: dict[str, list[int]] = {}
        for rank, text in sorted(texts.items()):
            groups.setdefault(text, []).append(rank)
        if len(groups) == 1:
            return ""
        largest = max(groups, key=lambda text: len(groups[text]))
        if 2 * len(groups[largest]) > len(texts):
            odd = "; ".join(f"{self.names(ranks)} has {text}" for text, ranks in groups.items() if text != largest)
            return f"{odd}, the others {largest}"
        return ", ".join(f"{self.names(ranks)} has {text}" for text, ranks in groups.items())


def one_micro_batch(config: Config) -> Config:
    """`config` with a number for train.micro_batch."""
    return config.with_micro_batch(config.smallest_micro_batch)
