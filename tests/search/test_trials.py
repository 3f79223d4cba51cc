"""What is known of a trial, by what it is judged, and the guard against collapse."""

from __future__ import annotations

import json

import pytest

from jem.config import SearchConfig
from jem.errors import InputError
from jem.search.trials import ONLINE, Epoch, Trial, collapsed, objective_of, ranked


def search(**given: object) -> SearchConfig:
    return SearchConfig.model_validate(given)


def objective(labelled: bool = True, online: bool = True, probe: bool = True, **given: object) -> str:
    return objective_of(search(**given), labelled=labelled, online=online, probe=probe)


def test_the_objective_is_accuracy_where_there_are_labels_and_rank_where_there_are_none():
    assert objective() == "knn"
    assert objective(labelled=False) == "rankme"
    assert objective(objective="linear") == "linear"
    assert objective(objective="rankme") == "rankme"
    assert objective(labelled=False, online=False) == "rankme", "it needs no kNN"
    assert not any("loss" in metric for metric in ONLINE.values())


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"labelled": False, "objective": "knn"}, "needs labels"),
        ({"labelled": False, "objective": "linear"}, "needs labels"),
        ({"probe": False, "objective": "linear"}, r"needs evaluation\.probe"),
        ({"online": False}, r"asha with objective knn needs evaluation\.online"),
    ],
)
def test_an_objective_that_cannot_be_measured_is_refused(given: dict[str, object], words: str):
    with pytest.raises(InputError, match=words):
        objective(**given)


def test_without_early_stopping_no_figure_is_needed_during_training():
    assert objective(online=False, early_stop="none") == "knn"


@pytest.mark.parametrize(
    ("kinds", "patience", "stops"),
    [
        ([1, 1], 2, True),
        ([1, 2], 2, True),
        ([0, 1], 2, False),
        ([1, 0, 1], 2, False),
        ([1], 2, False),
        ([1], 1, True),
        ([], 1, False),
        ([0, 0, 2, 2, 2], 3, True),
    ],
)
def test_a_trial_is_collapsed_after_so_many_epochs_in_a_row(kinds: list[int], patience: int, stops: bool):
    # a collapsed embedding may have any figure, the highest rank too
    epochs = [Epoch(number, 1000.0, kind) for number, kind in enumerate(kinds, start=1)]
    assert collapsed(epochs, patience) is stops


def test_a_record_is_json_and_comes_back_whole():
    trial = Trial(3, {"a.b": [1, {"c": None}], "d": 0.1}, "finished", [Epoch(1, None, 0), Epoch(2, 0.5, 2)])
    trial.figures, trial.objective, trial.run_id = {"knn": 0.5}, 0.5, "abc"
    stored = json.loads(json.dumps(trial.to_json() | {"data": "of another reader"}))
    assert Trial.from_json(stored) == trial


def test_an_epoch_that_is_trained_again_takes_the_place_of_what_was_known():
    trial = Trial(0, {})
    for epoch in (Epoch(1, 0.1, 0), Epoch(2, 0.2, 0), Epoch(3, 0.3, 0), Epoch(2, 0.25, 0)):
        trial.note(epoch)
    assert trial.epochs == [Epoch(1, 0.1, 0), Epoch(2, 0.25, 0)]
    assert trial.last == 0.25


def test_only_finished_trials_are_ranked_the_best_first():
    trials = [
        Trial(0, {}, "finished", objective=0.3),
        Trial(1, {}, "pruned", [Epoch(1, 0.9, 0)]),
        Trial(2, {}, "finished", objective=0.5),
        Trial(3, {}, "collapsed", [Epoch(1, 0.99, 1)], {"rankme": 100}),
        Trial(4, {}, "finished", objective=0.5),
        Trial(5, {}, "running", [Epoch(1, 0.95, 0)]),
        Trial(6, {}, "failed"),
    ]
    assert [trial.number for trial in ranked(trials)] == [2, 4, 0]
    assert [trial.number for trial in trials if not trial.over] == [5]


def test_the_score_of_a_stopped_trial_is_its_last_figure():
    assert Trial(0, {}, "pruned", [Epoch(1, 0.2, 0), Epoch(2, None, 0)]).score == 0.2
    assert Trial(0, {}, "finished", [Epoch(1, 0.2, 0)], objective=0.4).score == 0.4
    assert Trial(0, {}, "failed").score is None
