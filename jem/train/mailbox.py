"""What goes between the train workers, their controller and the driver."""

from __future__ import annotations

from collections import deque
from typing import Any


class Mailbox:
    """An actor that carries the workers' news to the driver, and the reason why a run must not be tried again.

    And the wish for a checkpoint before the number of workers changes, to rank 0, and its answer; and the images that
    could not be read.
    """

    def __init__(self) -> None:
        self._news: deque[tuple[str, Any]] = deque(maxlen=10_000)
        self._fatal: str | None = None
        self._wishes, self._answered = 0, 0
        self._lost: set[int] = set()
        self._lost_shards: set[str] = set()
        self._controller: Any = None

    def put(self, kind: str, value: Any) -> None:
        """Add one piece of news."""
        self._news.append((kind, value))

    def take(self) -> list[tuple[str, Any]]:
        """All news since the last call."""
        news, self._news = list(self._news), deque(maxlen=10_000)
        return news

    def give_up(self, reason: str) -> None:
        """Let no worker begin again."""
        self._fatal = self._fatal or reason

    def fatal(self) -> str | None:
        """Why no worker may begin again."""
        return self._fatal

    def want(self, workers: int) -> int:
        """Wish for a checkpoint, to go on with so many workers; returns the number of the wish."""
        self.put("say", f"the cluster has room for {workers} workers: keeping a checkpoint, then going on with them")
        self._wishes += 1
        return self._wishes

    def state(self) -> tuple[int, int]:
        """The number of the latest wish, and of the images that were lost."""
        return self._wishes, len(self._lost)

    def answer(self, wish: int) -> None:
        """A checkpoint is kept since that wish."""
        self._answered = wish

    def answered(self) -> int:
        """The latest wish since which a checkpoint is kept."""
        return self._answered

    def lose(self, positions: list[int], shards: dict[str, str]) -> int:
        """Note images that cannot be read, and why each shard's cannot; returns how many there are by now."""
        for name in shards.keys() - self._lost_shards:
            self._lost_shards.add(name)
            self.put("say", f"warning: {shards[name]}; other images stand in for those that are lost")
        self._lost.update(positions)
        return len(self._lost)

    def led_by(self, controller: Any) -> None:
        """Note the handle of Ray Train's controller."""
        self._controller = controller

    def controller(self) -> Any:
        """The handle of Ray Train's controller; None before it has begun."""
        return self._controller
