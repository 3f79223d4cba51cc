"""What is tried next: it depends on the space, the seed and the records alone, and learns from them."""

from __future__ import annotations

import json
import math

import pytest

from jem.config import Range, SearchConfig
from jem.search.sampling import importances, planned, propose
from jem.search.space import Settings, Space
from jem.search.trials import Epoch, Trial

SPACE: Space = {
    "method.mu": Range(loguniform=(0.1, 100)),
    "method.momentum.tau": Range(decay=(0.9, 0.9999)),
    "train.epochs": Range(int=(1, 8)),
    "projector": Range(choice=[[64, 64], [128], {"name": "x"}]),
}
SAMPLERS = ["optuna", "random", "grid"]
GRID: Space = {"method.mu": Range(choice=[1, 2, 3]), "train.epochs": Range(int=(1, 4))}


def search(sampler: str = "optuna", **more: object) -> SearchConfig:
    return SearchConfig.model_validate({"sampler": sampler, **more})


def space_for(sampler: str) -> Space:
    return GRID if sampler == "grid" else SPACE


def finished(number: int, settings: Settings, objective: float) -> Trial:
    return Trial(number, settings, "finished", [Epoch(1, objective, 0)], {"knn": objective}, objective)


def run(sampler: str, count: int, known: list[Trial] | None = None, seed: int = 0) -> list[Trial]:
    """A search whose objective is better the nearer mu is to 10."""
    trials = list(known or [])
    for number in range(len(trials), count):
        settings = propose(space_for(sampler), search(sampler), seed, number, trials)
        trials.append(finished(number, settings, 1 / (1 + abs(settings["method.mu"] - 10))))
    return trials


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_search_that_goes_on_from_its_records_proposes_what_it_would_have(sampler: str):
    whole = run(sampler, 10)
    stored = [Trial.from_json(json.loads(json.dumps(trial.to_json()))) for trial in whole[:7]]
    assert [trial.settings for trial in run(sampler, 10, stored)] == [trial.settings for trial in whole]


@pytest.mark.parametrize("sampler", ["optuna", "random"])
def test_another_seed_proposes_others_and_no_two_trials_are_the_same(sampler: str):
    one = [trial.settings for trial in run(sampler, 10)]
    assert one[0] != run(sampler, 1, seed=1)[0].settings
    assert len({json.dumps(settings) for settings in one}) == 10


def test_what_is_proposed_lies_in_the_space():
    for trial in run("optuna", 25):
        assert 0.1 <= trial.settings["method.mu"] <= 100
        assert 0.9 - 1e-9 <= trial.settings["method.momentum.tau"] <= 0.9999 + 1e-9
        assert trial.settings["train.epochs"] in range(1, 9)
        assert trial.settings["projector"] in SPACE["projector"].choice


def distance(trials: list[Trial]) -> float:
    """Mean distance of mu from 10, in powers of e."""
    return sum(abs(math.log(trial.settings["method.mu"] / 10)) for trial in trials) / len(trials)


def test_optuna_learns_from_the_trials_before():
    learned = [trial for seed in range(3) for trial in run("optuna", 40, seed=seed)[20:]]
    blind = [trial for seed in range(3) for trial in run("random", 40, seed=seed)[20:]]
    assert distance(learned) < 0.7 * distance(blind)


def test_optuna_counts_stopped_collapsed_failed_and_running_trials():
    trials = run("optuna", 8)
    others = [
        Trial(8, trials[0].settings, "pruned", [Epoch(1, 0.2, 0)]),
        Trial(9, trials[1].settings, "collapsed", [Epoch(1, 0.9, 1)]),
        Trial(10, trials[2].settings, "failed", reason="not finite"),
        Trial(11, trials[3].settings, "running", [Epoch(1, 0.2, 0)]),
        Trial(12, trials[4].settings, "stopped"),
    ]
    assert propose(SPACE, search(), 0, 13, [*trials, *others]).keys() == SPACE.keys()


def test_optuna_keeps_away_from_where_trials_collapsed_however_good_their_figures():
    def large(collapsed: bool) -> float:
        """Share of large mu among what is proposed next, where trials with a large one had the best figures."""
        trials = []
        for number in range(20):
            settings = propose(SPACE, search("random"), 0, number, [])
            trials.append(finished(number, settings, settings["method.mu"]))
            if settings["method.mu"] > 5 and collapsed:
                trials[-1].status, trials[-1].objective = "collapsed", None
        proposed = [propose(SPACE, search(), seed, 20, trials)["method.mu"] for seed in range(40)]
        return sum(mu > 5 for mu in proposed) / len(proposed)

    at_random = math.log(100 / 5) / math.log(100 / 0.1)
    assert large(collapsed=False) > at_random + 0.2
    assert large(collapsed=True) < at_random


def test_a_grid_is_gone_through_once_each_and_no_more_than_asked():
    points = {(trial.settings["method.mu"], trial.settings["train.epochs"]) for trial in run("grid", 12)}
    assert len(points) == 12
    assert planned(search("grid"), GRID) == 12
    assert planned(search("grid", trials=5), GRID) == 5
    assert planned(search("grid", trials=50), GRID) == 12
    assert planned(search("random", trials=7), SPACE) == 7


def test_the_setting_that_decides_is_the_most_important():
    shares = importances(SPACE, run("random", 30), seed=0)
    assert next(iter(shares)) == "method.mu"
    assert shares["method.mu"] > 0.5
    assert sum(shares.values()) == pytest.approx(1)
    assert shares == importances(SPACE, run("random", 30), seed=0)


def test_no_importance_is_made_up_where_trials_do_not_differ():
    trials = run("random", 3)
    assert importances(SPACE, trials[:1], 0) == {}
    assert importances(SPACE, [finished(n, each.settings, 0.5) for n, each in enumerate(trials)], 0) == {}
    assert importances(SPACE, [Trial(0, trials[0].settings, "failed")], 0) == {}
