"""Search spaces: the ready ones, what is refused before anything starts, and how settings are laid over a run."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from jem.config import METHODS, PretrainConfig, Range, SearchConfig, TuneConfig
from jem.errors import InputError
from jem.search.space import READY, drawn, grid_of, space_of, varied
from pipelines.settings import load_config


def base(recipe: str = "vicreg-cifar10-cpu", *argv: str) -> PretrainConfig:
    return load_config(PretrainConfig, ["--recipe", recipe, "--data", "somewhere", *argv])


def refusal(space: dict[str, Any], recipe: str = "vicreg-cifar10-cpu", **search: Any) -> str:
    with pytest.raises(InputError) as caught:
        space_of(SearchConfig(space=space, **search), base(recipe))
    return str(caught.value)


# --- ranges ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "one kind of uniform, loguniform, decay, int, logint, choice, not none"),
        ({"uniform": [0, 1], "int": [0, 1]}, "not uniform and int"),
        ({"uniform": [1, 0]}, "from low to high, not from 1 to 0"),
        ({"uniform": [1, 1]}, "from low to high"),
        ({"loguniform": [0, 1]}, "begins above 0"),
        ({"logint": [0, 4]}, "begins above 0"),
        ({"decay": [0.9, 1]}, "between 0 and 1"),
        ({"int": [0.5, 2]}, "valid integer"),
        ({"choice": []}, "at least 1"),
        ({"uniform": [0, float("inf")]}, "finite"),
        ({"normal": [0, 1]}, "Extra inputs"),
    ],
)
def test_a_range_that_makes_no_sense_is_refused(given: dict[str, Any], words: str):
    with pytest.raises(ValidationError, match=words):
        Range.model_validate(given)


kinds = st.sampled_from(["uniform", "loguniform", "decay", "int", "logint"])


@given(kinds, st.integers(1, 50), st.integers(1, 50), st.integers(0, 10**6))
def test_what_is_drawn_lies_in_the_range(kind: str, low: int, more: int, seed: int):
    ends = (low / 200, (low + more) / 200) if kind == "decay" else (low, low + more)
    values = Range.model_validate({kind: ends})
    value = drawn(values, Random(seed))
    assert ends[0] <= value <= ends[1] or value == pytest.approx(ends[0]) or value == pytest.approx(ends[1])
    assert isinstance(value, int if kind in {"int", "logint"} else float)


def test_a_logarithmic_range_has_as_much_in_each_decade_and_a_decay_towards_one():
    source = Random(0)
    values = [drawn(Range(loguniform=(0.01, 100)), source) for _ in range(4000)]
    for low in (0.01, 0.1, 1, 10):
        assert sum(low <= value < 10 * low for value in values) / 4000 == pytest.approx(0.25, abs=0.03)
    decays = [drawn(Range(decay=(0.9, 0.999)), source) for _ in range(4000)]
    assert sum(value < 0.99 for value in decays) / 4000 == pytest.approx(0.5, abs=0.03)


# --- ready spaces ---------------------------------------------------------------------------------------------------


def recipes_of(method: str) -> str:
    return f"{method}-cifar10-cpu"


@pytest.mark.parametrize(
    ("ready", "methods"),
    [
        ("weights", {"vicreg", "barlow"}),
        ("temperature", {"simclr", "moco", "swav", "dino", "pirl"}),
        ("ema", {"byol", "moco", "dino", "data2vec"}),
    ],
)
def test_ready_spaces_are_there_and_valid_for_their_methods(ready: str, methods: set[str]):
    assert methods <= READY[ready].keys() <= METHODS.keys()
    for method in READY[ready]:
        space = space_of(SearchConfig(over=(ready,)), base(recipes_of(method)))
        assert space, method
        for values in space.values():
            assert values.kind in {"loguniform", "decay"}


def test_the_weights_of_vicreg_hold_the_papers_and_those_of_barlow_too():
    for method, paper in (("vicreg", {"lam": 25, "mu": 25, "nu": 1}), ("barlow", {"lam": 5e-3})):
        space = space_of(SearchConfig(over=("weights",)), base(recipes_of(method)))
        assert space.keys() == {f"method.{name}" for name in paper}
        for name, value in paper.items():
            low, high = space[f"method.{name}"].ends
            assert low < value < high


@pytest.mark.parametrize("optimizer", ["lars", "sgd", "adam", "adamw"])
def test_rates_are_those_of_the_optimizer(optimizer: str):
    config = PretrainConfig.model_validate({"data": "x", "optimizer": {"name": optimizer}})
    space = space_of(SearchConfig(over=("rates",)), config)
    low, high = space["optimizer.lr"].ends
    assert low < config.optimizer.lr < high
    assert space.keys() == {"optimizer.lr", "optimizer.weight_decay"}


def test_own_ranges_take_the_place_of_ready_ones():
    search = SearchConfig(over=("weights", "rates"), space={"method.mu": Range(uniform=(1, 2))})
    space = space_of(search, base())
    assert space["method.mu"] == Range(uniform=(1, 2))
    assert len(space) == 5


def test_a_ready_space_of_another_method_is_refused():
    with pytest.raises(InputError, match=r"search\.over weights is not for byol: it has ranges for vicreg, barlow"):
        space_of(SearchConfig(over=("weights",)), base("byol-cifar10-cpu"))


def test_a_decay_without_a_momentum_network_is_refused():
    with pytest.raises(InputError, match=r"method\.momentum\.tau is no setting of this run"):
        space_of(SearchConfig(over=("ema",)), base("memory-bank-cifar10-cpu"))


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "values", "words"),
    [
        (
            "method.lamda",
            {"uniform": [0, 1]},
            "no setting of this run, whose method is vicreg: did you mean method.lam?",
        ),
        ("method.temperature", {"uniform": [0, 1]}, "no setting of this run, whose method is vicreg"),
        ("augment.views.1.size", {"choice": [32]}, "no setting of this run"),
        ("method.lam", {"uniform": [-1, 4]}, "method.lam -1.0: input should be greater than or equal to 0"),
        ("schedule.final", {"uniform": [0.5, 2]}, "schedule.final 2.0: input should be less than or equal to 1"),
        ("train.epochs", {"uniform": [1, 4]}, "valid integer"),
        ("train.precision", {"choice": ["bf16", "fp8"]}, "train.precision 'fp8'"),
        ("train.accumulate", {"choice": [1, 3]}, "train.batch_size 256 does not divide"),
        ("augment.views.0.scale", {"choice": [[0.5, 0.1]]}, "from low to high"),
        ("cluster.workers", {"int": [1, 2]}, "cluster is the same in all trials of a search"),
        ("evaluation.knn.k", {"int": [1, 2]}, "evaluation is the same in all trials"),
        ("data", {"choice": ["x"]}, "data is the same in all trials"),
    ],
)
def test_a_range_that_the_run_cannot_take_is_refused_with_its_key(key: str, values: dict[str, Any], words: str):
    said = refusal({key: values})
    assert said.startswith(f"search.space.{key}")
    assert words in said
    assert "\n" not in said


def test_each_wrong_range_has_its_line():
    said = refusal({"method.mu": {"uniform": [-2, -1]}, "method.um": {"uniform": [0, 1]}})
    assert [line.split()[0] for line in said.splitlines()] == ["search.space.method.mu", "search.space.method.um"]


def test_values_that_do_not_go_together_are_refused():
    # each is fine for itself: 256 / 2 parts, and a batch of 2 on 2 workers
    said = refusal({"train.accumulate": {"choice": [1, 2]}, "train.batch_size": {"choice": [2, 256]}})
    assert said.startswith("search.space: train.accumulate 2, train.batch_size 2 cannot go together")


def test_a_search_for_nothing_is_refused():
    with pytest.raises(ValidationError, match="nothing to search for"):
        TuneConfig(data="x")


def test_the_command_line_gives_ready_spaces_and_ranges():
    argv = ["--recipe", "vicreg-cifar10-cpu", "--data", "x", "--search.over", "weights", "--search.over", "rates"]
    search = load_config(TuneConfig, [*argv, "--search.space", '{"method.mu": {"uniform": [1, 2]}}']).search
    assert search.over == ("weights", "rates")
    assert search.space == {"method.mu": Range(uniform=(1, 2))}
    assert load_config(TuneConfig, argv[:-2]).search.over == ("weights",)
    with pytest.raises(InputError, match=r"search\.over"):
        load_config(TuneConfig, [*argv, "--search.over", "weigths"])
    with pytest.raises(InputError, match=r"unknown setting --search\.trails: did you mean --search\.trials"):
        load_config(TuneConfig, [*argv, "--search.trails", "3"])


def test_a_file_with_a_search_serves_the_pretraining_too(tmp_path):
    file = tmp_path / "my.yaml"
    file.write_text("data: x\nmethod: {mu: 3}\nsearch: {space: {method.mu: {uniform: [1, 2]}}}\n")
    assert load_config(TuneConfig, ["--config", str(file)]).search.space["method.mu"].kind == "uniform"
    assert load_config(PretrainConfig, ["--config", str(file)]).method.mu == 3


# --- settings -------------------------------------------------------------------------------------------------------


def test_settings_are_laid_over_the_run_at_every_depth():
    given = {"method.mu": 3.5, "augment.views.0.jitter.hue": 0.2, "optimizer": {"name": "sgd", "lr": 0.1}}
    config = varied(base(), given)
    assert config.method.mu == 3.5
    assert config.augment.views[0].jitter.hue == 0.2
    assert (config.optimizer.name, config.optimizer.lr, config.optimizer.momentum) == ("sgd", 0.1, 0.9)
    assert config.method.lam == base().method.lam, "the rest stays"


def test_a_grid_has_every_combination_once():
    space = {"a": Range(choice=[1, "x"]), "b": Range(int=(3, 5))}
    grid = grid_of(space)
    assert len(grid) == 6
    assert {(point["a"], point["b"]) for point in grid} == {(a, b) for a in (1, "x") for b in (3, 4, 5)}
    with pytest.raises(InputError, match=r"search\.space\.c: a grid needs its values one by one"):
        grid_of({"c": Range(uniform=(0, 1))})
    assert "needs its values one by one" in refusal({"method.mu": {"uniform": [0, 1]}}, sampler="grid")
