"""The order of the images: exactly once, the same again, another in each epoch, and from any position on."""

from __future__ import annotations

import pickle
from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jem.data.plan import Plan, Position, Window, permutation
from jem.errors import InputError

PINNED_PERMUTATION = [3, 4, 7, 6, 1, 5, 2, 0]
PINNED_BATCHES = [[4, 0], [3, 19], [18, 15], [16, 17]]


def batches(plan: Plan, rank: int, start: Position, stop_epoch: int) -> list[np.ndarray]:
    """Ids (positions of the rows in storage) of a worker's batches."""
    starts = np.cumsum(plan.rows) - plan.rows
    found = []
    for window in plan.windows(rank, start, stop_epoch):
        groups, rows = plan.order(window)
        found += np.split(starts[groups] + rows, len(window))
    return found


def epoch_ids(plan: Plan, epoch: int) -> np.ndarray:
    """All workers' ids of an epoch."""
    ranks = range(plan.world)
    return np.concatenate([ids for rank in ranks for ids in batches(plan, rank, Position(epoch, 0), epoch + 1)])


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    rows = draw(st.lists(st.integers(0, 40), min_size=1, max_size=30).filter(sum))
    world = draw(st.integers(1, 4))
    parts = world * draw(st.integers(1, 3))
    if sum(rows) < parts:
        rows = [*rows, parts]
    per_part = draw(st.integers(1, sum(rows) // parts))
    return Plan(
        rows,
        seed=draw(st.integers(0, 2**40)),
        batch_size=parts * per_part,
        world=world,
        window=draw(st.integers(1, 5)),
        remainder=draw(st.sampled_from(["drop", "carry"])),
        parts=parts,
    )


def on(plan: Plan, world: int, remainder: str | None = None) -> Plan:
    """The same plan for another number of workers."""
    kept = remainder or plan.remainder
    return Plan(plan.rows, plan.seed, plan.batch_size, world, plan.window, kept, plan.parts)  # type: ignore[arg-type]


def global_batches(plan: Plan, start: Position, stop_epoch: int) -> list[np.ndarray]:
    """Ids of each step's batch, of all workers in the order of their ranks."""
    each = [batches(plan, rank, start, stop_epoch) for rank in range(plan.world)]
    return [np.concatenate(shares) for shares in zip(*each, strict=True)]


def worlds(plan: Plan) -> list[int]:
    return [world for world in range(1, plan.parts + 1) if plan.parts % world == 0]


@given(plans())
def test_an_epoch_has_each_image_once_over_all_workers(plan: Plan) -> None:
    if plan.remainder == "carry":
        plan = on(plan, plan.world, "drop")
    for epoch in range(3):
        ids = epoch_ids(plan, epoch)
        assert len(np.unique(ids)) == len(ids) == plan.total - plan.dropped(epoch)
        assert ids.min() >= 0
        assert ids.max() < plan.total
        assert plan.dropped(epoch) == plan.total % plan.batch_size


@given(plans())
def test_carrying_loses_no_image_and_repeats_none(plan: Plan) -> None:
    plan = on(plan, plan.world, "carry")
    seen = np.zeros(plan.total, int)
    for epoch in range(4):
        seen += np.bincount(epoch_ids(plan, epoch), minlength=plan.total)
        left = (epoch + 1) * plan.total % plan.batch_size
        assert plan.carried(epoch + 1) == left < plan.batch_size
        assert set(np.unique(seen)) <= {epoch, epoch + 1}, "each image once per epoch, or not yet in this one"
        assert (seen == epoch).sum() == left, "what is missing is what the next epoch begins with"
        assert plan.dropped(epoch) == 0


@given(plans())
def test_each_global_batch_is_the_same_in_the_same_order_on_any_number_of_workers(plan: Plan) -> None:
    whole = global_batches(on(plan, plan.parts), Position(0, 0), 2)
    for world in worlds(plan)[:-1]:
        found = global_batches(on(plan, world), Position(0, 0), 2)
        assert len(found) == len(whole)
        for ids, expected in zip(found, whole, strict=True):
            np.testing.assert_array_equal(ids, expected)


@given(plans(), st.data())
def test_a_run_resized_at_any_steps_sees_each_image_once_per_epoch(plan: Plan, data: st.DataObject) -> None:
    epochs = 2
    total = plan.total_steps(epochs)
    cuts = sorted(data.draw(st.lists(st.integers(0, total), max_size=4)))
    seen: list[np.ndarray] = []
    for low, high in zip([0, *cuts], [*cuts, total], strict=True):
        now = on(plan, data.draw(st.sampled_from(worlds(plan))))
        seen += global_batches(now, now.position(low), epochs)[: high - low]
    assert len(seen) == total
    if plan.remainder == "drop":
        for epoch in range(epochs):
            ids = np.concatenate(seen[plan.total_steps(epoch) : plan.total_steps(epoch + 1)])
            assert len(np.unique(ids)) == len(ids) == plan.total - plan.dropped(epoch)
    else:
        counts = np.bincount(np.concatenate(seen), minlength=plan.total)
        assert set(counts) <= {epochs - 1, epochs}
        assert (counts < epochs).sum() == epochs * plan.total % plan.batch_size


def test_a_remainder_is_dropped_or_carried_and_counted() -> None:
    drop = Plan([10, 10, 5], seed=0, batch_size=10, world=2)
    assert [drop.steps(epoch) for epoch in range(4)] == [2, 2, 2, 2]
    assert [drop.dropped(epoch) for epoch in range(4)] == [5, 5, 5, 5]
    assert drop.total_steps(4) == 8
    carry = Plan([10, 10, 5], seed=0, batch_size=10, world=2, remainder="carry")
    assert [carry.steps(epoch) for epoch in range(4)] == [2, 3, 2, 3]
    assert [carry.carried(epoch) for epoch in range(5)] == [0, 5, 0, 5, 0]
    assert carry.total_steps(4) == 10


def test_what_is_dropped_differs_from_epoch_to_epoch() -> None:
    plan = Plan([10] * 20, seed=0, batch_size=128, world=1)
    left_out = [frozenset(range(200)) - set(epoch_ids(plan, epoch).tolist()) for epoch in range(5)]
    assert len(set(left_out)) == 5


def test_carried_images_open_the_next_epoch() -> None:
    plan = Plan([10] * 10, seed=3, batch_size=32, world=1, window=1, remainder="carry")
    first = set(epoch_ids(plan, 0).tolist())
    opening = set(batches(plan, 0, Position(1, 0), 2)[0].tolist())
    assert set(range(100)) - first <= opening


@given(plans(), st.data())
def test_starting_anywhere_gives_the_rest_of_the_sequence(plan: Plan, data: st.DataObject) -> None:
    stop = 3
    rank = data.draw(st.integers(0, plan.world - 1))
    number = data.draw(st.integers(0, plan.total_steps(stop)))
    start = plan.position(number)
    whole = batches(plan, rank, Position(0, 0), stop)
    assert len(whole) == plan.total_steps(stop)
    assert all(len(ids) == plan.batch_per_worker for ids in whole)
    rest = batches(plan, rank, start, stop)
    assert len(rest) == len(whole) - number
    for ids, expected in zip(rest, whole[number:], strict=True):
        np.testing.assert_array_equal(ids, expected)


@given(plans())
def test_positions_and_step_numbers_are_each_others_inverse(plan: Plan) -> None:
    everything = list(plan.positions(Position(0, 0), 4))
    assert everything == [Position(epoch, step) for epoch in range(4) for step in range(plan.steps(epoch))]
    for number, position in enumerate(everything):
        assert plan.number(position) == number
        assert plan.position(number) == position


def test_the_end_of_an_epoch_is_the_beginning_of_the_next() -> None:
    plan = Plan([7] * 9, seed=1, batch_size=8, world=2)
    end = batches(plan, 1, Position(0, plan.steps(0)), 2)
    np.testing.assert_array_equal(end, batches(plan, 1, Position(1, 0), 2))
    assert batches(plan, 1, Position(1, plan.steps(1)), 2) == []


def test_the_order_depends_on_seed_and_epoch_and_on_nothing_that_passes() -> None:
    def ids(seed: int, epoch: int) -> list[int]:
        return [int(number) for number in epoch_ids(Plan([50] * 10, seed, batch_size=20, world=2), epoch)]

    np.random.seed(1)  # noqa: NPY002 - global state must not matter
    first = ids(0, 0)
    np.random.seed(2)  # noqa: NPY002
    assert ids(0, 0) == first
    orders = {tuple(ids(seed, epoch)) for seed in (0, 1) for epoch in range(3)}
    assert len(orders) == 6


def test_the_order_is_the_same_in_every_release() -> None:
    """Pinned: a run that was stopped must go on with the same images after an update."""
    assert permutation(8, 0, 1, 2).tolist() == PINNED_PERMUTATION
    plan = Plan([5, 5, 5, 5], seed=7, batch_size=4, world=2, window=2)
    assert [ids.tolist() for ids in batches(plan, 1, Position(1, 1), 2)] == PINNED_BATCHES


def test_a_batch_mixes_images_of_several_row_groups() -> None:
    plan = Plan([64] * 64, seed=0, batch_size=128, world=1, window=4)
    for ids in batches(plan, 0, Position(0, 0), 1):
        assert len(np.unique(ids // 64)) >= 3


def test_no_place_in_the_epoch_is_usual_for_an_image() -> None:
    plan = Plan([8] * 16, seed=0, batch_size=16, world=2)
    epochs = 200
    places = np.array([np.argsort(epoch_ids(plan, epoch)) for epoch in range(epochs)])
    mean, spread = places.mean(0), 128 / np.sqrt(12 * epochs)
    assert np.abs(mean - 63.5).max() < 4.5 * spread


def test_only_row_groups_at_the_borders_of_windows_are_read_twice() -> None:
    plan = Plan([72] * 1000, seed=0, batch_size=512, world=2, window=4)
    reads = [
        piece.group for rank in range(2) for window in plan.windows(rank, Position(0, 0), 1) for piece in window.pieces
    ]
    windows = 2 * -(-plan.steps(0) // plan.window_steps())
    assert len(reads) <= 1000 + windows
    assert len(reads) / 1000 < 1 + 1 / plan.window


def test_starting_in_a_window_makes_only_what_was_not_consumed() -> None:
    plan = Plan([100] * 20, seed=0, batch_size=10, world=1, window=2)
    assert plan.window_steps() == 20
    window = next(plan.windows(0, Position(0, 13), 1))
    groups, _ = plan.order(window)
    assert len(window) == 7
    assert len(groups) == 70


def test_a_billion_images_are_planned_by_row_groups() -> None:
    plan = Plan(np.full(1_000_000, 1000), seed=0, batch_size=8192, world=64)
    window = next(plan.windows(63, Position(5, 100), 6))
    groups, rows = plan.order(window)
    assert len(groups) == len(window) * 128
    assert rows.max() < 1000
    assert len(window.pieces) <= plan.window + 2


def test_a_window_survives_the_way_to_a_task() -> None:
    plan = Plan([5] * 8, seed=0, batch_size=4, world=2, remainder="carry")
    window = next(plan.windows(1, Position(1, 1), 2))
    assert Window.of(asdict(window)) == window
    there = pickle.loads(pickle.dumps(plan))
    np.testing.assert_array_equal(there.order(window), plan.order(window))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"batch_size": 10, "world": 3}, "does not divide among 3 workers"),
        ({"batch_size": 10, "parts": 4}, "does not divide among 4 parts"),
        ({"world": 2, "parts": 3}, "3 parts of an epoch do not divide among 2 workers"),
        ({"batch_size": 22}, "20 images do not fill one global batch of 22"),
        ({"batch_size": 0}, "must be positive"),
        ({"window": 0}, "must be positive"),
    ],
)
def test_impossible_batches_are_refused(change: dict[str, int], words: str) -> None:
    with pytest.raises(InputError, match=words):
        Plan([10, 10], **{"seed": 0, "batch_size": 4, "world": 2, **change})


def test_a_rank_outside_the_world_is_refused() -> None:
    with pytest.raises(ValueError, match="rank 2 of 2"):
        next(Plan([10], seed=0, batch_size=2, world=2).windows(2, Position(0, 0), 1))
