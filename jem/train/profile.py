"""Where a step's time goes: a table of its phases, and a trace of a few steps."""

from __future__ import annotations

import contextlib
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

WARM_UP, TIMED, TRACED = 5, 20, 3
"""Steps, at most; a run of fewer than all of them is divided 1 : 1 : 1 at least."""
LEAST = 3
"""Steps: one of each."""
PHASES = {
    "wait": "waiting for data",
    "copy": "copy to the device",
    "augment": "augmentation",
    "forward": "forward",
    "backward": "backward",
    "optimizer": "optimizer",
    "keep": "evaluation, checkpoint",
}
ELSE = "everything else"
TABLE, TRACE = "profile.md", "trace.json.gz"


@dataclass(frozen=True)
class Measured:
    """A step's phases, which follow each other, in milliseconds per step."""

    steps: int
    """The mean is over so many."""
    whole: float
    """A step, from its beginning to the next one's."""
    phases: dict[str, float]
    """By the names in `PHASES`."""
    aside: dict[str, float]
    """Of these, those on a stream of their own, beside the step: they do not count towards the whole."""
    pooled: bool
    """Whether the views come from a pool (`augment.placement`)."""

    def table(self) -> str:
        """Markdown: each phase in milliseconds and percent of a step, and notes on what that leaves out."""
        shown = {
            name: self.phases.get(key, 0.0)
            for key, name in PHASES.items()
            if key not in self.aside and (key != "keep" or key in self.phases)
        }
        shown[ELSE] = max(0.0, self.whole - sum(shown.values()))
        percent = _tenths_of_percent(list(shown.values()))
        width = max(map(len, [*PHASES.values(), ELSE]))
        lines = [f"| {'phase':<{width}} |       ms |     % |", f"| {'-' * width} | -------: | ----: |"]
        lines += [
            f"| {name:<{width}} | {ms:8.2f} | {tenths / 10:5.1f} |"
            for (name, ms), tenths in zip(shown.items(), percent, strict=True)
        ]
        lines.append(f"| {'a step':<{width}} | {self.whole:8.2f} | {sum(percent) / 10:5.1f} |")
        lines += ["", f"Means of {self.steps} step{'s' if self.steps > 1 else ''}."]
        if self.aside:
            parts = ", ".join(f"{PHASES[key]} {ms:.2f} ms" for key, ms in self.aside.items())
            lines.append(f"On a stream of their own, while the step before runs: {parts}.")
        if self.pooled:
            lines.append("Views are made in a pool (augment.placement), so augmentation takes no time of the step.")
        return "\n".join(lines)


class Profile:
    """Measures the phases of some steps, then records a trace of some more, and hands over both.

    After a warm-up come the steps that are timed, and after them, so that recording does not slow them, those that are
    traced. On CUDA a phase is measured between events on the stream that it runs on, which are read when all is over:
    the device is not waited for meanwhile. Waiting for data is then what the step's stream waits, not the host. A phase
    within another (on a CPU the augmentation, within the wait for the next views) does not count as the outer one's.

    Args:
        device: on which the steps run.
        report: gets the measurement and the trace's file, which is gone afterwards, once, after the last traced step.
        pooled: whether the views are made in a pool.
    """

    def __init__(self, device: torch.device, report: Callable[[Measured, Path], None], *, pooled: bool = False) -> None:
        self._clock: _Clock = _Events(device) if device.type == "cuda" else _Clock()
        self._cuda, self._report, self._pooled = device.type == "cuda", report, pooled
        self._timing = False
        self._tracer: torch.profiler.profile | None = None
        self._open = threading.local()
        self._spells: list[_Spell] = []

    def steps(self, numbers: range) -> Iterator[int]:
        """The `numbers`, one for each step; fewer than `LEAST` are not measured."""
        third = len(numbers) // LEAST
        warm, traced = min(WARM_UP, third), min(TRACED, third)
        timed = min(TIMED, len(numbers) - warm - traced) if third else 0
        begin = end = None
        try:
            for done, number in enumerate(numbers):
                if third and done == warm:
                    self._timing, begin = True, self._clock.mark()
                if third and done == warm + timed:
                    self._timing, end = False, self._clock.mark()
                    self._tracer = self._traced()
                    self._tracer.start()
                yield number
                if self._tracer is not None and done + 1 == warm + timed + traced:
                    self._finish(self._tracer, begin, end, timed)
        finally:
            if self._tracer is not None:  # the run was broken off
                self._tracer.stop()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Counts what is inside as the phase `name`, of `PHASES`."""
        if self._tracer is not None:
            with torch.profiler.record_function(f"jem/{name}"):
                yield
            return
        if not self._timing:
            yield
            return
        outer: _Spell | None = getattr(self._open, "spell", None)
        spell = self._open.spell = _Spell(name, self._clock.mark(), aside=self._clock.aside(), outer=outer)
        try:
            yield
        finally:
            spell.end = self._clock.mark()
            self._open.spell = outer
            self._spells.append(spell)

    def _traced(self) -> torch.profiler.profile:
        activities = [torch.profiler.ProfilerActivity.CPU]
        if not self._cuda:
            return torch.profiler.profile(activities=activities)
        # the augmentation has a thread of its own
        all_threads = torch.profiler._ExperimentalConfig(profile_all_threads=True)  # type: ignore[attr-defined]  # noqa: SLF001
        activities.append(torch.profiler.ProfilerActivity.CUDA)
        return torch.profiler.profile(activities=activities, experimental_config=all_threads)

    def _finish(self, tracer: torch.profiler.profile, begin: Any, end: Any, steps: int) -> None:
        tracer.stop()
        self._tracer = None
        phases: dict[str, float] = {}
        aside: dict[str, float] = {}
        for spell in self._spells:
            spent = self._clock.milliseconds(spell.begin, spell.end) / steps
            (aside if spell.aside else phases).setdefault(spell.name, 0.0)
            (aside if spell.aside else phases)[spell.name] += spent
            if spell.outer is not None and not spell.aside:
                phases[spell.outer.name] = phases.get(spell.outer.name, 0.0) - spent
        whole = self._clock.milliseconds(begin, end) / steps
        with tempfile.TemporaryDirectory() as folder:
            tracer.export_chrome_trace(str(Path(folder) / TRACE))
            self._report(Measured(steps, whole, phases, aside, self._pooled), Path(folder) / TRACE)


@dataclass
class _Spell:
    """One time that a phase took; begin and end are the clock's marks."""

    name: str
    begin: Any
    end: Any = None
    aside: bool = False
    outer: _Spell | None = None
    """The one that it happened in, in the same thread."""


class _Clock:
    """Marks moments, and tells later how far they are apart: on a CPU, by the wall's clock."""

    def mark(self) -> Any:
        """This moment."""
        return time.perf_counter()

    def aside(self) -> bool:
        """Whether what happens now is not in the step's own sequence."""
        return False

    def milliseconds(self, begin: Any, end: Any) -> float:
        """Between two moments."""
        return float(1000 * (end - begin))


class _Events(_Clock):
    """Moments of a CUDA device: when it gets to what the host has queued on the current stream."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._main = device, torch.cuda.current_stream(device)

    def mark(self) -> Any:
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        return torch.cuda.current_stream(self._device).record_event(event)

    def aside(self) -> bool:
        return torch.cuda.current_stream(self._device) != self._main

    def milliseconds(self, begin: Any, end: Any) -> float:
        end.synchronize()
        return float(begin.elapsed_time(end))


def _tenths_of_percent(parts: list[float]) -> list[int]:
    """Shares of the sum in tenths of a percent, which add up to 1000: the largest remainders are rounded up."""
    whole = sum(parts)
    exact = [1000 * part / whole for part in parts]
    rounded = [int(each) for each in exact]
    for index in sorted(range(len(parts)), key=lambda i: rounded[i] - exact[i])[: 1000 - sum(rounded)]:
        rounded[index] += 1
    return rounded
