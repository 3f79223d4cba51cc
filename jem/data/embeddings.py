"""Embeddings as Parquet shards, sorted by id: `id` int64, `embedding` fixed_size_list<float>[D], `label` int64.

All or nothing: a local folder gets its name when it is complete; a folder in an object store, which cannot be renamed,
gets `_jem.json` last.
"""

from __future__ import annotations

import contextlib
import json
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow import fs as pafs

from jem.data.storage import exists, one_line, resolve, written
from jem.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from numpy.typing import NDArray

    Arrays = Mapping[str, NDArray[Any]]

MARKER = "_jem.json"
SHARD_BYTES = 256 * 10**6
ROW_GROUP_BYTES = 16 * 10**6


@dataclass(frozen=True)
class Written:
    """What was written."""

    rows: int
    shards: int


def check_free(out: str, *, overwrite: bool) -> None:
    """Refuse a folder that must not be written to.

    Raises:
        InputError: `out` exists and is not empty; with `overwrite`, only if it does not hold embeddings.
    """
    filesystem, path = resolve(out)
    kind = filesystem.get_file_info(path).type
    if kind == pafs.FileType.NotFound:
        return
    if kind == pafs.FileType.Directory:
        if not filesystem.get_file_info(pafs.FileSelector(path)):
            return
        if exists(filesystem, f"{path}/{MARKER}"):
            if overwrite:
                return
            raise InputError(f"{out} holds embeddings already: give another folder, or --overwrite to replace them")
    raise InputError(f"{out} exists and does not hold embeddings: give another folder")


def write_embeddings(
    blocks: Iterable[Arrays],
    out: str,
    dimensions: int,
    about: Mapping[str, Any],
    *,
    overwrite: bool = False,
    rows_per_shard: int | None = None,
) -> Written:
    """Write blocks of embeddings, in whatever order they come, to a folder sorted by id.

    A block is held in memory, and a shard; blocks that come by ascending id are written once, others twice.

    Args:
        blocks: each `id` int64 (n,), `embedding` float32 (n, D) and `label` int64 (n,), -1 where there is none.
        out: folder or URI.
        dimensions: D.
        about: what to say of them in `_jem.json` and in the schema's metadata `jem`.
        overwrite: replace embeddings that are there.
        rows_per_shard: default: shards of about 256 MB.

    Raises:
        InputError: `out` is taken, or cannot be written.
    """
    check_free(out, overwrite=overwrite)
    filesystem, path = resolve(out)
    local = isinstance(filesystem, pafs.LocalFileSystem)
    parent, _, name = path.rstrip("/").rpartition("/")
    folder = f"{parent}/.{name}.{uuid.uuid4().hex[:8]}.tmp" if local else path
    shards = _Shards(filesystem, folder, dimensions, about, rows_per_shard or max(1, SHARD_BYTES // (4 * dimensions)))
    try:
        with _writable(out):
            if not local and exists(filesystem, path):
                filesystem.delete_dir_contents(path)
            filesystem.create_dir(folder, recursive=True)
        for block in blocks:
            shards.add(block)
        shards.finish()
        with _writable(out):
            text = json.dumps({**about, "rows": shards.rows, "shards": len(shards.ids)}, indent=2)
            with written(filesystem, f"{folder}/{MARKER}") as sink:
                sink.write(text.encode())
            if local:
                if exists(filesystem, path):
                    filesystem.delete_dir(path)
                filesystem.move(folder, path)
    except BaseException:
        with contextlib.suppress(OSError):
            filesystem.delete_dir(folder)
        raise
    return Written(shards.rows, len(shards.ids))


class _Shards:
    """Parquet files of equally many rows in one folder."""

    def __init__(
        self, filesystem: pafs.FileSystem, folder: str, dimensions: int, about: Mapping[str, Any], size: int
    ) -> None:
        self.ids: list[NDArray[np.int64]] = []
        """Of each file, in its order."""
        self._filesystem, self._folder, self._size = filesystem, folder, size
        self._dimensions = dimensions
        self._schema = pa.schema(
            {"id": pa.int64(), "embedding": pa.list_(pa.float32(), dimensions), "label": pa.int64()},
            metadata={"jem": json.dumps(dict(about))},
        )
        self._waiting: list[pa.Table] = []
        self._rows = 0

    @property
    def rows(self) -> int:
        return sum(len(ids) for ids in self.ids)

    def add(self, block: Arrays) -> None:
        values = np.ascontiguousarray(block["embedding"], dtype=np.float32)
        label = np.asarray(block["label"], dtype=np.int64)
        columns = [
            pa.array(np.asarray(block["id"], dtype=np.int64)),
            pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), self._dimensions),
            pa.array(label, mask=label < 0),
        ]
        self._waiting.append(pa.Table.from_arrays(columns, schema=self._schema))
        self._rows += len(label)
        while self._rows >= self._size:
            table = pa.concat_tables(self._waiting)
            self._put(table.slice(0, self._size))
            self._waiting, self._rows = [table.slice(self._size)], self._rows - self._size

    def finish(self) -> None:
        """Write what waits, and sort if it did not come sorted."""
        if self._rows or not self.ids:
            self._put(pa.concat_tables(self._waiting) if self._waiting else self._schema.empty_table())
        self._waiting = []
        ids = np.concatenate(self.ids)
        if (ids[1:] < ids[:-1]).any():
            self._sort(np.argsort(ids, kind="stable"))

    def _put(self, table: pa.Table) -> None:
        self._write(f"part-{len(self.ids):05d}.parquet", table)
        self.ids.append(table.column("id").to_numpy())

    def _write(self, name: str, table: pa.Table) -> None:
        group = max(1, ROW_GROUP_BYTES // (4 * self._dimensions))
        with _writable(self._folder), written(self._filesystem, f"{self._folder}/{name}") as sink:
            pq.write_table(table, sink, row_group_size=group, compression="zstd", use_dictionary=False)

    def _sort(self, order: NDArray[np.int64]) -> None:
        """Write sorted files from the unsorted ones, each gathered from those that hold rows of it."""
        starts = np.cumsum([0, *(len(ids) for ids in self.ids)])
        unsorted = []
        for number in range(len(self.ids)):
            unsorted.append(f"{self._folder}/unsorted-{number:05d}.parquet")
            self._filesystem.move(f"{self._folder}/part-{number:05d}.parquet", unsorted[-1])
        self.ids = []
        for low in range(0, len(order), self._size):
            rows = order[low : low + self._size]
            source = np.searchsorted(starts, rows, side="right") - 1
            gathered = [self._take(unsorted[s], rows[source == s] - starts[s]) for s in np.unique(source)]
            table = pa.concat_tables(gathered)
            self._put(table.take(pc.sort_indices(table, sort_keys=[("id", "ascending")])))
        for file in unsorted:
            self._filesystem.delete_file(file)

    def _take(self, file: str, rows: NDArray[np.int64]) -> pa.Table:
        with self._filesystem.open_input_file(file) as source:
            return pq.read_table(source).replace_schema_metadata(self._schema.metadata).take(rows)


@contextlib.contextmanager
def _writable(out: str) -> Iterator[None]:
    try:
        yield
    except (OSError, pa.ArrowInvalid) as error:
        raise InputError(f"cannot write to {out} ({one_line(error)}): give another folder or URI") from error
