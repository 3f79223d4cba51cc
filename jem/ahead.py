"""Reads an iterator in a thread of its own, which makes the next items while one is used; waiting for it has an end.

Python runs one thread at a time. One that queues small operations on a GPU, tens of thousands a second, may have to
wait for its turn after each while another thread works, and the GPU with it. So threads beside such a one give way:
they begin on their next piece of work in its gaps, where it waits or needs no Python.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from contextvars import ContextVar
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    from typing_extensions import Self

T = TypeVar("T")
POLL_SECONDS = 0.1
END_SECONDS = 10.0
CLOSED: ContextVar[threading.Event | None] = ContextVar("closed", default=None)
"""In a thread that reads ahead: set as soon as nobody wants the items any more."""
GIVE_WAY_SECONDS = 0.05
"""At most, for one piece of work."""


class _Turns:
    """Who is given way to at present."""

    def __init__(self) -> None:
        self.free = threading.Event()
        self.free.set()
        self._holders, self._gaps, self._lock = 0, 0, threading.Lock()

    @contextlib.contextmanager
    def counted(self, *, holders: int = 0, gaps: int = 0) -> Iterator[None]:
        """Inside, there are so many more that have precedence, and so many more gaps."""
        self._change(holders, gaps)
        try:
            yield
        finally:
            self._change(-holders, -gaps)

    def _change(self, holders: int, gaps: int) -> None:
        with self._lock:
            self._holders, self._gaps = self._holders + holders, self._gaps + gaps
            (self.free.clear if self._holders and not self._gaps else self.free.set)()


_turns = _Turns()


def precedence() -> AbstractContextManager[None]:
    """Until it is left the threads that read ahead give way, but for the gaps."""
    return _turns.counted(holders=1)


def gap() -> AbstractContextManager[None]:
    """Inside, nothing gives way: this thread waits, or needs no Python."""
    return _turns.counted(gaps=1)


def give_way() -> None:
    """Wait for a gap; not for long, as a gap saves time and nothing depends on it."""
    _turns.free.wait(GIVE_WAY_SECONDS)


class Ahead(Generic[T]):
    """The items of `make()`, at most `size` of them held ready.

    Args:
        make: makes the iterator, in the thread; leaving it early closes it there, if it can be closed.
        size: at least 1.
        name: of the thread.
    """

    def __init__(self, make: Callable[[], Iterator[T]], size: int, name: str) -> None:
        self._ready: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(size)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._read, args=(make,), name=name, daemon=True)
        self._thread.start()

    def take(self, seconds: float | None = None) -> T | None:
        """The next item, or None at the end.

        Args:
            seconds: to wait for it; None where making it has a deadline of its own.

        Raises:
            TimeoutError: None came within so many seconds.
        """
        waiting = gap() if self._ready.empty() else contextlib.nullcontext()
        try:
            with waiting:
                item, error = self._ready.get(timeout=seconds)
        except queue.Empty:
            raise TimeoutError from None
        if error is not None:
            raise error
        return item

    def close(self) -> None:
        """End the reading; what is ready is forgotten."""
        self._closed.set()
        with gap():
            self._thread.join(END_SECONDS)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read(self, make: Callable[[], Iterator[T]]) -> None:
        CLOSED.set(self._closed)
        try:
            items = make()
            for item in items:
                if not self._put(item, None):
                    break
                give_way()
            else:
                self._put(None, None)
            del items  # closes a generator: this is what ends an execution of Ray Data
        except BaseException as error:  # noqa: BLE001 - raised again where the items are taken
            self._put(None, error)

    def _put(self, item: T | None, error: BaseException | None) -> bool:
        while not self._closed.is_set():
            try:
                self._ready.put((item, error), timeout=POLL_SECONDS)
            except queue.Full:
                continue
            return True
        return False
