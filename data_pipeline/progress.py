"""How far a long command is: a bar on a terminal, a line every ten seconds elsewhere; on standard error."""

import sys
import time

INTERVAL = 10  # seconds between lines


class Progress:
    """Call `show` with what is done so far, as often as is convenient. `done` is what was there before the start."""

    def __init__(self, unit: str, what: str, total: int | None = None, done: int = 0):
        """unit: "images", "files" or "bytes"."""
        self.unit, self.what, self.total, self.first = unit, what, total, done
        self.start = time.monotonic()
        self.next_line = self.start + INTERVAL
        self.bar = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            # A bar that would be over in a second is not shown.
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
        """What is done, its rate over these seconds, and, where there is a total, the time that is left at this rate."""
        rate = (done - self.first) / seconds
        amount = self._number(done)
        unit, speed = ("GB", f"{rate / 1e6:.0f} MB/s") if self.unit == "bytes" else (self.unit, f"{rate:.0f} {self.unit}/s")
        if self.total is None:
            return f"{self.what}: {amount} {unit}, {speed}"
        left = f"{_duration((self.total - done) / rate)} left" if rate else "time left unknown"
        return f"{self.what}: {amount} of {self._number(self.total)} {unit}, {speed}, {left}"

    def _number(self, count: float) -> str:
        return f"{count / 1e9:.1f}" if self.unit == "bytes" else f"{count:.0f}"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"
