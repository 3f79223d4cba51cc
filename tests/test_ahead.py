"""Reading ahead in a thread: all items in order, errors where they are taken, an end to waiting and to the thread."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from jem import ahead as module
from jem.ahead import Ahead, gap, give_way, precedence


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


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads that would give way for ever."""
    monkeypatch.setattr(module, "GIVE_WAY_SECONDS", 60.0)


class Made:
    """Counts from 0, and knows when each number was begun."""

    def __init__(self) -> None:
        self.begun = [threading.Event() for _ in range(9)]

    def __call__(self) -> Iterator[int]:
        for number, begun in enumerate(self.begun):
            begun.set()
            yield number


@pytest.mark.usefixtures("patient")
def test_the_next_item_is_begun_in_a_gap() -> None:
    made = Made()
    with precedence(), Ahead(made, 1, "ahead-gap") as ahead:
        assert ahead.take(10) == 0  # a thread that has to wait leaves a gap
        assert not made.begun[2].wait(0.2)
        with gap():
            assert made.begun[2].wait(10)
        assert ahead.take(10) == 1
        assert not made.begun[3].wait(0.2)
        assert ahead.take(10) == 2
        assert ahead.take(10) == 3


@pytest.mark.usefixtures("patient")
def test_nothing_gives_way_where_nobody_has_precedence() -> None:
    made = Made()
    with Ahead(made, 1, "ahead-free") as ahead:
        assert made.begun[1].wait(10)
        with precedence(), gap():
            give_way()
        assert ahead.take(10) == 0
        assert made.begun[2].wait(10)


@pytest.mark.usefixtures("patient")
def test_gaps_of_several_threads_do_not_end_each_other() -> None:
    inner, ended = threading.Event(), threading.Event()

    def other() -> None:
        with gap():
            inner.set()
            ended.wait(10)

    with precedence():
        thread = threading.Thread(target=other)
        with gap():
            thread.start()
            assert inner.wait(10)
        give_way()  # the other's is still open
        ended.set()
        thread.join()
        with gap():
            give_way()


def test_a_thread_does_not_give_way_for_long() -> None:
    with precedence():
        began = time.monotonic()
        give_way()
    assert time.monotonic() - began < 5
