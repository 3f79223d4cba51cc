"""Pictures that a run logs: curves of the loss terms, and its test features in two dimensions.

Figures are made without pyplot, which keeps global state and may look for a display.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from jem.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from matplotlib.axes import Axes
    from numpy.typing import ArrayLike, NDArray

POINTS = 2000
"""Most points in a projection: t-SNE takes 10 s for 2,000 on one core."""
NAMED_CLASSES = 20
"""Most classes that a legend can name."""
_NEEDED_FOR_TSNE = 50


def loss_curves(history: Mapping[str, Sequence[tuple[int, float]]]) -> Figure:
    """Draw each metric over the steps, one panel for each.

    Args:
        history: (step, value) pairs by the metric's name, such as `train/loss`; names without pairs are left out.
            Values that are not finite leave a gap.

    Raises:
        InputError: no metric has a value.
    """
    drawn = {name: pairs for name, pairs in history.items() if len(pairs)}
    if not drawn:
        raise InputError("no metric to draw: the run has logged none yet")
    columns = min(3, len(drawn))
    rows = -(-len(drawn) // columns)
    figure = Figure(figsize=(4.2 * columns, 2.9 * rows), layout="constrained")
    panels: list[Axes] = figure.subplots(rows, columns, squeeze=False).ravel().tolist()
    for axes, (name, pairs) in zip(panels, drawn.items(), strict=False):
        steps, values = (np.asarray(column, dtype=float) for column in zip(*sorted(pairs), strict=True))
        values[~np.isfinite(values)] = np.nan
        axes.plot(steps, values, color="#1f5fa8", linewidth=1.4, marker="o" if len(steps) < 3 else None, markersize=4)
        axes.set_title(name, fontsize=10, loc="left")
        axes.set_xlabel("step", fontsize=9)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in panels[len(drawn) :]:
        axes.set_axis_off()
    return figure


def projection(
    features: ArrayLike, labels: ArrayLike | None = None, classes: Sequence[str] | None = None, seed: int = 0
) -> Figure:
    """Draw features in two dimensions by t-SNE, coloured by class; by PCA where there are fewer than 50.

    Args:
        features: float (N, D), N at least 3; more than 2,000 are sampled.
        labels: int (N,), -1 where there is none; drawn in grey.
        classes: names of the labels 0 ... C - 1.
        seed: of sample and t-SNE.

    Raises:
        InputError: fewer than 3 rows, or not a matrix.
    """
    x = np.asarray(features, dtype=np.float32)
    if x.ndim != 2 or len(x) < 3:
        raise InputError(f"features of shape {x.shape} cannot be projected: give (N, D) with N of 3 or more")
    y = np.full(len(x), -1) if labels is None else np.asarray(labels)
    if len(x) > POINTS:
        chosen = np.sort(np.random.default_rng(seed).choice(len(x), POINTS, replace=False))
        x, y = x[chosen], y[chosen]
    points, method = _flatten(x, seed)

    figure = Figure(figsize=(7.2, 5.4), layout="constrained")
    axes = figure.subplots()
    _scatter(axes, points, y, classes)
    axes.set_title(f"{len(x)} images, {method} of {x.shape[1]} dimensions", fontsize=10, loc="left")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_aspect("equal", adjustable="datalim")
    return figure


def _flatten(x: NDArray[np.float32], seed: int) -> tuple[NDArray[np.float32], str]:
    """Two coordinates for each row, and how they came about."""
    from sklearn.decomposition import PCA  # a second that only who draws pays
    from sklearn.manifold import TSNE

    # On the unit sphere, for kNN judges by the cosine.
    x = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    if np.allclose(x, x[0], atol=1e-6):  # collapsed, and t-SNE divides by the distances
        return np.zeros((len(x), 2), np.float32), "a single point"
    reduced = PCA(min(50, *x.shape), random_state=seed).fit_transform(x)
    if len(x) < _NEEDED_FOR_TSNE or reduced.shape[1] < 3:
        flat = np.zeros((len(x), 2), np.float32)
        flat[:, : min(2, reduced.shape[1])] = reduced[:, :2]
        return flat, "PCA"
    perplexity = min(30.0, len(x) / 4)
    return TSNE(perplexity=perplexity, init="pca", random_state=seed, n_jobs=1).fit_transform(reduced), "t-SNE"


def _scatter(axes: Axes, points: NDArray[np.float32], labels: NDArray[np.int64], classes: Sequence[str] | None) -> None:
    present = [int(label) for label in np.unique(labels)]
    named = len([label for label in present if label >= 0])
    palette = mpl.colormaps["tab10" if named <= 10 else "tab20" if named <= NAMED_CLASSES else "turbo"]
    marks = []
    for rank, label in enumerate(label for label in present if label >= 0):
        colour = palette(rank if named <= NAMED_CLASSES else rank / max(1, named - 1))
        here = points[labels == label]
        axes.scatter(here[:, 0], here[:, 1], s=9, color=colour, alpha=0.75, linewidths=0)
        name = classes[label] if classes is not None and label < len(classes) else str(label)
        marks.append(Line2D([], [], marker="o", linestyle="", color=colour, label=name, markersize=5))
    unlabelled = points[labels < 0]
    axes.scatter(unlabelled[:, 0], unlabelled[:, 1], s=9, color="0.5", alpha=0.6, linewidths=0, zorder=0)
    if 0 < named <= NAMED_CLASSES:
        axes.legend(handles=marks, fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    for spine in axes.spines.values():
        spine.set_color("0.8")
