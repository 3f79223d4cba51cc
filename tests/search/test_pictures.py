"""What the pictures of a search show."""

from __future__ import annotations

import io

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from jem.config import Range
from jem.errors import InputError
from jem.search.pictures import importance_bars, parallel_coordinates
from jem.search.space import Space
from jem.search.trials import Epoch, Trial

SPACE: Space = {
    "method.mu": Range(loguniform=(1, 100)),
    "method.momentum.tau": Range(decay=(0.9, 0.999)),
    "backbone.stem": Range(choice=["imagenet", "cifar", "stride2"]),
}
AT_BOTTOM = {"method.mu": 1.0, "method.momentum.tau": 0.9, "backbone.stem": "imagenet"}
IN_MIDDLE = {"method.mu": 10.0, "method.momentum.tau": 0.99, "backbone.stem": "cifar"}
AT_TOP = {"method.mu": 100.0, "method.momentum.tau": 0.999, "backbone.stem": "stride2"}


def curves(figure: Figure) -> list[np.ndarray]:
    """Heights of each trial's line at the axes."""
    long = [line for line in figure.axes[0].lines if len(line.get_xdata()) > 2]
    return [np.asarray(line.get_ydata())[:: (len(line.get_xdata()) - 1) // len(SPACE)] for line in long]


def drawn(figure: Figure) -> float:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=50)
    return float(np.asarray(Image.open(buffer).convert("RGB")).std())


def test_each_trial_is_a_line_at_its_values_on_scales_of_their_own():
    trials = [
        Trial(0, AT_BOTTOM, "finished", objective=0.1),
        Trial(1, IN_MIDDLE, "finished", objective=0.2),
        Trial(2, AT_TOP, "finished", objective=0.3),
    ]
    figure = parallel_coordinates(SPACE, trials, "knn")
    np.testing.assert_allclose(sorted(curves(figure), key=lambda y: y[0]), [[0] * 4, [0.5] * 4, [1] * 4], atol=1e-9)
    words = {text.get_text() for text in figure.axes[0].texts}
    assert {*SPACE, "kNN", "10.0%", "30.0%", "0.999", "cifar", "100"} <= words
    assert drawn(figure) > 0


def test_stopped_and_collapsed_trials_look_different_and_those_without_a_figure_are_left_out():
    trials = [
        Trial(0, AT_BOTTOM, "finished", objective=0.4),
        Trial(1, IN_MIDDLE, "pruned", [Epoch(1, 0.2, 0)]),
        Trial(2, AT_TOP, "collapsed", [Epoch(1, 0.1, 1)]),
        Trial(3, AT_TOP, "failed"),
        Trial(4, AT_TOP, "running"),
    ]
    figure = parallel_coordinates(SPACE, trials, "knn")
    long = [line for line in figure.axes[0].lines if len(line.get_xdata()) > 2]
    assert {line.get_linestyle() for line in long} == {"-", ":", "--"}
    assert len(long) == 3
    assert {text.get_text() for text in figure.legends[0].get_texts()} == {"finished", "stopped early", "collapsed"}


def test_a_single_trial_can_be_drawn_and_none_cannot():
    assert drawn(parallel_coordinates(SPACE, [Trial(0, AT_TOP, "finished", objective=0.4)], "rankme")) > 0
    with pytest.raises(InputError, match="no trial to draw"):
        parallel_coordinates(SPACE, [Trial(0, AT_TOP, "failed")], "knn")


def test_importances_are_bars_the_longest_on_top():
    figure = importance_bars({"a": 0.2, "b": 0.7, "c": 0.1}, "knn")
    bars = figure.axes[0].patches
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["c", "a", "b"]
    assert [bar.get_width() for bar in bars] == [0.1, 0.2, 0.7]
    with pytest.raises(InputError, match="no importance"):
        importance_bars({}, "knn")
