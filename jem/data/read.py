"""Reads and decodes the images of a window, or of any rows: what a decode task does, or a test without Ray."""

from __future__ import annotations

import time
import warnings
from functools import cache
from itertools import pairwise
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow import fs as pafs

from jem.data.decode import DecodeError, Scratch, decode_canvas
from jem.data.plan import permutation
from jem.errors import RunError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    import torch
    from numpy.typing import ArrayLike, NDArray

    from jem.batch import Batch
    from jem.config import StreamConfig
    from jem.data.index import Index
    from jem.data.plan import Plan, Position, Window

Told: TypeAlias = "Callable[[NDArray[np.int64]], None]"
Cell: TypeAlias = "bytes | memoryview"
Encoded: TypeAlias = "tuple[list[Cell | None], NDArray[np.int64], NDArray[np.int64]]"
Arrays = dict[str, np.ndarray]
"""`image` uint8 (n, S, S, 3), `size` int32 (n, 2), `id` and `label` int64 (n,).

Where lost images are replaced also `lost` int64 (n,): the position of the one that this stands in for, or -1."""

SMALL_BYTES = 2**14
"""Encoded images of fewer bytes, on average, are copied out of their row group: it takes less than a view of each."""
TRIES = 3
"""Of a read from a remote store, which may be busy."""
SUBSTITUTE = 4
"""What a permutation is for, beside those of the plan; part of its seed."""
SUBSTITUTES = 16
"""Row groups that are tried for one that can be read."""


def read_window(
    index: Index,
    plan: Plan,
    window: Window,
    canvas: int,
    pixel_limit: int,
    together: int = 1,
    *,
    replace: bool = False,
) -> Iterator[Arrays]:
    """The batches of a window, `together` at a time, decoded when they are asked for: each array (k, n, ...).

    With `replace` others stand in for the images that cannot be had.

    Raises:
        RunError: An image that cannot be decoded, or a shard that cannot be read.
    """
    rows = Rows(index, *plan.order(window), replace=replace)
    images = together * plan.batch_per_worker
    for first in range(0, len(rows), images):
        arrays = rows.decode(first, first + images, canvas, pixel_limit)
        yield {name: array.reshape(-1, plan.batch_per_worker, *array.shape[1:]) for name, array in arrays.items()}


def read_group(
    index: Index, group: int, canvas: int, pixel_limit: int, block_bytes: int, *, replace: bool = False
) -> Iterator[Arrays]:
    """The images of a row group in storage order, decoded, in blocks of `block_bytes` at most.

    With `replace` others stand in for the images that cannot be had.

    Raises:
        RunError: An image that cannot be decoded, or a shard that cannot be read.
    """
    count = int(index.rows[group])
    rows = Rows(index, np.full(count, group), np.arange(count), replace=replace)
    images = max(1, block_bytes // (canvas * canvas * 3))
    for first in range(0, count, images):
        yield rows.decode(first, first + images, canvas, pixel_limit)


def local_batches(
    index: Index,
    plan: Plan,
    stream: StreamConfig,
    rank: int,
    start: Position,
    stop_epoch: int,
    told: Told | None = None,
) -> Iterator[Batch]:
    """The stream of one worker without Ray, in this process: the same batches in the same order.

    With `told` others stand in for the images that cannot be had, whose positions it gets.
    """
    for window in plan.windows(rank, start, stop_epoch):
        replace = told is not None
        for arrays in read_window(index, plan, window, stream.canvas, stream.pixel_limit, replace=replace):
            tell(arrays, told)
            yield as_batch({name: array[0] for name, array in arrays.items()})


def tell(arrays: Arrays, told: Told | None) -> None:
    """Give `told` the positions of the images that others stand in for, if there are any."""
    if told is not None and (lost := arrays["lost"][arrays["lost"] >= 0]).size:
        told(lost)


def why_lost(index: Index, position: int, canvas: int, pixel_limit: int) -> str:
    """Why the image at a position cannot be had, in one line."""
    try:
        read_rows(index, [position], canvas, pixel_limit)
    except RunError as error:
        return str(error)
    return f"the image at position {position} could not be read, and now it can"


def read_rows(index: Index, positions: ArrayLike, canvas: int, pixel_limit: int, *, replace: bool = False) -> Batch:
    """Any rows by their positions, in the order given: for samples, not for a stream.

    With `replace` others stand in for the images that cannot be had.

    Raises:
        IndexError: A position outside the data set.
        RunError: An image that cannot be decoded, or a shard that cannot be read.
    """
    wanted = np.asarray(positions, np.int64)
    if wanted.size and (wanted.min() < 0 or wanted.max() >= len(index)):
        raise IndexError(f"positions must be in 0 ... {len(index) - 1}")
    groups = np.searchsorted(index.start, wanted, side="right") - 1
    rows = Rows(index, groups, wanted - index.start[groups], replace=replace)
    return as_batch(rows.decode(0, len(rows), canvas, pixel_limit))


def count_classes(index: Index) -> int | None:
    """Number of classes: of names in the schema, or else the largest label + 1; None without labels.

    Raises:
        RunError: A shard that cannot be read.
    """
    if index.label_column is None or index.classes is not None:
        return len(index.classes) if index.classes is not None and index.label_column is not None else None
    largest = -1
    try:
        for path in index.files:
            column = pq.read_table(path, columns=[index.label_column], filesystem=index.filesystem())[0]
            largest = max(largest, pc.max(column).as_py() if column.null_count < len(column) else -1)
    except (OSError, pa.ArrowException) as error:
        raise RunError(f"cannot read the labels of {path} ({error})") from error
    return largest + 1 if largest >= 0 else None


def as_batch(arrays: Mapping[str, np.ndarray], *, pin_memory: bool = False) -> Batch:
    """Tensors of these arrays; `image` becomes an NCHW view in channels_last memory, without a copy.

    Args:
        arrays: `Arrays`. They may be read-only, such as those in Ray's object store: then so is the batch, by contract.
        pin_memory: Copy into page-locked memory, from which a GPU can read while it computes.
    """
    from jem.batch import Batch  # and torch, which a decode task does without: seconds and hundreds of MB in each

    return Batch(
        image=_tensor(arrays["image"], pin_memory).permute(0, 3, 1, 2),
        size=_tensor(arrays["size"], pin_memory),
        id=_tensor(arrays["id"], pin_memory),
        label=_tensor(arrays["label"], pin_memory),
    )


def _tensor(array: np.ndarray, pin_memory: bool) -> torch.Tensor:
    import torch

    _silence_read_only()
    tensor = torch.from_numpy(array)
    return tensor.pin_memory() if pin_memory else tensor


@cache
def _silence_read_only() -> None:
    """Have torch say unheard, as it does once in a process, that an array is read-only: a filter each time is slow."""
    import torch

    read_only = np.zeros(1)
    read_only.setflags(write=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.from_numpy(read_only)


class Rows:
    """Encoded images of some rows, read from storage, with their ids and labels, in the order asked for.

    With `replace` an image that cannot be read or decoded is lost, and another stands in for it, with its own id and
    label: of a row group that depends on the lost image's alone. So it is the same in every batch, worker and run.
    """

    def __init__(
        self, index: Index, groups: NDArray[np.int64], rows: NDArray[np.int64], *, replace: bool = False
    ) -> None:
        """Read each row group once, and of it only the columns that are needed.

        Args:
            index: Of the data set.
            groups: (n,) number in the index of each row's row group.
            rows: (n,) row within it.
            replace: what cannot be had.

        Raises:
            RunError: A shard that cannot be read, and is not replaced.
        """
        self._index, self._groups, self._rows, self._replace = index, groups, rows, replace
        self._lost = np.full(len(groups), -1, np.int64)
        self._spares: dict[int, Encoded | None] = {}
        self._filesystem = index.filesystem()
        self._remote = not isinstance(self._filesystem, pafs.LocalFileSystem)
        self._encoded: list[Cell | None] = [None] * len(groups)
        self._scratch = Scratch()
        self._id = index.start[groups] + rows
        self._label = np.full(len(groups), -1, np.int64)
        order = np.argsort(groups, kind="stable")  # by file and row group
        cuts = np.flatnonzero(np.diff(groups[order])) + 1
        self._opened: tuple[int, pq.ParquetFile] | None = None
        for where in np.split(order, cuts) if len(order) else []:
            group = int(groups[where[0]])
            try:
                self._try(group, where)
            except (OSError, IndexError, pa.ArrowException) as error:
                if replace:
                    self._lost[where] = index.start[group] + rows[where]
                    continue
                name = index.files[index.file[group]]
                raise RunError(f"cannot read {name} ({error}): check the file, and whether it changed since") from error
        self._opened = None

    def __len__(self) -> int:
        return len(self._groups)

    def _try(self, group: int, where: NDArray[np.int64]) -> None:
        """Read rows of a row group; several times from a remote store, whose errors may pass."""
        for attempt in range(TRIES if self._remote else 1):
            try:
                self._read(self._parquet(int(self._index.file[group])), group, where)
            except OSError as error:
                self._opened = None
                if not self._remote or attempt + 1 == TRIES or isinstance(error, FileNotFoundError):
                    raise
                time.sleep(2.0**attempt)
            else:
                return

    def _parquet(self, number: int) -> pq.ParquetFile:
        if self._opened is None or self._opened[0] != number:
            file = self._filesystem.open_input_file(self._index.files[number])
            self._opened = number, pq.ParquetFile(file, pre_buffer=self._remote)
        return self._opened[1]

    def _read(self, parquet: pq.ParquetFile, group: int, where: NDArray[np.int64]) -> None:
        index = self._index
        others = [name for name in (index.label_column, "id" if index.has_id else None) if name]
        struct = pa.types.is_struct(parquet.schema_arrow.field(index.image_column).type)
        image = f"{index.image_column}.bytes" if struct else index.image_column
        table = parquet.read_row_group(int(index.row_group[group]), columns=[image, *others], use_threads=False)
        rows = self._rows[where]
        column = table.column(index.image_column)
        encoded = pa.chunked_array([chunk.field("bytes") if struct else chunk for chunk in column.chunks])
        if isinstance(encoded.type, pa.BaseExtensionType):  # Ray has one that unpickles; so the shard is another now
            raise pa.ArrowTypeError(f"column {index.image_column} is of type {encoded.type}")
        small = encoded.nbytes < SMALL_BYTES * len(encoded)
        cells = encoded.to_numpy(zero_copy_only=False) if small else _cells(encoded)
        # a value where it is keeps its whole row group: samples of few rows of each would keep the whole data set
        most = 2 * len(np.unique(rows)) >= len(cells)
        for at, row in zip(where.tolist(), rows.tolist(), strict=True):
            self._encoded[at] = cells[row] if small or most else bytes(cells[row])
        if index.has_id:
            self._id[where] = table.column("id").cast(pa.int64()).to_numpy()[rows]
        if index.label_column:
            self._label[where] = table.column(index.label_column).cast(pa.int64()).fill_null(-1).to_numpy()[rows]

    def decode(self, low: int, high: int, canvas: int, pixel_limit: int) -> Arrays:
        """Decode the rows `low` ... `high` - 1; what was encoded is forgotten.

        Raises:
            RunError: An image that cannot be decoded and is not replaced, or by none that was tried.
        """
        high = min(high, len(self))
        image = np.empty((high - low, canvas, canvas, 3), np.uint8)
        size = np.empty((high - low, 2), np.int32)
        for number in range(high - low):
            at = low + number
            data, self._encoded[at] = self._encoded[at], None
            try:
                if self._lost[at] < 0:
                    _, size[number] = decode_canvas(data or b"", canvas, pixel_limit, image[number], self._scratch)
                    continue
            except DecodeError as error:
                if not self._replace:
                    raise RunError(self._undecodable(at, error)) from error
            size[number] = self._substitute(at, canvas, pixel_limit, image[number])
        arrays: Arrays = {"image": image, "size": size, "id": self._id[low:high], "label": self._label[low:high]}
        if self._replace:
            arrays["lost"] = self._lost[low:high]
        return arrays

    def _substitute(self, at: int, canvas: int, pixel_limit: int, out: np.ndarray) -> tuple[int, int]:
        """Put another image in place of a lost one, with its id and label; returns its height and width."""
        index, group, row = self._index, int(self._groups[at]), int(self._rows[at])
        self._lost[at] = index.start[group] + row
        others = permutation(len(index.rows), SUBSTITUTE, group)
        others = others[index.rows[others] > 0]
        elsewhere = index.file[others] != index.file[group]
        for other in np.concatenate([others[elsewhere], others[~elsewhere]])[:SUBSTITUTES].tolist():
            spare = self._spare(other)
            if spare is None:
                continue
            encoded, ids, labels = spare
            number = (row + 1) % len(ids)
            try:
                _, size = decode_canvas(encoded[number] or b"", canvas, pixel_limit, out, self._scratch)
            except DecodeError:
                continue
            self._id[at], self._label[at] = ids[number], labels[number]
            return size
        name = index.files[index.file[group]]
        raise RunError(f"cannot read {name}, nor {SUBSTITUTES} others in place of it: check the data set")

    def _spare(self, group: int) -> Encoded | None:
        """All images of a row group, if it can be read."""
        if group not in self._spares:
            count = int(self._index.rows[group])
            try:
                self._spares[group] = Rows(self._index, np.full(count, group), np.arange(count)).encoded()
            except RunError:
                self._spares[group] = None
        return self._spares[group]

    def encoded(self) -> Encoded:
        """What was read: encoded images, ids and labels."""
        return self._encoded, self._id, self._label

    def _undecodable(self, at: int, error: DecodeError) -> str:
        group = int(self._groups[at])
        file = self._index.files[self._index.file[group]]
        return (
            f"cannot decode the image in row {self._rows[at]} of row group {self._index.row_group[group]} of {file} "
            f'({error}): "jem ingest" makes a copy of this data set without such images'
        )


def _cells(column: pa.ChunkedArray) -> list[memoryview]:
    """The values of a column of bytes, where they are; that of a null is empty."""
    cells: list[memoryview] = []
    for chunk in column.chunks:
        if not len(chunk):
            continue
        _, offsets, data = chunk.buffers()
        width = np.int64 if pa.types.is_large_binary(chunk.type) else np.int32
        ends = np.frombuffer(offsets, width)[chunk.offset : chunk.offset + len(chunk) + 1].tolist()
        whole = memoryview(data or b"").cast("B")  # Arrow's own are signed
        cells += [whole[low:high] for low, high in pairwise(ends)]
    return cells
