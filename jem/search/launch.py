"""Runs a search's trials on Ray Tune: so many at a time, stopped early by ASHA, ended with all that they started.

Tune keeps its own state in a temporary folder, pickled, and it is never read: what a search needs to go on is in the
`Book`'s records.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import tempfile
import threading
import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any, Protocol

from ray import tune
from ray.tune import CheckpointConfig, FailureConfig, RunConfig, TuneConfig, Tuner
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher
from ray.tune.stopper import Stopper

from jem.config import SearchConfig
from jem.errors import InputError, RunError
from jem.search.trials import Epoch, Trial, collapsed

HEARTBEAT_SECONDS = 1.0
"""How often a trial's actor listens, in its longest wait: Tune's calls come one after the other."""
CLEANUP_SECONDS = 8.0
"""In which a stopped training has ended its workers; Tune kills the actor after 10."""
STOP_SECONDS = 30.0
POLL_SECONDS = 0.5
SWITCHES = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # CSV, JSON and TensorBoard files: MLflow has the curves
    "RAY_AIR_NEW_OUTPUT": "0",  # prints a table, however quiet it is asked to be
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a heartbeat has no metric
}

Told = Callable[[Epoch, bool], None]
"""What a trial is to call at each epoch's end; True with the last."""
Work = Callable[[Trial, Told, threading.Event], tuple[dict[str, float], float, str]]
"""Trains and judges an encoder: (trial, what is told of each epoch, end it) -> (figures, objective, verdict). The
verdict is empty, or says how the encoder collapsed."""


class Book(Protocol):
    """The driver's record of the search."""

    def next(self) -> Trial | None:
        """The trial to begin, or to go on with; None when all have begun."""

    def epoch(self, number: int, epoch: Epoch) -> None:
        """A trial came to the end of an epoch."""

    def ended(self, number: int, outcome: dict[str, Any]) -> None:
        """A trial is over: `status`, and `figures` and `objective`, or a `reason`."""

    def stopped(self) -> None:
        """The search is interrupted, and all that run are about to end; nothing more is told."""


def run_trials(
    book: Book,
    work: Work,
    search: SearchConfig,
    *,
    left: int,
    concurrent: int,
    epochs: int,
    over: Sequence[Trial],
    cpus: float,
    max_failures: int,
) -> None:
    """Run what is left of a search, to the end or until this thread is interrupted.

    Args:
        book: gives the trials and records what they come to; called in one other thread.
        work: runs in an actor of its own for each trial, anywhere in the cluster.
        search: early stopping and the guard against collapse.
        left: trials to run.
        concurrent: trials at a time.
        epochs: of the longest trial.
        over: trials that are over already, by which later ones are compared.
        cpus: that each trial's actor reserves.
        max_failures: how often a trial goes on whose actor died; -1: without limit.

    Raises:
        RunError: Tune itself failed.
    """
    os.environ |= SWITCHES
    for name in ("ray.tune", "ray.air"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    stopper = _Stopper()
    with tempfile.TemporaryDirectory(prefix="jem-tune-") as scratch:
        tuner = Tuner(
            tune.with_resources(
                tune.with_parameters(_TrialActor, work=work, patience=search.collapsed_epochs), {"CPU": cpus}
            ),
            tune_config=TuneConfig(
                num_samples=left,
                max_concurrent_trials=concurrent,
                search_alg=_Asking(book),
                scheduler=_scheduler(search, epochs, over),
                trial_dirname_creator=lambda trial: f"{trial.config['number']}-{trial.trial_id}",
            ),
            run_config=RunConfig(
                name=uuid.uuid4().hex,
                storage_path=scratch,
                callbacks=[_Recording(book)],
                stop=stopper,
                failure_config=FailureConfig(max_failures=max_failures),
                checkpoint_config=CheckpointConfig(checkpoint_at_end=False),
                verbose=0,
            ),
        )
        _until_done(tuner, stopper, book)


def _until_done(tuner: Tuner, stopper: _Stopper, book: Book) -> None:
    """`tuner.fit()` in a thread: in the main one it takes signals for itself."""
    failure: list[BaseException] = []
    done = threading.Event()  # an interrupted join() takes the thread for dead, before Python 3.12

    def run() -> None:
        try:
            tuner.fit()
        except BaseException as error:  # noqa: BLE001 - raised again below
            failure.append(error)
        finally:
            done.set()

    threading.Thread(target=run, daemon=True, name="jem-tune").start()
    try:
        while not done.wait(POLL_SECONDS):  # without a limit, signals would wait for the end
            pass
    finally:
        if not done.is_set():
            book.stopped()
            stopper.now.set()
            done.wait(STOP_SECONDS)
    if failure:
        error = failure[0]
        if isinstance(error, InputError | RunError):
            raise error
        raise RunError(f"the search stopped: {_line(error)}. Go on with --resume") from error


def _scheduler(search: SearchConfig, epochs: int, over: Sequence[Trial]) -> TrialScheduler:
    """ASHA that knows what went before."""
    if search.early_stop == "none":
        return FIFOScheduler()  # type: ignore[no-untyped-call]
    asha = ASHAScheduler(
        time_attr="epoch",
        metric="value",
        mode="max",
        max_t=epochs,
        grace_period=min(search.grace, epochs),
        reduction_factor=search.reduction,
        stop_last_trials=False,
    )
    nobody: Any = None
    for trial in over:
        past: Any = SimpleNamespace(trial_id=trial.name)
        asha.on_trial_add(nobody, past)
        for epoch in trial.epochs:
            asha.on_trial_result(nobody, past, _compared(epoch))
    return asha


def _compared(epoch: Epoch) -> dict[str, Any]:
    """What ASHA compares of an epoch; without a value it passes it over."""
    return {} if epoch.value is None else {"epoch": epoch.epoch, "value": epoch.value}


def _noted(epoch: Epoch) -> dict[str, Any]:
    """What the book is told of it."""
    return {"noted": asdict(epoch)}


def _line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


# --- in the driver ----------------------------------------------------------------------------------------------------


class _Unkept:
    """Left out of what Tune pickles of itself, for a restore that is never asked for."""

    def __getstate__(self) -> dict[str, Any]:
        return {}


class _Asking(_Unkept, Searcher):
    """Gives Tune the book's trials."""

    def __init__(self, book: Book) -> None:
        super().__init__()
        self._book = book

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        del trial_id
        trial = self._book.next()
        if trial is None:
            return Searcher.FINISHED  # type: ignore[return-value]  # a word, whatever its signature says
        return {"number": trial.number, "trial": json.dumps(trial.to_json())}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Nothing to do: `_Recording` hears more."""

    def save(self, checkpoint_path: str) -> None:
        """Nothing to save: the book has it."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing was saved."""


class _Recording(_Unkept, tune.Callback):
    """Tells the book what Tune hears."""

    def __init__(self, book: Book) -> None:
        self._book = book

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any) -> None:
        if "noted" in result:
            self._book.epoch(trial.config["number"], Epoch(**result["noted"]))

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        outcome = trial.last_result.get("outcome") or {"status": "pruned", "reason": "others were better at its age"}
        self._book.ended(trial.config["number"], outcome)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        reason = _line(trial.get_error() or RuntimeError("its process died"))
        self._book.ended(trial.config["number"], {"status": "failed", "reason": reason})


class _Stopper(_Unkept, Stopper):
    """Ends the whole search when it is told to."""

    def __init__(self) -> None:
        self.now = threading.Event()

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return self.now.is_set()


# --- in the cluster ---------------------------------------------------------------------------------------------------


class _TrialActor(tune.Trainable):
    """One trial. Its training runs in a thread, so that Tune can stop it, and ends before the actor does."""

    def setup(self, config: dict[str, Any], work: Work, patience: int) -> None:  # type: ignore[override]  # with_parameters
        """Begin; what is known of a trial that goes on is reported again first, for ASHA."""
        self._trial = Trial.from_json(json.loads(config["trial"]))
        self._patience = patience
        self._news: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._stopped = threading.Event()
        self._last: dict[str, Any] = {}
        for epoch in self._trial.epochs:
            self._news.put(_compared(epoch) | _noted(epoch))
        self._thread = threading.Thread(target=self._run, args=(work,), daemon=True, name="jem-trial")
        self._thread.start()

    def step(self) -> dict[str, Any]:
        """The next piece of news, or nothing, for Tune cannot stop a trial that it waits for."""
        try:
            return self._news.get(timeout=HEARTBEAT_SECONDS)
        except queue.Empty:
            return {}

    def cleanup(self) -> None:
        """End the training, its workers and its placement group."""
        self._stopped.set()
        self._thread.join(CLEANUP_SECONDS)

    def _run(self, work: Work) -> None:
        try:
            figures, objective, verdict = work(self._trial, self._ended, self._stopped)
            status = "collapsed" if verdict else "finished"
            outcome = {"status": status, "figures": figures, "objective": None if verdict else objective}
            outcome |= {"reason": verdict}
        except (InputError, RunError) as error:
            outcome = {"status": "failed", "reason": str(error).splitlines()[0]}
        except Exception as error:  # noqa: BLE001 - whatever it was, the other trials go on
            outcome = {"status": "failed", "reason": f"{type(error).__name__}: {_line(error)}"}
        self._news.put({**self._last, "outcome": outcome, "done": True})

    def _ended(self, epoch: Epoch, last: bool) -> None:
        known = self._trial.epochs
        if known and epoch.epoch <= known[-1].epoch:  # it was trained again, from the last checkpoint on
            return
        self._trial.note(epoch)
        if last:  # compared when the trial is judged: there is nothing left to save by stopping it
            self._last = _compared(epoch)
            self._news.put(_noted(epoch))
            return
        report = _compared(epoch) | _noted(epoch)
        if collapsed(self._trial.epochs, self._patience):
            kind = "complete" if epoch.collapse == 1 else "informational"
            reason = f"collapsed ({kind}) since epoch {self._trial.epochs[-self._patience].epoch}"
            report |= {"outcome": {"status": "collapsed", "reason": reason}, "done": True}
        self._news.put(report)
