"""Measures several ways of doing one thing side by side: in turns, in one process tree, with the median of the rounds.

What a machine gives varies from minute to minute; in turns, all ways get the same share of its good and bad minutes.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field


@dataclass
class Way:
    """One way of doing it."""

    name: str
    run: Callable[[], int | tuple[int, float]]
    """Does it, and returns how many images it did; and in how many seconds, if it leaves a warm-up of its own out."""
    limit: str = ""
    """What limits it, in words."""
    rates: list[float] = field(default_factory=list)
    """Images/s of each round."""

    @property
    def median(self) -> float:
        """Images/s."""
        return statistics.median(self.rates)


def in_turns(ways: Sequence[Way], rounds: int) -> None:
    """Run each way once for nothing (imports, caches, worker processes), then `rounds` times, one after the other."""
    for turn in range(rounds + 1):
        for way in ways:
            gc.collect()
            began = time.perf_counter()
            done = way.run()
            images, seconds = done if isinstance(done, tuple) else (done, time.perf_counter() - began)
            rate = images / seconds
            if turn:
                way.rates.append(rate)
            print(f"  {'warm-up' if turn == 0 else f'round {turn}'}: {way.name} {rate:.0f} images/s", flush=True)


def table(title: str, ways: Sequence[Way]) -> str:
    """Markdown: images/s of each way, and how many times as fast the first one is."""
    lines = [
        f"| {title} | images/s | lowest-highest | jem is so many times as fast | limited by |",
        "| --- | --- | --- | --- | --- |",
    ]
    for way in ways:
        ratio = f"{ways[0].median / way.median:.2f}" if way is not ways[0] else ""
        spread = f"{min(way.rates):.0f}-{max(way.rates):.0f}"
        lines.append(f"| {way.name} | {way.median:.0f} | {spread} | {ratio} | {way.limit} |")
    return "\n".join(lines)
