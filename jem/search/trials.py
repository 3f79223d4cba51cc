"""What is known of each trial: its settings, how its epochs went, what it came to. JSON, so that a search can go on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from jem.config import SearchConfig
from jem.errors import InputError
from jem.search.space import Settings

Status = Literal["running", "finished", "pruned", "collapsed", "failed", "stopped"]
"""pruned: stopped early, as others were better at its age; stopped: with the search, which can go on with it."""
Objective = Literal["knn", "linear", "rankme"]
ONLINE: dict[Objective, str] = {
    "knn": "online/knn",
    "linear": "online/knn",
    "rankme": "health/representation_rankme",
}
"""What stands for the objective at an epoch's end: the probe would take too long, and follows the kNN."""


@dataclass(frozen=True)
class Epoch:
    """What is known at the end of one epoch."""

    epoch: int
    """From 1."""
    value: float | None
    """What stands for the objective; None where it was not measured."""
    collapse: int
    """0, or the type: 1 complete, 2 informational."""


@dataclass
class Trial:
    """One pretraining of a search."""

    number: int
    """From 0."""
    settings: Settings
    status: Status = "running"
    epochs: list[Epoch] = field(default_factory=list)
    figures: dict[str, float] = field(default_factory=dict)
    """Of the finished encoder: what `jem.evaluate.judge.judge` found."""
    objective: float | None = None
    """Of a finished trial: the figure that the search goes by."""
    reason: str = ""
    """Why it did not finish."""
    run_id: str = ""
    """In MLflow."""

    @property
    def name(self) -> str:
        """Of its folder and its run."""
        return f"trial-{self.number:03d}"

    @property
    def over(self) -> bool:
        """Whether nothing is left to do."""
        return self.status not in {"running", "stopped"}

    @property
    def last(self) -> float | None:
        """The latest epoch's value."""
        return next((each.value for each in reversed(self.epochs) if each.value is not None), None)

    @property
    def score(self) -> float | None:
        """The objective, or what stood for it when the trial was stopped."""
        return self.objective if self.objective is not None else self.last

    def note(self, epoch: Epoch) -> None:
        """Add an epoch; one that was trained again replaces what is known of it."""
        self.epochs = [*(each for each in self.epochs if each.epoch < epoch.epoch), epoch]

    def to_json(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Trial:
        """What `to_json` made; other keys are left out."""
        known = {each.name for each in fields(cls)}
        trial = cls(**{key: value for key, value in content.items() if key in known})
        trial.epochs = [Epoch(**each) for each in content.get("epochs", [])]
        return trial


def objective_of(search: SearchConfig, *, labelled: bool, online: bool, probe: bool) -> Objective:
    """By what the trials are judged.

    Args:
        search: what was asked for.
        labelled: whether the images that are judged have labels.
        online: whether a kNN accuracy is measured during training.
        probe: whether there are settings of a linear probe.

    Raises:
        InputError: it cannot be measured here.
    """
    wanted: Objective = ("knn" if labelled else "rankme") if search.objective == "auto" else search.objective
    if wanted == "rankme":
        return wanted
    if not labelled:
        raise InputError(f"search.objective {wanted} needs labels, and the data has none: take rankme")
    if wanted == "linear" and not probe:
        raise InputError("search.objective linear needs evaluation.probe, which is null: leave that out")
    if search.early_stop == "asha" and not online:
        raise InputError(
            f"search.early_stop asha with objective {wanted} needs evaluation.online, which is null: leave that out, "
            "or set search.early_stop to none"
        )
    return wanted


def collapsed(epochs: Sequence[Epoch], patience: int) -> bool:
    """Whether the last `patience` epochs all ended collapsed: then a trial is not worth going on with.

    It guards the objective that needs no labels, too: the noise in a collapsed embedding may have a high rank.
    """
    return len(epochs) >= patience and all(each.collapse for each in epochs[-patience:])


def ranked(trials: Sequence[Trial]) -> list[Trial]:
    """The finished ones, the best first; of equals the earlier."""
    done = [trial for trial in trials if trial.status == "finished" and trial.objective is not None]
    return sorted(done, key=lambda trial: (-(trial.objective or 0.0), trial.number))
