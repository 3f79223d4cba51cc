"""Schedules are functions of the step."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jem.train.schedules import cosine, learning_rate, scaled_lr, weight_decay


@pytest.mark.parametrize(
    ("rule", "batch", "expected"),
    [("linear", 256, 0.3), ("linear", 1024, 1.2), ("linear", 64, 0.075), ("sqrt", 1024, 0.6), ("none", 1024, 0.3)],
)
def test_rate_follows_the_batch_by_the_rule(rule, batch: int, expected: float) -> None:
    assert scaled_lr(0.3, batch, rule) == pytest.approx(expected)


def test_rate_warms_up_from_zero_and_ends_at_its_final_share() -> None:
    rates = [learning_rate(step, total=101, peak=2.0, warmup=20, final=0.001) for step in range(101)]
    assert rates[:21] == pytest.approx([2.0 * step / 20 for step in range(21)])
    assert rates[60] == pytest.approx((2.0 + 0.002) / 2)  # half-way down the cosine
    assert rates[100] == pytest.approx(0.002)
    assert rates[40] == pytest.approx(0.002 + 1.998 * (1 + math.cos(math.pi / 4)) / 2)


@given(total=st.integers(1, 300), warmup=st.integers(0, 300), final=st.floats(0, 1))
def test_rate_rises_to_its_peak_and_then_falls(total: int, warmup: int, final: float) -> None:
    warmup = min(warmup, total - 1)
    rates = [learning_rate(step, total=total, peak=1.0, warmup=warmup, final=final) for step in range(total)]
    assert all(0 <= rate <= 1 for rate in rates)
    assert rates[: warmup + 1] == sorted(rates[: warmup + 1])
    assert rates[warmup:] == sorted(rates[warmup:], reverse=True)
    assert rates[warmup] == 1
    if total - warmup > 1:
        assert rates[-1] == pytest.approx(final)


def test_constant_rate_stays_after_the_warm_up() -> None:
    rates = [learning_rate(step, total=10, peak=0.5, warmup=2, decay="constant", final=0.1) for step in range(10)]
    assert rates == [0, 0.25] + [0.5] * 8


def test_a_warm_up_longer_than_the_training_never_reaches_the_peak() -> None:
    assert learning_rate(9, total=10, peak=1.0, warmup=100) == pytest.approx(0.09)


def test_weight_decay_is_constant_or_a_cosine() -> None:
    assert [weight_decay(step, total=5, start=0.04) for step in range(5)] == [0.04] * 5
    decays = [weight_decay(step, total=5, start=0.04, final=0.4) for step in range(5)]
    assert decays[0] == pytest.approx(0.04)
    assert decays[2] == pytest.approx(0.22)
    assert decays[4] == pytest.approx(0.4)


def test_cosine_of_one_step_and_past_the_end() -> None:
    assert cosine(0, 1, 1.0, 0.0) == 1.0
    assert cosine(50, 10, 1.0, 0.25) == 0.25
