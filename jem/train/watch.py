"""What a run tells while it trains: terms, rates, waiting, the health of the embedding, and what is wrong in words."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from jem import distributed
from jem.config import TrainConfig
from jem.errors import RunError
from jem.evaluate.collapse import Health, Verdict, embedding_health, verdict
from jem.methods.base import StepOutput

Summary = dict[str, float | str]
"""The last value of each metric, `collapse` (0, or the type, 1 or 2) and `verdict` (the same in words)."""
HEALTH = ("std", "spread", "rankme", "rank", "correlation")
WAIT_WARNING = 0.1
"""Share of time spent waiting for data above which a hint is given."""


class Reporter(Protocol):
    """Where a run's news go. Only rank 0 has news."""

    def metrics(self, values: dict[str, float], step: int) -> None:
        """Numbers of one step."""

    def progress(self, images: int, info: dict[str, float]) -> None:
        """So many more images were trained on."""

    def say(self, message: str) -> None:
        """A line for the user."""


class Watch:
    """Measures the steps of one worker, and tells the reporter every `log_every` steps.

    Numbers stay on the device until they are told. `late`, for a device that works while the host goes on, tells of a
    step when the next one has been given to the device, or the epoch ends: it never runs out of work for being read.
    All workers read after the same steps, so that they stop after the same one.

    Args:
        config: how often it tells and examines.
        reporter: whom it tells.
        step: steps done so far.
        scaled: whether the loss holds the embedding to a scale, so that a small one is a collapse.
        late: whether to tell one step later.
        given: whether this worker wants a checkpoint at once; asked when it tells.
    """

    def __init__(
        self,
        config: TrainConfig,
        reporter: Reporter,
        step: int,
        *,
        scaled: bool,
        late: bool = False,
        given: Callable[[], bool] | None = None,
    ) -> None:
        self._config, self._reporter, self._scaled, self._late = config, reporter, scaled, late
        self._unread: list[Callable[[], None]] = []
        self._computed: torch.cuda.Event | None = None
        self._aside: torch.cuda.Stream | None = None
        self._told = step
        self._images, self._waited, self._began = 0, 0.0, time.monotonic()
        self._first_bad: Tensor | None = None
        self._names: list[str] = []
        self._hinted = False
        self._given, self._noticed = given, False
        self.health: Health | None = None
        self.verdict: Verdict | None = None
        self.last: dict[str, float] = {}

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the time inside as waiting for data."""
        asked = time.monotonic()
        yield
        self._waited += time.monotonic() - asked

    def step(self, output: StepOutput, images: int, step: int, rates: dict[str, float], *, last: bool) -> None:
        """Note step number `step` (from 1) with its global count of `images`; `last` is an epoch's last step.

        Raises:
            RunError: A term was not finite since the last time it was told, on any worker.
        """
        self._catch_up()
        self._images += images
        first_bad = self._note_terms(output, step)
        due = step % self._config.log_every == 0
        sick = step % self._config.health_every == 0
        if due or sick or last:
            given = torch.full_like(first_bad[:, :1], self._given is not None and self._given())
            flags = distributed.gather(torch.cat([first_bad, given], dim=1))
            self._unread.append(partial(self._refuse, flags[:, :-1], rates["lr"]))
            self._unread.append(partial(self._heed, flags[:, -1]))
        if due:
            self._unread.append(partial(self._tell, distributed.all_reduce_mean(self._values), rates, step))
        if sick or last:
            embedding, representation = (
                distributed.gather(x.detach().float()) for x in (output.embedding, output.representation)
            )
            assignment = None if output.assignment is None else distributed.gather(output.assignment.float())
            self._unread.append(partial(self._examine, embedding, representation, assignment, step))
        if self._unread and self._values.is_cuda:
            self._computed = torch.cuda.current_stream(self._values.device).record_event()
        if last or not self._late:
            self._catch_up()

    def _catch_up(self) -> None:
        """Read what was noted. On CUDA a stream of its own waits for that alone, not for the step given since."""
        unread, self._unread = self._unread, []
        if not unread:
            return
        if self._computed is not None:
            self._aside = self._aside or torch.cuda.Stream(self._values.device)  # type: ignore[no-untyped-call]
            self._aside.wait_event(self._computed)
        with contextlib.nullcontext() if self._aside is None else torch.cuda.stream(self._aside):
            for read in unread:
                read()

    def _note_terms(self, output: StepOutput, step: int) -> Tensor:
        """Returns this worker's first step at which each term was not finite, or -1: int64 (1, terms)."""
        self._names = ["loss", *output.terms]
        self._values = torch.stack([output.loss.detach(), *(term.detach() for term in output.terms.values())]).double()
        if self._first_bad is None:
            self._first_bad = torch.full((1, len(self._names)), -1, dtype=torch.int64, device=self._values.device)
        bad = (self._first_bad < 0) & ~torch.isfinite(self._values)
        self._first_bad = torch.where(bad, step, self._first_bad)
        return self._first_bad

    def check(self, lr: float) -> None:
        """Stop the run if a term was not finite, on any worker.

        Raises:
            RunError: Names the step, the terms, and what helps.
        """
        self._catch_up()
        if self._first_bad is not None:
            self._refuse(distributed.gather(self._first_bad), lr)

    def noticed(self) -> bool:
        """Whether any worker wanted a checkpoint at once since this was asked last; the same on all."""
        noticed, self._noticed = self._noticed, False
        return noticed

    def _heed(self, given: Tensor) -> None:
        self._noticed |= bool(given.any())

    def _refuse(self, first_bad: Tensor, lr: float) -> None:
        """`first_bad`: (workers, terms), each worker's first step whose term was not finite, or -1."""
        first = first_bad.amax(0).tolist()
        bad = {name: step for name, step in zip(self._names, first, strict=True) if step >= 0}
        if bad:
            raise RunError(
                f"not finite since step {min(bad.values())}: {', '.join(bad)}. Lower optimizer.lr (the rate was "
                f"{lr:.3g}), lengthen schedule.warmup_epochs or set train.clip_norm; the last checkpoint is kept"
            )

    def _tell(self, terms: Tensor, lr_and_decay: dict[str, float], step: int) -> None:
        values = dict(zip(self._names, terms.tolist(), strict=True)) | lr_and_decay
        elapsed = max(time.monotonic() - self._began, 1e-9)
        rates = {"images_per_second": self._images / elapsed, "wait_share": self._waited / elapsed}
        self._reporter.metrics({f"train/{name}": value for name, value in (values | rates).items()}, step)
        self._reporter.progress(self._images, {"loss": values["loss"], "waiting": rates["wait_share"]})
        if rates["wait_share"] > WAIT_WARNING and self._told > 0 and not self._hinted:
            self._hinted = True
            self._reporter.say(
                f"waiting for data takes {rates['wait_share']:.0%} of the time: raise stream.decode_tasks, add "
                "CPU nodes, or make smaller images once with `jem ingest --short-side`"
            )
        self._told = step
        self._images, self._waited, self._began = 0, 0.0, time.monotonic()
        self.last = values | rates

    def _examine(self, embedding: Tensor, representation: Tensor, assignment: Tensor | None, step: int) -> None:
        """Each is looked at: a batch norm at the head's end keeps a collapsed embedding's scale up, for example."""
        self.health = embedding_health(embedding)
        kept = embedding_health(representation)
        found = verdict(self.health, absolute=self._scaled)
        if not found.kind:
            below = verdict(kept, absolute=False)
            found = replace(below, words=f"the representation is {below.words}") if below.kind else found
        if not found.kind and assignment is not None:
            # the probabilities of neighbouring clusters correlate by nature: only their spread counts
            above = verdict(embedding_health(assignment), absolute=False)
            found = replace(above, words=f"the assignment to clusters is {above.words}") if above.kind == 1 else found
        values = {f"health/{name}": getattr(self.health, name) for name in HEALTH}
        values |= {f"health/representation_{name}": getattr(kept, name) for name in HEALTH}
        self._reporter.metrics(values, step)
        if found.kind != (self.verdict.kind if self.verdict is not None else 0):
            self._reporter.say(f"step {step}: {found.words}")
        self.verdict = found

    def epoch(self, epoch: int, epochs: int, step: int, judged: dict[str, float]) -> None:
        """Tell what an epoch came to; `judged` is what an evaluation at its end found."""
        assert self.health is not None
        assert self.verdict is not None
        ended = {"epoch": epoch + 1, "health/collapse": self.verdict.kind}
        self._reporter.metrics({f"online/{name}": value for name, value in judged.items()} | ended, step)
        self.last |= judged
        parts = [f"{name} {value:.3g}" for name, value in self.last.items() if name in ("loss", *judged)]
        health = f"std {self.health.std:.2f}, rank {self.health.rankme:.0f}/{min(self.health.rows, self.health.dim)}"
        speed = f", {self.last['images_per_second']:.0f} img/s" if "images_per_second" in self.last else ""
        self._reporter.say(f"epoch {epoch + 1}/{epochs}: {', '.join([*parts, health])}{speed}")

    def summary(self) -> Summary:
        """What is known now."""
        values: Summary = dict(self.last)
        if self.health is not None and self.verdict is not None:
            values |= {name: getattr(self.health, name) for name in HEALTH}
            values |= {"collapse": self.verdict.kind, "verdict": self.verdict.words}
        return values
