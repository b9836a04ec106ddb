"""Read what sbatch takes as an array and as a time."""

import re

from train.config import ConfigError

MAX_SEEDS = 1000


def parse_seeds(text: str) -> list[int]:
    """An array: "0-4", "1,3,7", "0-9%2" (two at a time). Raises ConfigError."""
    if not re.fullmatch(r"\d+(-\d+)?(,\d+(-\d+)?)*(%\d+)?", text, re.ASCII):
        raise ConfigError(f"--seeds {text} is not of the form 0-4 or 1,3,7 or, two at a time, 0-9%2")
    seeds: list[int] = []
    for part in text.partition("%")[0].split(","):
        first, _, last = part.partition("-")
        low, high = int(first), int(last or first)
        if low > high:
            raise ConfigError(f"--seeds {text}: {part} is empty, write {last}-{first}")
        if high - low >= MAX_SEEDS:
            raise ConfigError(f"--seeds {text} are more than {MAX_SEEDS}")
        seeds += range(low, high + 1)
    return seeds


def parse_minutes(text: str) -> float | None:
    """A time: M, M:S, H:M:S, D-H, D-H:M, D-H:M:S; None: no limit. Raises ConfigError."""
    if text.lower() in ("unlimited", "infinite"):
        return None
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text, re.ASCII)
    if not match:
        raise ConfigError(f"--time {text} is not a time: minutes, hours:minutes:seconds or days-hours:minutes:seconds")
    days, a, b, c = (int(group) if group else 0 for group in match.groups())
    if match[1]:
        return (days * 24 + a) * 60 + b + c / 60
    return a * 60 + b + c / 60 if match[4] else a + b / 60
