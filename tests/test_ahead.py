"""Reading ahead in a thread: all items in order, errors where they are taken, an end to waiting and to the thread."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from jem.ahead import Ahead


def names() -> set[str]:
    return {thread.name for thread in threading.enumerate()}


def test_all_items_come_in_order_and_then_none() -> None:
    with Ahead(lambda: iter(range(20)), 3, "ahead-order") as ahead:
        assert [ahead.take(10) for _ in range(20)] == [*range(20)]
        assert ahead.take() is None


def test_an_error_is_raised_where_the_item_would_have_been_taken() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise ValueError("broken")

    with Ahead(items, 2, "ahead-error") as ahead:
        assert ahead.take(10) == 1
        with pytest.raises(ValueError, match="broken"):
            ahead.take(10)


def test_no_more_than_size_items_wait() -> None:
    made: list[int] = []
    third = threading.Event()

    def items() -> Iterator[int]:
        for number in range(100):
            made.append(number)
            if number == 2:
                third.set()
            yield number

    with Ahead(items, 2, "ahead-size") as ahead:
        assert third.wait(10)
        assert made == [0, 1, 2]  # two wait, the third is held by the thread
        ahead.take(10)


def test_waiting_ends_and_so_does_the_thread() -> None:
    never = threading.Event()
    closed = threading.Event()

    def items() -> Iterator[int]:
        try:
            yield 1
            never.wait(10)
            yield 2
        finally:
            closed.set()

    ahead = Ahead(items, 1, "ahead-end")
    assert ahead.take(10) == 1
    with pytest.raises(TimeoutError):
        ahead.take(0.01)
    assert "ahead-end" in names()
    never.set()
    ahead.close()
    assert "ahead-end" not in names()
    assert closed.is_set()
