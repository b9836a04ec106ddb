"""Progress of a long command on standard error: a bar on a terminal, otherwise a line every ten seconds."""

import sys
import time

from data_pipeline.formatting import duration

INTERVAL = 10  # seconds between lines


class Progress:
    """A progress display. Call `show` with the amount that is done, as often as convenient."""

    def __init__(self, unit: str, what: str, total: int | None = None, done: int = 0):
        """unit: "images", "files" or "bytes". what: the activity. done: the amount that was done before the start."""
        self.unit, self.what, self.total, self.first = unit, what, total, done
        self.start = time.monotonic()
        self.next_line = self.start + INTERVAL
        self.bar = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            # delay: no bar for work that takes less than a second.
            scale = {"unit": "B", "unit_scale": True} if unit == "bytes" else {"unit": f" {unit}"}
            self.bar = tqdm(desc=what, total=total, initial=done, smoothing=0.1, delay=1, **scale)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_) -> None:
        if self.bar is not None:
            self.bar.close()

    def show(self, done: int) -> None:
        now = time.monotonic()
        if self.bar is not None:
            self.bar.update(done - self.bar.n)
        elif now >= self.next_line:
            print(self.line(done, now - self.start), file=sys.stderr, flush=True)
            self.next_line = now + INTERVAL

    def line(self, done: int, seconds: float) -> str:
        """The amount done, its rate over `seconds`, and, if there is a total, the time left at this rate."""
        rate = (done - self.first) / seconds
        amount = self._number(done)
        unit, speed = (
            ("GB", f"{rate / 1e6:.0f} MB/s") if self.unit == "bytes" else (self.unit, f"{rate:.0f} {self.unit}/s")
        )
        if self.total is None:
            return f"{self.what}: {amount} {unit}, {speed}"
        left = f"{duration((self.total - done) / rate)} left" if rate else "time left unknown"
        return f"{self.what}: {amount} of {self._number(self.total)} {unit}, {speed}, {left}"

    def _number(self, count: float) -> str:
        return f"{count / 1e9:.1f}" if self.unit == "bytes" else f"{count:.0f}"
