"""What is tried next: a function of the space, the seed and what is known of the trials before, and of nothing else.

So a search that was stopped goes on as if it had not been, from the trials' records alone.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState

from jem.config import Range, SearchConfig
from jem.search.space import Settings, Space, drawn, grid_of
from jem.search.trials import Trial

if TYPE_CHECKING:
    from optuna import Study


def planned(search: SearchConfig, space: Space) -> int:
    """How many trials a search has."""
    if search.sampler == "grid":
        points = len(grid_of(space))
        return min(points, search.trials or points)
    return search.trials or 20


def propose(space: Space, search: SearchConfig, seed: int, number: int, known: Sequence[Trial]) -> Settings:
    """The settings of trial `number`; `known` are the other trials that have begun, by number."""
    if search.sampler == "grid":
        return grid_of(space)[number]
    if search.sampler == "random" or number < search.startup:
        source = random.Random(f"{seed}:{number}")
        return {key: drawn(values, source) for key, values in space.items()}
    study = study_of(space, known, sampler=_tpe(search, seed, number))
    asked = study.ask({key: _distribution(values) for key, values in space.items()})
    return {key: _decoded(values, asked.params[key]) for key, values in space.items()}


def importances(space: Space, trials: Sequence[Trial], seed: int) -> dict[str, float]:
    """How much of the score's variance each setting explains, in [0, 1], the most important first: fANOVA.

    It goes by the trials that have a score: the objective, or what stood for it when they were stopped. Empty where
    fewer than two trials differ.
    """
    scored = [trial for trial in trials if trial.score is not None]
    if len({trial.score for trial in scored}) < 2:
        return {}
    study = _study()
    study.add_trials([_frozen(space, trial, TrialState.COMPLETE, trial.score) for trial in scored])
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=seed)
    found = optuna.importance.get_param_importances(study, evaluator=evaluator, params=list(space))
    return {key: float(value) for key, value in found.items()}


def study_of(space: Space, trials: Sequence[Trial], sampler: optuna.samplers.BaseSampler) -> Study:
    """Optuna's view of the trials.

    A trial that was stopped early counts by how far it came; a failed or a collapsed one as worse than all others.
    """
    study = _study(sampler)
    for trial in sorted(trials, key=lambda trial: trial.number):
        if trial.status == "finished":
            study.add_trial(_frozen(space, trial, TrialState.COMPLETE, trial.objective))
        elif trial.over:
            study.add_trial(_frozen(space, trial, TrialState.PRUNED))
        else:
            study.add_trial(_frozen(space, trial, TrialState.RUNNING))
    return study


def _study(sampler: optuna.samplers.BaseSampler | None = None) -> Study:
    logging.getLogger("optuna").setLevel(logging.WARNING)  # it would report each study
    return optuna.create_study(direction="maximize", sampler=sampler)


def _tpe(search: SearchConfig, seed: int, number: int) -> optuna.samplers.TPESampler:
    own = random.Random(f"{seed}:{number}").getrandbits(32)
    return optuna.samplers.TPESampler(n_startup_trials=search.startup, constant_liar=True, seed=own)


def _frozen(space: Space, trial: Trial, state: TrialState, value: float | None = None) -> FrozenTrial:
    steps = {each.epoch: each.value for each in trial.epochs if each.value is not None}
    return optuna.trial.create_trial(
        state=state,
        value=value,
        params={key: _encoded(values, trial.settings[key]) for key, values in space.items()},
        distributions={key: _distribution(values) for key, values in space.items()},
        intermediate_values=steps if trial.status == "pruned" else {},
    )


def _distribution(values: Range) -> BaseDistribution:
    """A choice is one of places in the list, since its values may be lists and sections; a decay is that of 1 - x."""
    if values.choice is not None:
        return CategoricalDistribution(tuple(range(len(values.choice))))
    low, high = values.ends
    match values.kind:
        case "int" | "logint":
            return IntDistribution(int(low), int(high), log=values.kind == "logint")
        case "decay":
            return FloatDistribution(1 - high, 1 - low, log=True)
    return FloatDistribution(low, high, log=values.kind == "loguniform")


def _encoded(values: Range, value: Any) -> Any:
    if values.choice is not None:
        return values.choice.index(value)
    low, high = values.ends
    return min(max(1 - value, 1 - high), 1 - low) if values.kind == "decay" else value


def _decoded(values: Range, value: Any) -> Any:
    if values.choice is not None:
        return values.choice[value]
    return 1 - value if values.kind == "decay" else value
