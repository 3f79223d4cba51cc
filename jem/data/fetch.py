"""Reading the encoded images that a source lists."""

from __future__ import annotations

import errno
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs as pafs

from jem.data.index import check_columns
from jem.data.storage import one_line, resolve
from jem.data.walk import BYTES_LIMIT, size_problem
from jem.errors import InputError, RunError

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np

    from jem.data.sources import Source

THREADS = 8
AHEAD = 64
TRIES = 4
FILE_ERRORS = {
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
    errno.ENOENT: "no such file",
    errno.ENOTDIR: "no such file",
    errno.EISDIR: "folder in place of a file",
    errno.ELOOP: "a link in a circle",
    errno.ENAMETOOLONG: "name too long",
    errno.EINVAL: "not a readable file",
    errno.EIO: "read error",
}
"""What is the file's own fault; any other error (no memory, no connection) stops the job, which can then go on."""


@dataclass(frozen=True)
class Encoded:
    """One image of a source, or the reason for which it could not be read."""

    path: str
    data: bytes
    label: int | None
    size: int
    """Bytes that the source gives for it."""
    problem: str | None = None


def fetch(source: Source, entries: pa.Table, generator: np.random.Generator) -> Iterator[Encoded]:
    """Read the images of some entries (a table as `list_source` gives), several at a time.

    The order is that of the entries; the rows of Parquet's row groups are shuffled among each other by `generator`.

    Raises:
        RunError: The storage failed, not a single file.
    """
    filesystem, _ = resolve(source.uri)
    if source.kind == "parquet":
        yield from _rows(source, filesystem, entries, generator)
        return
    with ThreadPoolExecutor(THREADS) as pool:
        for batch in entries.to_batches(max_chunksize=AHEAD):
            yield from pool.map(lambda entry: _read(source, filesystem, entry), batch.to_pylist())


def _read(source: Source, filesystem: pafs.FileSystem, entry: dict[str, Any]) -> Encoded:
    path, size, label = entry["path"], entry["size"], entry["label"]
    member = (entry["offset"], size) if source.kind == "webdataset" else None
    for attempt in range(1, TRIES + 1):
        try:
            data = _bytes(filesystem, entry["file"], member)
            break
        except OSError as error:
            number = error.errno
            if isinstance(error, FileNotFoundError | PermissionError) and number is None:  # fsspec's, without a number
                number = errno.ENOENT if isinstance(error, FileNotFoundError) else errno.EACCES
            if number in FILE_ERRORS:
                return Encoded(path, b"", label, size, f"unreadable: {FILE_ERRORS[number]}")
            if isinstance(filesystem, pafs.LocalFileSystem) or attempt == TRIES:
                reason = f"{one_line(error)}; repeat the command to go on"
                raise RunError(f"cannot read {entry['file']}: {reason}") from error
            time.sleep(2.0**attempt)  # a remote store that is busy
    problem = size_problem(len(data))
    if member is not None and len(data) < size:
        problem = "truncated tar"
    return Encoded(path, data if problem is None else b"", label, len(data), problem)


def _bytes(filesystem: pafs.FileSystem, path: str, member: tuple[int, int] | None) -> bytes:
    if isinstance(filesystem, pafs.LocalFileSystem):
        with Path(path).open("rb") as local:
            if member is not None:
                local.seek(member[0])
            return local.read(member[1] if member is not None else BYTES_LIMIT + 1)
    with filesystem.open_input_file(path) as remote:
        if member is not None:
            remote.seek(member[0])
        data: bytes = remote.read(member[1] if member is not None else BYTES_LIMIT + 1)
        return data


def _rows(
    source: Source, filesystem: pafs.FileSystem, entries: pa.Table, generator: np.random.Generator
) -> Iterator[Encoded]:
    column, numbers = source.image_column, [source.label_column] if source.label_column else []
    tables, names = [], []
    for entry in entries.to_pylist():
        try:
            with filesystem.open_input_file(entry["file"]) as file:
                parquet = pq.ParquetFile(file)
                check_columns(parquet.schema_arrow, entry["file"], column, numbers)
                struct = pa.types.is_struct(parquet.schema_arrow.field(column).type)
                parts = [f"{column}.bytes", f"{column}.path"] if struct else [column]
                table = parquet.read_row_group(entry["offset"], columns=[*parts, *numbers])
        except (OSError, pa.ArrowException, InputError) as error:
            where = f"row group {entry['offset']} of {entry['file']}"
            raise RunError(f"cannot read {where} ({one_line(error)}): mend or remove that file") from error
        tables.append(table)
        names += [f"{entry['path']}/{entry['offset']}/{row}" for row in range(len(table))]
    everything = pa.concat_tables(tables)
    images = everything.column(column)
    labels = everything.column(source.label_column) if source.label_column else None
    for row in generator.permutation(len(names)):
        image = images[int(row)].as_py()
        label = labels[int(row)].as_py() if labels is not None else None
        path = names[row]
        if isinstance(image, dict):
            path, image = image.get("path") or path, image.get("bytes")
        data = image or b""
        problem = "no image in this row" if image is None else size_problem(len(data))
        yield Encoded(path, data if problem is None else b"", label, len(data), problem)
