"""What an evaluation measures: metrics by name, and their values."""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

LARGEST = 1e15  # magnitude of a score that counts: above it, and if it is no number, a network has diverged


@dataclass(frozen=True)
class Metric:
    """A number that an evaluation finds. name: its key in metrics.jsonl and TensorBoard. label, unit: for people; a
    unit "%" means 0..100.
    """

    name: str
    label: str
    unit: str
    better: Literal["higher", "lower"]

    def improves(self, value: float, best: float | None) -> bool:
        """Whether `value` is better than the best one so far (None: there is none)."""
        return best is None or (value > best if self.better == "higher" else value < best)

    def text(self, value: float) -> str:
        """Such as "top-1 70.12 %" or "loss 1.2345". A percentage of nothing is NaN, "AP small –"."""
        if self.unit == "%":
            return f"{self.label} –" if value != value else f"{self.label} {value:.2f} {self.unit}"
        return f"{self.label} {value:.4f} {self.unit}".rstrip()


@dataclass(frozen=True)
class Scores:
    """The result of an evaluation: the metrics' values by name, and the number of samples that they were computed
    from.
    """

    values: dict[str, float]
    count: int


def describe_metrics(metrics: tuple[Metric, ...]) -> list[dict[str, Any]]:
    """The metrics as the `start` and `resume` lines of metrics.jsonl have them."""
    return [{**asdict(metric), "primary": metric is metrics[0]} for metric in metrics]


@dataclass(frozen=True)
class Evaluation:
    """The newest evaluation of a run: Scores of the weights "model" and, if there is an EMA, "ema", after `step`
    steps.
    """

    step: int = -1  # none yet
    scores: dict[str, Scores] = field(default_factory=dict)

    def score(self, step: int, metric: Metric) -> float | None:
        """The value of `metric` after `step` steps: the EMA's if there is one.

        None if this evaluation is of another step, or the value is not a number of at most LARGEST.
        """
        if self.step != step:
            return None
        value = (self.scores.get("ema") or self.scores["model"]).values[metric.name]
        return value if abs(value) < LARGEST else None
