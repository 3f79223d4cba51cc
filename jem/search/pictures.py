"""Pictures of a search: every trial as a line across its settings, and how much each setting mattered."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from jem.config import Range
from jem.errors import InputError
from jem.search.space import Space
from jem.search.trials import Objective, Trial

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TITLES: dict[Objective, str] = {"knn": "kNN", "linear": "linear probe", "rankme": "RankMe"}
TICKS = 5
BEND = 24
"""Points of a line between two axes, which is curved so that lines that cross there can be told apart."""
STYLES: dict[str, tuple[Any, float, float]] = {
    "finished": ("-", 1.8, 0.95),
    "pruned": (":", 1.2, 0.8),
    "collapsed": ("--", 1.2, 0.9),
}
"""Line style, width and opacity."""
BLUE, COLLAPSED = "#1f5fa8", "#c0392b"


def parallel_coordinates(space: Space, trials: Sequence[Trial], objective: Objective) -> Figure:
    """Draw each trial that has a score as a line across one axis for each setting, and one for the score.

    The colour is the score; a trial stopped early is dotted, at what it had then, and a collapsed one dashed, in red.

    Raises:
        InputError: no trial has a score.
    """
    scored = [trial for trial in trials if trial.score is not None and trial.status in STYLES]
    if not scored:
        raise InputError("no trial to draw: none has come to a figure yet")
    scores = [trial.score or 0.0 for trial in scored]
    low, high = min(scores), max(scores)
    if low == high:
        low, high = low - 0.5, high + 0.5
    colours = mpl.colormaps["viridis"]

    figure = Figure(figsize=(max(6.0, 2.1 * (len(space) + 1) + 1.2), 4.4), layout="constrained")
    axes = figure.subplots()
    heights = np.array(
        [
            [*(_height(values, trial.settings[key]) for key, values in space.items()), (score - low) / (high - low)]
            for trial, score in zip(scored, scores, strict=True)
        ]
    )
    for trial, score, row in sorted(zip(scored, scores, heights, strict=True), key=lambda each: each[1]):
        style, width, alpha = STYLES[trial.status]
        colour = COLLAPSED if trial.status == "collapsed" else colours((score - low) / (high - low))
        axes.plot(*_bent(row), color=colour, linestyle=style, linewidth=width, alpha=alpha)
    for position, (key, values) in enumerate(space.items()):
        _axis(axes, position, key, [(at, _number(value)) for at, value in _ticks(values)])
    unit = [(at, _score(low + at * (high - low), objective)) for at in np.linspace(0, 1, TICKS)]
    _axis(axes, len(space), TITLES[objective], unit)
    axes.set_xlim(-0.25, len(space) + 0.45)
    axes.set_ylim(-0.04, 1.14)
    axes.set_axis_off()
    present = [status for status in STYLES if any(trial.status == status for trial in scored)]
    words = {"finished": "finished", "pruned": "stopped early", "collapsed": "collapsed"}
    marks = [
        Line2D([], [], color=COLLAPSED if s == "collapsed" else "0.3", linestyle=STYLES[s][0], label=words[s])
        for s in present
    ]
    figure.legend(handles=marks, fontsize=8, frameon=False, loc="outside lower center", ncols=len(marks))
    return figure


def importance_bars(importances: Mapping[str, float], objective: Objective) -> Figure:
    """Draw how much of the score's variance each setting explains, the most important on top.

    Raises:
        InputError: there is none to draw.
    """
    if not importances:
        raise InputError("no importance to draw: it takes two trials that differ")
    names = sorted(importances, key=lambda name: importances[name])
    figure = Figure(figsize=(6.0, 0.45 * len(names) + 1.4), layout="constrained")
    axes = figure.subplots()
    bars = axes.barh(names, [importances[name] for name in names], color=BLUE, height=0.6)
    axes.bar_label(bars, fmt="%.2f", padding=3, fontsize=9)
    axes.set_xlim(0, 1.08)
    axes.set_xlabel(f"share of the variance of {TITLES[objective]} (fANOVA)", fontsize=9)
    axes.tick_params(labelsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _height(values: Range, value: Any) -> float:
    """Where a value is on its axis, from 0 to 1."""
    if values.choice is not None:
        return values.choice.index(value) / max(1, len(values.choice) - 1)
    low, high = values.ends
    match values.kind:
        case "loguniform" | "logint":
            return math.log(value / low) / math.log(high / low)
        case "decay":  # the distance to 1 counts, and higher is up
            return math.log((1 - low) / (1 - value)) / math.log((1 - low) / (1 - high))
    return (float(value) - low) / (high - low)


def _ticks(values: Range) -> list[tuple[float, Any]]:
    if values.choice is not None:
        return [(_height(values, value), value) for value in values.choice]
    low, high = values.ends
    places = np.linspace(0, 1, TICKS).tolist()
    match values.kind:
        case "loguniform" | "logint":
            return [(at, low * (high / low) ** at) for at in places]
        case "decay":
            return [(at, 1 - (1 - low) * ((1 - high) / (1 - low)) ** at) for at in places]
    return [(at, low + at * (high - low)) for at in places]


def _number(value: Any) -> str:
    if isinstance(value, float):
        digits = max(3, 1 - math.floor(math.log10(1 - value))) if 0.9 < value < 1 else 3
        return f"{value:.{digits}g}"
    return value if isinstance(value, str) else json.dumps(value)[:24]


def _score(value: float, objective: Objective) -> str:
    return f"{value:.0f}" if objective == "rankme" else f"{value:.1%}"


def _axis(axes: Axes, position: int, title: str, ticks: Sequence[tuple[float, str]]) -> None:
    axes.axvline(position, 0.04 / 1.18, 1.04 / 1.18, color="0.6", linewidth=0.8, zorder=0)
    axes.text(position, 1.07, title, ha="center", fontsize=10)
    for at, label in ticks:
        axes.plot([position - 0.02, position], [at, at], color="0.6", linewidth=0.8, zorder=0)
        label_box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.6}
        axes.text(
            position - 0.04, at, label, ha="right", va="center", fontsize=8, color="0.25", zorder=3, bbox=label_box
        )


def _bent(heights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A curve through (0, heights[0]), (1, heights[1]), ..., level at each."""
    at = np.linspace(0, len(heights) - 1, BEND * (len(heights) - 1) + 1)
    left = np.minimum(at.astype(int), len(heights) - 2)
    share = (1 - np.cos(np.pi * (at - left))) / 2
    return at, heights[left] * (1 - share) + heights[left + 1] * share
