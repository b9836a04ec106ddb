"""Interleaved timing of alternatives, their summary, and a table of it as text."""

import statistics
import time
from collections.abc import Callable

import torch

from train.engine.flops import finish
from train.telemetry.formatting import table


def interleave(
    ways: dict[str, Callable[[], tuple[int, float] | None]],
    count: int,
    rounds: int,
    clock: Callable[[], float] = time.process_time,
) -> dict[str, list[float]]:
    """Rates of each way in images per second, one per round, after a round that warms up.

    In a round the ways run one after the other, so that other load on the machine affects all of them equally. A way
    handles `count` images and is timed by `clock`, unless it returns (images, seconds) itself.
    """
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, way in ways.items():
            began = clock()
            handled, seconds = way() or (count, clock() - began)
            if number:
                rates[name].append(handled / seconds)
    return rates


def summary(rates: dict[str, list[float]], base: str) -> dict[str, dict[str, float]]:
    """Per way: median, min and max of its rates, and the median over the rounds of its ratio to the way `base`."""
    return {
        name: {
            "median": statistics.median(values),
            "min": min(values),
            "max": max(values),
            "ratio": statistics.median(value / other for value, other in zip(values, rates[base], strict=True)),
        }
        for name, values in rates.items()
    }


def rates_table(rows: dict[str, dict[str, float]], unit: str, base: str) -> str:
    """The result of `summary` as text."""
    cells = [
        [name, *(f"{row[key]:.1f}" for key in ("median", "min", "max")), f"{row['ratio']:.2f}"]
        for name, row in rows.items()
    ]
    return table([["", unit, "min", "max", f"x {base}"], *cells])


class DeviceTimer:
    """Times between marks, measured on the device: on a GPU by events, so that marking does not synchronise."""

    def __init__(self, device: torch.device):
        self.device, self.marks = device, []

    def mark(self) -> None:
        if self.device.type == "cuda":
            self.marks.append(torch.cuda.Event(enable_timing=True))
            self.marks[-1].record()
        else:
            self.marks.append(time.perf_counter())

    def milliseconds(self) -> list[float]:
        """Milliseconds between consecutive marks. Waits for the device."""
        finish(self.device)
        if self.device.type == "cuda":
            return [one.elapsed_time(two) for one, two in zip(self.marks, self.marks[1:], strict=False)]
        return [1000 * (two - one) for one, two in zip(self.marks, self.marks[1:], strict=False)]
