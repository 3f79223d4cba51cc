"""Progress of long work: a bar where there is a terminal, plain lines where there is none."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from tqdm import tqdm
from typing_extensions import Self

LINE_SECONDS = 10.0


def _minutes(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Progress:
    """Shows how much of `total` units is done, the rate and the time left, on standard error.

    `total` may be unknown (None). Plain lines come at most every 10 seconds, and once at the end.
    """

    def __init__(self, description: str, total: int | None, unit: str = "img", done: int = 0) -> None:
        self._description, self._total, self._unit = description, total, unit
        self._first, self._done, self._shown = done, done, done
        self._began = self._last_line = time.monotonic()
        self._info = ""
        self._bar = (
            tqdm(total=total, initial=done, desc=description, unit=unit, dynamic_ncols=True, smoothing=0.1, leave=False)
            if sys.stderr.isatty()
            else None
        )

    def update(self, count: int, **info: object) -> None:
        """Add `count` units; `info` is shown beside the rate."""
        self._done += count
        self._info = " ".join(f"{key}={value}" for key, value in info.items()) or self._info
        if self._bar is not None:
            self._bar.set_postfix_str(self._info, refresh=False)
            self._bar.update(count)
        elif time.monotonic() - self._last_line >= LINE_SECONDS:
            self._line()

    def at(self, done: int) -> None:
        """Set what is done, at the start or after falling back; the rate begins anew."""
        self._first, self._done, self._shown = done, done, done
        self._began = self._last_line = time.monotonic()
        if self._bar is not None:
            self._bar.reset(self._total)
            self._bar.update(done)

    def say(self, message: str) -> None:
        """Print a line without breaking the bar."""
        if self._bar is not None:
            self._bar.write(message, file=sys.stderr)
        else:
            print(message, file=sys.stderr, flush=True)

    def _line(self) -> None:
        self._last_line, self._shown = time.monotonic(), self._done
        elapsed = self._last_line - self._began
        rate = (self._done - self._first) / elapsed if elapsed > 0 else 0.0
        of = f"/{self._total}" if self._total is not None else ""
        left = ""
        if self._total is not None and rate > 0 and self._done < self._total:
            left = f", {_minutes((self._total - self._done) / rate)} left"
        info = f" {self._info}" if self._info else ""
        print(
            f"{self._description}: {self._done}{of} {self._unit}, {rate:.0f} {self._unit}/s{left}{info}",
            file=sys.stderr,
            flush=True,
        )

    def close(self) -> None:
        """Take the bar away, or print the last line."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        elif self._done > self._shown:
            self._line()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
