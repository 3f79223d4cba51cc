"""What a hyperparameter search goes through, and by what it judges."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt, model_validator

from jem.config.jobs import PretrainConfig
from jem.config.section import Section

Ends = tuple[float, float]
IntEnds = tuple[int, int]


class Range(Section):
    """The values that a setting may take; exactly one kind is given."""

    uniform: Ends | None = Field(None, description="[low, high]")
    loguniform: Ends | None = Field(None, description="[low, high], evenly on a logarithmic scale")
    decay: Ends | None = Field(None, description="[low, high] below 1, where 1 - x is loguniform: for EMA decays")
    int: IntEnds | None = Field(None, description="[low, high], whole numbers, both included")
    logint: IntEnds | None = Field(None, description="the same, evenly on a logarithmic scale")
    choice: Annotated[list[Any], Field(min_length=1)] | None = Field(None, description="any of these values")

    @property
    def kind(self) -> str:
        """Which one is given."""
        return next(name for name in type(self).model_fields if getattr(self, name) is not None)

    @property
    def ends(self) -> tuple[float, float]:
        """Lowest and highest value, of all kinds but a choice."""
        low, high = getattr(self, self.kind)
        return low, high

    @model_validator(mode="after")
    def _whole(self) -> Range:
        given = [name for name in type(self).model_fields if getattr(self, name) is not None]
        if len(given) != 1:
            kinds = ", ".join(type(self).model_fields)
            raise ValueError(f"a range has one kind of {kinds}, not {' and '.join(given) or 'none'}")
        if self.kind == "choice":
            return self
        low, high = self.ends
        if low >= high:
            raise ValueError(f"{self.kind} goes from low to high, not from {low:g} to {high:g}")
        if self.kind in {"loguniform", "logint"} and low <= 0:
            raise ValueError(f"{self.kind} begins above 0, not at {low:g}: raise it, or take another kind")
        if self.kind == "decay" and not (math.isfinite(low) and low >= 0 and high < 1):
            raise ValueError(f"decay lies between 0 and 1, 1 left out, and not from {low:g} to {high:g}")
        return self


class SearchConfig(Section):
    """A hyperparameter search: through what, how, and by what it judges."""

    over: tuple[Literal["weights", "temperature", "ema", "rates"], ...] = Field(
        (),
        description="ready spaces of the chosen method: weights of its terms (VICReg, Barlow Twins), temperature, ema "
        "(tau), rates (learning rate and weight decay)",
    )
    space: dict[str, Range] = Field(
        {},
        description="ranges by the dotted name of a setting, beside the ready ones or in their place, such as "
        '{"method.mu": {"loguniform": [1, 100]}}; kinds: uniform, loguniform, decay, int, logint, choice',
    )
    trials: PositiveInt | None = Field(None, description="how many; default: 20, or all points of a grid")
    concurrent: PositiveInt | None = Field(
        None, description="trials at a time, each on cluster.workers workers; default: what the cluster holds"
    )
    sampler: Literal["optuna", "random", "grid"] = Field(
        "optuna", description="optuna: TPE, which learns from the trials before; grid: every combination"
    )
    startup: PositiveInt = Field(6, description="trials at random before optuna's sampler learns from them")
    objective: Literal["auto", "knn", "linear", "rankme"] = Field(
        "auto",
        description="knn, linear: accuracy on the test set, or on held-out training images; rankme: effective rank of "
        "the features, which needs no labels; auto: knn where there are labels",
    )
    early_stop: Literal["asha", "none"] = Field(
        "asha", description="asha: stop a trial whose figure at an epoch's end is behind the others' at that epoch"
    )
    grace: PositiveInt = Field(1, description="epochs that asha leaves every trial")
    reduction: float = Field(3.0, gt=1, description="asha goes on with one trial in so many at each of its rungs")
    collapsed_epochs: PositiveInt = Field(
        2, description="epochs in a row that end collapsed, after which a trial is stopped and marked"
    )


class TuneConfig(PretrainConfig):
    """Search for the best settings: many short pretrainings, judged by accuracy or by rank, not by the loss."""

    name: str | None = Field(
        None, description="name of the search, unique in STORAGE; default: made from method and time"
    )
    resume: str | None = Field(None, description="go on with the search of this name")
    search: SearchConfig = SearchConfig()

    @model_validator(mode="after")
    def _searchable(self) -> TuneConfig:
        if self.profile:
            raise ValueError("profile is for a single run: leave it out of a search")
        if self.resume is None and not self.search.over and not self.search.space:
            raise ValueError(
                "nothing to search for: give a ready space, such as --search.over rates, or ranges in search.space"
            )
        return self

    def base(self) -> PretrainConfig:
        """The pretraining that every trial is a variation of."""
        own = self.model_dump(include=set(PretrainConfig.model_fields)) | {"name": None, "resume": None}
        return PretrainConfig.model_validate(own)
