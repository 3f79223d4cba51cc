"""Running trials on Ray Tune, with work that trains nothing: each once, so many at a time, and how they end."""

from __future__ import annotations

import _thread
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from jem.config import SearchConfig
from jem.errors import RunError
from jem.search.launch import run_trials
from jem.search.trials import Epoch, Trial

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]
DEADLINE = 60.0


class Notes:
    """A book in memory."""

    def __init__(self, *trials: Trial) -> None:
        self.waiting = list(trials)
        self.epochs: dict[int, list[Epoch]] = {trial.number: [] for trial in trials}
        self.outcomes: dict[int, dict[str, Any]] = {}
        self.interrupted = False

    def next(self) -> Trial | None:
        return self.waiting.pop(0) if self.waiting else None

    def epoch(self, number: int, epoch: Epoch) -> None:
        self.epochs[number].append(epoch)

    def ended(self, number: int, outcome: dict[str, Any]) -> None:
        assert number not in self.outcomes, "a trial ends once"
        self.outcomes[number] = outcome

    def stopped(self) -> None:
        self.interrupted = True

    def statuses(self) -> dict[int, str]:
        return {number: outcome["status"] for number, outcome in sorted(self.outcomes.items())}


def trials(*values: float) -> list[Trial]:
    return [Trial(number, {"value": value}) for number, value in enumerate(values)]


def run(notes: Notes, work: Callable[..., Any], *, concurrent: int = 2, epochs: int = 9, **given: Any) -> Notes:
    over = given.pop("over", [])
    max_failures = given.pop("max_failures", 0)
    run_trials(
        notes,
        work,
        SearchConfig(**given),
        left=len(notes.waiting),
        concurrent=concurrent,
        epochs=epochs,
        over=over,
        cpus=0.01,
        max_failures=max_failures,
    )
    return notes


def test_every_trial_runs_once_and_never_more_at_once_than_allowed(tmp_path: Path):
    def work(trial: Trial, told: Any, stop: threading.Event) -> tuple[dict[str, float], float, str]:
        mine = tmp_path / f"running-{trial.number}"
        mine.touch(exist_ok=False)
        most, end = 0, time.monotonic() + 60
        # the first two wait for each other, which shows that two do run at once
        while most < (2 if trial.number < 2 else 1) and time.monotonic() < end:
            most = max(most, len(list(tmp_path.glob("running-*"))))
            time.sleep(0.01)
        told(Epoch(1, 0.5, 0), True)
        most = max(most, len(list(tmp_path.glob("running-*"))))
        mine.unlink()
        return {"most": most}, trial.settings["value"], ""

    notes = run(Notes(*trials(0.1, 0.2, 0.3, 0.4)), work)
    assert notes.statuses() == dict.fromkeys(range(4), "finished")
    assert [notes.outcomes[number]["objective"] for number in range(4)] == [0.1, 0.2, 0.3, 0.4]
    assert max(outcome["figures"]["most"] for outcome in notes.outcomes.values()) == 2
    assert notes.epochs == {number: [Epoch(1, 0.5, 0)] for number in range(4)}


def lingering(folder: Path, losers: float) -> Callable[..., Any]:
    """Work that tells an epoch of its value; with one under `losers` it waits to be stopped, and leaves a file then."""

    def work(trial: Trial, told: Any, stop: threading.Event) -> tuple[dict[str, float], float, str]:
        told(Epoch(1, trial.settings["value"], 0), False)
        if trial.settings["value"] < losers:
            if stop.wait(60):
                (folder / f"stopped-{trial.number}").touch()
            raise RunError("stopped")
        told(Epoch(2, trial.settings["value"], 0), True)
        return {}, trial.settings["value"], ""

    return work


def test_asha_stops_those_that_are_behind_and_their_work_hears_of_it(tmp_path: Path):
    notes = run(Notes(*trials(0.8, 0.1, 0.9, 0.2)), lingering(tmp_path, 0.5), concurrent=1)
    assert notes.statuses() == {0: "finished", 1: "pruned", 2: "finished", 3: "pruned"}
    assert {path.name for path in tmp_path.iterdir()} == {"stopped-1", "stopped-3"}
    assert notes.epochs[1] == [Epoch(1, 0.1, 0)]


def test_asha_knows_the_trials_of_before_the_search_was_stopped(tmp_path: Path):
    before = [Trial(number, {"value": 0.8}, "finished", [Epoch(1, 0.8, 0), Epoch(2, 0.8, 0)]) for number in range(3)]
    late = Trial(3, {"value": 0.1})
    notes = run(Notes(late), lingering(tmp_path, 0.5), over=before)
    assert notes.statuses() == {3: "pruned"}


def test_nothing_is_stopped_early_where_that_is_not_wanted():
    def work(trial: Trial, told: Any, stop: threading.Event) -> tuple[dict[str, float], float, str]:
        told(Epoch(1, trial.settings["value"], 0), False)
        told(Epoch(2, trial.settings["value"], 0), True)
        return {}, trial.settings["value"], ""

    notes = run(Notes(*trials(0.8, 0.1)), work, concurrent=1, early_stop="none")
    assert notes.statuses() == {0: "finished", 1: "finished"}


def test_a_collapsed_trial_is_stopped_and_marked_whatever_its_figure(tmp_path: Path):
    def work(trial: Trial, told: Any, stop: threading.Event) -> tuple[dict[str, float], float, str]:
        told(Epoch(1, 0.9, 0), False)
        told(Epoch(2, 0.9, 1), False)
        told(Epoch(3, 0.99, 1), False)
        if stop.wait(60):
            (tmp_path / "stopped").touch()
        raise RunError("stopped")

    notes = run(Notes(*trials(0.5)), work, collapsed_epochs=2)
    assert notes.outcomes[0] == {"status": "collapsed", "reason": "collapsed (complete) since epoch 2"}
    assert [epoch.epoch for epoch in notes.epochs[0]] == [1, 2, 3]
    assert (tmp_path / "stopped").exists()


def test_a_trial_that_ends_collapsed_has_figures_and_no_objective():
    def work(trial: Trial, told: Any, stop: threading.Event) -> tuple[dict[str, float], float, str]:
        told(Epoch(1, 300.0, 2), True)
        return {"rankme": 300.0}, 300.0, "collapsed (informational): dimensions correlate"

    notes = run(Notes(*trials(0.5)), work)
    outcome = notes.outcomes[0]
    assert (outcome["status"], outcome["objective"]) == ("collapsed", None)
    assert outcome["reason"].startswith("collapsed (informational)")


def test_a_failure_is_recorded_with_its_reason_and_the_others_go_on():
    def work(trial: Trial, told: Any, stop: threading.Event) -> tuple[dict[str, float], float, str]:
        if trial.number == 0:
            raise RunError("not finite since step 3: loss")
        if trial.number == 1:
            raise KeyError("odd")
        return {}, 0.5, ""

    notes = run(Notes(*trials(0, 0, 0)), work)
    assert notes.statuses() == {0: "failed", 1: "failed", 2: "finished"}
    assert notes.outcomes[0]["reason"] == "not finite since step 3: loss"
    assert notes.outcomes[1]["reason"] == "KeyError: 'odd'"


def test_a_trial_whose_process_died_goes_on_so_often_and_no_more(tmp_path: Path):
    def work(trial: Trial, told: Any, stop: threading.Event) -> tuple[dict[str, float], float, str]:
        marker = tmp_path / f"died-{trial.number}"
        if trial.number == 0 or not marker.exists():
            marker.touch()
            os._exit(1)
        return {}, 0.5, ""

    notes = run(Notes(*trials(0, 0)), work, max_failures=1)
    assert notes.statuses() == {0: "failed", 1: "finished"}
    assert notes.outcomes[0]["reason"]


def test_a_trial_that_goes_on_reports_what_was_known_and_no_epoch_twice():
    def work(trial: Trial, told: Any, stop: threading.Event) -> tuple[dict[str, float], float, str]:
        assert [epoch.epoch for epoch in trial.epochs] == [1, 2]
        told(Epoch(2, 0.7, 0), False)  # trained again, from the checkpoint of epoch 1 on
        told(Epoch(3, 0.8, 0), True)
        return {}, 0.8, ""

    interrupted = Trial(5, {}, epochs=[Epoch(1, 0.5, 0), Epoch(2, 0.6, 0)])
    notes = run(Notes(interrupted), work)
    assert notes.statuses() == {5: "finished"}
    assert notes.epochs[5] == [Epoch(1, 0.5, 0), Epoch(2, 0.6, 0), Epoch(3, 0.8, 0)]


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Signals reach Python as in a process of its own, whatever was done to it before."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before or signal.default_int_handler)


@pytest.mark.usefixtures("interruptible")
def test_an_interrupted_search_tells_the_book_and_ends_its_trials(tmp_path: Path):
    def work(trial: Trial, told: Any, stop: threading.Event) -> tuple[dict[str, float], float, str]:
        (tmp_path / f"running-{trial.number}").touch()
        if stop.wait(60):
            (tmp_path / f"stopped-{trial.number}").touch()
        raise RunError("stopped")

    def interrupt() -> None:
        end = time.monotonic() + DEADLINE
        while len(list(tmp_path.glob("running-*"))) < 2 and time.monotonic() < end:
            time.sleep(0.02)
        _thread.interrupt_main()

    notes = Notes(*trials(0, 0, 0))
    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        run(notes, work)
    assert notes.interrupted
    assert notes.outcomes == {}
    assert {path.name for path in tmp_path.glob("stopped-*")} == {"stopped-0", "stopped-1"}
    assert [trial.number for trial in notes.waiting] == [2]


def test_a_book_that_cannot_be_written_ends_the_search_with_the_reason():
    class Full(Notes):
        def epoch(self, number: int, epoch: Epoch) -> None:
            raise OSError("no space left on device")

    def work(trial: Trial, told: Any, stop: threading.Event) -> tuple[dict[str, float], float, str]:
        told(Epoch(1, 0.1, 0), False)
        stop.wait(60)
        raise RunError("stopped")

    with pytest.raises(RunError, match="no space left on device"):
        run(Full(*trials(0)), work)
