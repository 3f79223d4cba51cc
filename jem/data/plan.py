"""The order of the images: a function of integers, computed anywhere, without reading anything.

In each epoch the row groups are shuffled, and the rows of each of them; laid end to end they are the epoch's order.
What fills whole global batches of it is cut into contiguous *parts*, one or more for each worker. A part is read in
*windows* of some batches (about as many as `window` row groups hold), and the images of a window are shuffled among
each other. So every random choice is made ahead, from (seed, epoch, ...), reading stays sequential within row groups,
and starting at any step needs no replay.

Each part gives an equal share of every global batch, and a worker's batch is its parts' shares in their order. So the
global batches are the same, image by image, however many workers divide the parts among them: a run may go on with
another number at any step.

Windows end where batches end. So a row group at the border of two windows is read twice (its images are decoded once):
1 / `window` more bytes read, for which every decode task's output is whole batches, and is never cut or joined again.
"""

from __future__ import annotations

from dataclasses import InitVar, dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from jem.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import ArrayLike, NDArray

GROUPS, ROWS, WINDOW = 1, 2, 3
"""What a permutation is for; part of its seed."""
WINDOWS_PER_EPOCH = 8
"""A part is read in at least so many windows (if it has so many batches), to have work for several tasks."""


class Position(NamedTuple):
    """Where a stream is: the next step, counted from 0 within its epoch."""

    epoch: int
    step: int


@dataclass(frozen=True)
class Piece:
    """Rows `low` ... `high` - 1 of a row group in the order that it has in the epoch `source`."""

    source: int
    group: int
    low: int
    high: int


@dataclass(frozen=True)
class Window:
    """Some consecutive batches of one worker: what a decode task makes."""

    epoch: int
    rank: int
    """Of the worker."""
    step: int
    """First step."""
    steps: int
    """How many steps; each has the same number of rows."""
    skip: int
    """How many of the first steps are not wanted, because they were consumed before."""
    pieces: tuple[Piece, ...]
    """Of the worker's parts, one after the other; each part has as many rows."""

    def __len__(self) -> int:
        """Number of batches to make."""
        return self.steps - self.skip

    @classmethod
    def of(cls, row: dict[str, Any]) -> Window:
        """The window that `dataclasses.asdict` made this of."""
        return cls(**{**row, "pieces": tuple(Piece(**piece) for piece in row["pieces"])})


def permutation(n: int, *key: int) -> NDArray[np.int64]:
    """A random order of 0 ... n - 1, the same for the same key on every platform and version.

    NumPy promises that a bit generator's stream never changes, and not so for `Generator.permutation`: so the order is
    that of the stream's own numbers.
    """
    return np.argsort(np.random.PCG64(np.random.SeedSequence(key)).random_raw(n), kind="stable")


@dataclass(frozen=True, eq=False)
class Plan:
    """The order of a data set's rows over epochs, steps, parts and workers.

    Over all workers each row comes once per epoch. What does not fill the last global batch is dropped (others in each
    epoch), or with `carry` opens the next epoch.
    """

    rows_per_group: InitVar[ArrayLike]
    seed: int
    batch_size: int
    """Global: all workers together."""
    world: int
    window: int = 4
    """Row groups that are shuffled among each other, about."""
    remainder: Literal["drop", "carry"] = "drop"
    parts: int = 0
    """That an epoch is cut into, a multiple of `world`; 0 for one per worker."""

    rows: NDArray[np.int64] = field(init=False, repr=False)
    """(R,) rows of each row group."""
    total: int = field(init=False)
    """Images in the data set."""
    _orders: dict[int, tuple[NDArray[np.int64], NDArray[np.int64]]] = field(
        init=False, repr=False, default_factory=dict
    )

    def __post_init__(self, rows_per_group: ArrayLike) -> None:
        """Check that whole batches can be made.

        Raises:
            InputError: Workers that do not divide the parts, or a batch that does not divide among them or is larger
                than the data set.
        """
        object.__setattr__(self, "parts", self.parts or self.world)
        object.__setattr__(self, "rows", np.asarray(rows_per_group, np.int64))
        object.__setattr__(self, "total", int(self.rows.sum()))
        if min(self.batch_size, self.world, self.window) < 1:
            raise InputError(
                f"batch size {self.batch_size}, workers {self.world} and window {self.window} must be positive"
            )
        if self.parts % self.world:
            raise InputError(f"{self.parts} parts of an epoch do not divide among {self.world} workers: take a divisor")
        if self.batch_size % self.parts:
            among = "workers" if self.parts == self.world else "parts"
            raise InputError(
                f"a global batch of {self.batch_size} does not divide among {self.parts} {among}: take a multiple"
            )
        if self.total < self.batch_size:
            raise InputError(
                f"{self.total} images do not fill one global batch of {self.batch_size}: lower train.batch_size"
            )

    @property
    def batch_per_worker(self) -> int:
        """Images in one worker's batch."""
        return self.batch_size // self.world

    @property
    def batch_per_part(self) -> int:
        """Images of one part in a batch."""
        return self.batch_size // self.parts

    def parts_of(self, rank: int) -> range:
        """The parts of one worker."""
        each = self.parts // self.world
        return range(rank * each, (rank + 1) * each)

    def __getstate__(self) -> dict[str, object]:
        """What is sent to tasks: without the epochs' orders, which they do not need."""
        return {**self.__dict__, "_orders": {}}

    # --- counting -----------------------------------------------------------------------------------------------------

    def total_steps(self, epochs: int) -> int:
        """Steps of the first so many epochs."""
        if self.remainder == "carry":
            return epochs * self.total // self.batch_size
        return epochs * (self.total // self.batch_size)

    def steps(self, epoch: int) -> int:
        """Steps of one epoch; with `carry` it varies by one."""
        return self.total_steps(epoch + 1) - self.total_steps(epoch)

    def carried(self, epoch: int) -> int:
        """Images of the epoch before that open this one."""
        return epoch * self.total % self.batch_size if self.remainder == "carry" else 0

    def dropped(self, epoch: int) -> int:
        """Images that this epoch leaves out; 0 with `carry`."""
        return self.total % self.batch_size if self.remainder == "drop" else 0

    def position(self, step: int) -> Position:
        """Where the step of this number is, counted from 0 over all epochs."""
        last = (step + 1) * self.batch_size - 1  # image of this step, in a sequence that drops nothing
        epoch = last // self.total if self.remainder == "carry" else step // self.steps(0)
        return Position(epoch, step - self.total_steps(epoch))

    def number(self, position: Position) -> int:
        """The number of a step over all epochs: the inverse of `position`."""
        return self.total_steps(position.epoch) + position.step

    def positions(self, start: Position, stop_epoch: int) -> Iterator[Position]:
        """Every step from `start` to the last one before `stop_epoch`."""
        for number in range(self.number(start), self.total_steps(stop_epoch)):
            yield self.position(number)

    # --- order --------------------------------------------------------------------------------------------------------

    def window_steps(self) -> int:
        """Batches in a window."""
        mean = self.total / len(self.rows)
        wanted = -(-self.window * mean // self.batch_per_part)
        return max(1, min(int(wanted), self.total // self.batch_size // WINDOWS_PER_EPOCH))

    def windows(self, rank: int, start: Position, stop_epoch: int) -> Iterator[Window]:
        """The windows of one worker, from a position on, over the borders of epochs.

        Args:
            rank: Of the worker, 0 ... world - 1.
            start: First step that is wanted; the end of an epoch is the beginning of the next.
            stop_epoch: First epoch that is not wanted.
        """
        if not 0 <= rank < self.world:
            raise ValueError(f"rank {rank} of {self.world}")
        start = self.position(self.number(start))
        size, length = self.window_steps(), self.batch_per_part
        for epoch in range(start.epoch, stop_epoch):
            steps = self.steps(epoch)
            begin = start.step if epoch == start.epoch else 0
            for first in range(begin - begin % size, steps, size):
                count = min(size, steps - first)
                pieces: list[Piece] = []
                for part in self.parts_of(rank):
                    low = (part * steps + first) * length
                    pieces += self._pieces(epoch, low, low + count * length)
                yield Window(epoch, rank, first, count, max(0, begin - first), tuple(pieces))

    def order(self, window: Window) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Row groups and rows in them, (n,) each, in the order of the batches; skipped ones are left out."""
        groups = np.repeat([piece.group for piece in window.pieces], [p.high - p.low for p in window.pieces])
        rows = np.concatenate([self._row_order(piece)[piece.low : piece.high] for piece in window.pieces])
        length = window.steps * self.batch_per_part
        shuffled = [
            number * length + permutation(length, self.seed, WINDOW, window.epoch, part, window.step)
            for number, part in enumerate(self.parts_of(window.rank))
        ]
        by_step = np.stack(shuffled).reshape(len(shuffled), window.steps, self.batch_per_part).swapaxes(0, 1)
        wanted = by_step[window.skip :].ravel()
        return groups[wanted], rows[wanted]

    def _row_order(self, piece: Piece) -> NDArray[np.int64]:
        return permutation(int(self.rows[piece.group]), self.seed, ROWS, piece.source, piece.group)

    def _pieces(self, epoch: int, low: int, high: int) -> list[Piece]:
        """Rows `low` ... `high` - 1 of an epoch's sequence: the carried ones, then its own."""
        carried = self.carried(epoch)
        pieces: list[Piece] = []
        if low < carried:
            offset = self.total - carried
            pieces += self._slice(epoch - 1, offset + low, offset + min(high, carried))
        if high > carried:
            pieces += self._slice(epoch, max(low, carried) - carried, high - carried)
        return pieces

    def _slice(self, epoch: int, low: int, high: int) -> list[Piece]:
        groups, ends = self._group_order(epoch)
        pieces = []
        at = int(np.searchsorted(ends, low, side="right"))
        while low < high:
            end = int(ends[at])
            begin = end - int(self.rows[groups[at]])
            if low < end:  # not an empty row group
                pieces.append(Piece(epoch, int(groups[at]), low - begin, min(high, end) - begin))
                low = min(high, end)
            at += 1
        return pieces

    def _group_order(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Row groups in the epoch's order, and where each ends; kept for the latest two epochs."""
        if epoch not in self._orders:
            for old in sorted(self._orders)[:-1]:
                del self._orders[old]
            order = permutation(len(self.rows), self.seed, GROUPS, epoch)
            self._orders[epoch] = order, np.cumsum(self.rows[order])
        return self._orders[epoch]
