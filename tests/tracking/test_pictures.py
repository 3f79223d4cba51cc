"""What the pictures show."""

from __future__ import annotations

import io
import math
import sys

import numpy as np
import pytest
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from jem.errors import InputError
from jem.tracking import pictures
from jem.tracking.pictures import loss_curves, projection


def drawn(figure: Figure) -> NDArray[np.uint8]:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=50)
    return np.asarray(Image.open(buffer).convert("RGB"))


def points(figure: Figure) -> NDArray[np.float64]:
    return np.concatenate([np.asarray(marks.get_offsets()) for marks in figure.axes[0].collections])


def legend(figure: Figure) -> list[str]:
    box = figure.axes[0].get_legend()
    return [] if box is None else [text.get_text() for text in box.get_texts()]


def test_each_metric_has_a_panel_with_its_own_points_in_order() -> None:
    history = {"train/loss": [(20, 1.0), (0, 3.0), (10, 2.0)], "train/variance": [(5, 0.5)], "train/never": []}
    figure = loss_curves(history)
    titled = {axes.get_title(loc="left"): axes for axes in figure.axes if axes.get_title(loc="left")}
    assert set(titled) == {"train/loss", "train/variance"}
    assert titled["train/loss"].lines[0].get_xdata().tolist() == [0, 10, 20]
    assert titled["train/loss"].lines[0].get_ydata().tolist() == [3.0, 2.0, 1.0]
    assert drawn(figure).std() > 0


def test_values_that_are_not_finite_leave_a_gap() -> None:
    figure = loss_curves({"loss": [(0, 1.0), (1, math.inf), (2, math.nan), (3, 2.0)]})
    assert np.isfinite(figure.axes[0].lines[0].get_ydata()).tolist() == [True, False, False, True]
    drawn(figure)


def test_nothing_to_draw_is_refused() -> None:
    with pytest.raises(InputError, match="no metric"):
        loss_curves({"loss": []})


def test_projection_keeps_classes_apart_and_names_them() -> None:
    labels = np.repeat([0, 2], 60)
    x = np.random.default_rng(0).normal(size=(120, 16)) + 8 * (labels[:, None] == 2)
    figure = projection(x, labels, ("cat", "dog", "emu"))
    first, second = (np.asarray(marks.get_offsets()) for marks in figure.axes[0].collections[:2])
    assert len(first) == len(second) == 60
    gap = np.linalg.norm(first.mean(0) - second.mean(0))
    assert gap > 2 * max(first.std(), second.std())
    assert legend(figure) == ["cat", "emu"]
    assert drawn(figure).std() > 0


def test_projection_is_the_same_each_time() -> None:
    x = np.random.default_rng(1).normal(size=(80, 6))
    np.testing.assert_array_equal(points(projection(x)), points(projection(x)))


def test_many_images_are_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "POINTS", 55)
    assert len(points(projection(np.random.default_rng(0).normal(size=(300, 4)), np.arange(300) % 3))) == 55


@pytest.mark.parametrize("shape", [(3, 1), (3, 2), (3, 500), (10, 2), (60, 2), (60, 1)])
def test_small_sets_are_drawn_too(shape: tuple[int, int]) -> None:
    figure = projection(np.random.default_rng(0).normal(size=shape))
    assert points(figure).shape == (shape[0], 2)
    assert np.isfinite(points(figure)).all()
    assert legend(figure) == []


def test_a_collapsed_encoder_is_drawn_as_one_point() -> None:
    figure = projection(np.ones((100, 8)), np.arange(100) % 10)
    assert np.ptp(points(figure)) == 0
    assert "a single point" in figure.axes[0].get_title(loc="left")


def test_what_cannot_be_projected_is_refused() -> None:
    with pytest.raises(InputError, match="cannot be projected"):
        projection(np.ones((2, 8)))


def test_no_window_system_is_asked_for() -> None:
    loss_curves({"loss": [(0, 1.0)]})
    assert "matplotlib.pyplot" not in sys.modules or sys.modules["matplotlib.pyplot"].get_fignums() == []
