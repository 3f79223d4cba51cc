"""Reads and decodes the images of a window, or of any rows: what a decode task does, or a test without Ray."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from jem.data.decode import DecodeError, Scratch, decode_canvas
from jem.errors import RunError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import torch
    from numpy.typing import ArrayLike, NDArray

    from jem.batch import Batch
    from jem.config import StreamConfig
    from jem.data.index import Index
    from jem.data.plan import Plan, Position, Window

Arrays = dict[str, np.ndarray]
"""`image` uint8 (n, S, S, 3), `size` int32 (n, 2), `id` and `label` int64 (n,)."""


def read_window(
    index: Index, plan: Plan, window: Window, canvas: int, pixel_limit: int, together: int = 1
) -> Iterator[Arrays]:
    """The batches of a window, `together` at a time, decoded when they are asked for: each array (k, n, ...).

    Raises:
        RunError: An image that cannot be decoded, or a shard that cannot be read.
    """
    rows = Rows(index, *plan.order(window))
    images = together * plan.batch_per_worker
    for first in range(0, len(rows), images):
        arrays = rows.decode(first, first + images, canvas, pixel_limit)
        yield {name: array.reshape(-1, plan.batch_per_worker, *array.shape[1:]) for name, array in arrays.items()}


def local_batches(
    index: Index, plan: Plan, stream: StreamConfig, rank: int, start: Position, stop_epoch: int
) -> Iterator[Batch]:
    """The stream of one worker without Ray, in this process: the same batches in the same order."""
    for window in plan.windows(rank, start, stop_epoch):
        for arrays in read_window(index, plan, window, stream.canvas, stream.pixel_limit):
            yield as_batch({name: array[0] for name, array in arrays.items()})


def read_rows(index: Index, positions: ArrayLike, canvas: int, pixel_limit: int) -> Batch:
    """Any rows by their positions, in the order given: for samples, not for a stream.

    Raises:
        IndexError: A position outside the data set.
        RunError: An image that cannot be decoded, or a shard that cannot be read.
    """
    wanted = np.asarray(positions, np.int64)
    if wanted.size and (wanted.min() < 0 or wanted.max() >= len(index)):
        raise IndexError(f"positions must be in 0 ... {len(index) - 1}")
    groups = np.searchsorted(index.start, wanted, side="right") - 1
    rows = Rows(index, groups, wanted - index.start[groups])
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

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        tensor = torch.from_numpy(array)
    return tensor.pin_memory() if pin_memory else tensor


class Rows:
    """Encoded images of some rows, read from storage, with their ids and labels, in the order asked for."""

    def __init__(self, index: Index, groups: NDArray[np.int64], rows: NDArray[np.int64]) -> None:
        """Read each row group once, and of it only the columns that are needed.

        Args:
            index: Of the data set.
            groups: (n,) number in the index of each row's row group.
            rows: (n,) row within it.
        """
        self._index, self._groups, self._rows = index, groups, rows
        self._encoded: list[bytes | None] = [None] * len(groups)
        self._scratch = Scratch()
        self._id = index.start[groups] + rows
        self._label = np.full(len(groups), -1, np.int64)
        order = np.argsort(groups, kind="stable")  # by file and row group
        cuts = np.flatnonzero(np.diff(groups[order])) + 1
        opened: tuple[int, pq.ParquetFile] | None = None
        try:
            for where in np.split(order, cuts) if len(order) else []:
                group = int(groups[where[0]])
                number = int(index.file[group])
                if opened is None or opened[0] != number:
                    opened = number, self._open(number)
                self._read(opened[1], group, where)
        except (OSError, IndexError, pa.ArrowException) as error:
            name = index.files[number]
            raise RunError(f"cannot read {name} ({error}): check the file, and whether it changed since") from error

    def __len__(self) -> int:
        return len(self._groups)

    def _open(self, number: int) -> pq.ParquetFile:
        return pq.ParquetFile(self._index.filesystem().open_input_file(self._index.files[number]), pre_buffer=True)

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
        for at, row in zip(where.tolist(), rows.tolist(), strict=True):
            self._encoded[at] = encoded[row].as_py()
        if index.has_id:
            self._id[where] = table.column("id").cast(pa.int64()).to_numpy()[rows]
        if index.label_column:
            self._label[where] = table.column(index.label_column).cast(pa.int64()).fill_null(-1).to_numpy()[rows]

    def decode(self, low: int, high: int, canvas: int, pixel_limit: int) -> Arrays:
        """Decode the rows `low` ... `high` - 1; what was encoded is forgotten."""
        high = min(high, len(self))
        image = np.empty((high - low, canvas, canvas, 3), np.uint8)
        size = np.empty((high - low, 2), np.int32)
        for number in range(high - low):
            data, self._encoded[low + number] = self._encoded[low + number], None
            try:
                _, size[number] = decode_canvas(data or b"", canvas, pixel_limit, image[number], self._scratch)
            except DecodeError as error:
                raise RunError(self._undecodable(low + number, error)) from error
        return {"image": image, "size": size, "id": self._id[low:high], "label": self._label[low:high]}

    def _undecodable(self, at: int, error: DecodeError) -> str:
        group = int(self._groups[at])
        file = self._index.files[self._index.file[group]]
        return (
            f"cannot decode the image in row {self._rows[at]} of row group {self._index.row_group[group]} of {file} "
            f'({error}): "jem ingest" makes a copy of this data set without such images'
        )
