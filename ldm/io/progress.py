"""Show progress with an ETA in one line: redrawn on a terminal, printed from time to time if the output is a file."""

import sys
import time


def format_duration(seconds: float) -> str:
    """Format a duration for reading: seconds, minutes or hours."""
    minutes = seconds / 60
    return f"{seconds:.0f} s" if minutes < 2 else f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"


class ProgressBar:
    """Progress from `start` towards `total`; `update` may be called as often as convenient.

    unit: of the rate.  seconds: between two lines if the output is not a terminal.
    """

    def __init__(self, name: str, total: int, start: int = 0, unit: str = "it", seconds: float = 15.0):
        self.name, self.total, self.start, self.unit = name, total, start, unit
        self.live = sys.stdout.isatty()
        self.every = 0.2 if self.live else seconds
        self.begin = self.last = time.monotonic()

    def update(self, done: int, note: str = "") -> None:
        """Show that `done` of `total` are finished; note: text before the rate."""
        now = time.monotonic()
        if now - self.last < self.every and done != self.total:
            return
        self.last = now
        rate = (done - self.start) / max(now - self.begin, 1e-9)
        minutes, seconds = divmod(round((self.total - done) / max(rate, 1e-9)), 60)
        width = 24 * done // max(self.total, 1)
        bar = "━" * width + "·" * (24 - width)
        line = f"{self.name:<12}{bar} {done}/{self.total}  {note}{rate:.1f} {self.unit}/s  ETA {minutes}:{seconds:02d}"
        print(f"\r{line}  " if self.live else line, end="\n" if not self.live or done == self.total else "", flush=True)
