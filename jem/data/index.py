"""The index of a data set: which rows are where, from the footers of its Parquet shards.

Read once, in parallel, and cached; small arrays, so that it can be sent to every task.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import tempfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs as pafs

from jem.credentials import without_credentials
from jem.data.storage import FINISHED, UNFINISHED, absolute, one_line, resolve
from jem.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray

FOOTER_THREADS = 16
CACHE_VERSION = 2
ROW_GROUP_LIMIT = 512 * 10**6
"""Bytes of images in a row group, uncompressed: a decode task holds all of one, about two times over.

What the footer declares is looked at, before anything is read."""
SPLIT_NAME = re.compile(r"(train|test|validation|valid|val|dev)\b", re.IGNORECASE)


@dataclass(frozen=True, eq=False)
class Index:
    """A data set of R row groups in F files, in the order of the files' names.

    A row's *position*, 0 ... len(index) - 1, counts rows in this order.
    """

    uri: str
    """What was opened, absolute."""
    files: tuple[str, ...]
    """Paths in the file system `filesystem()`."""
    file: NDArray[np.int32]
    """(R,) which file."""
    row_group: NDArray[np.int32]
    """(R,) which row group of that file."""
    rows: NDArray[np.int64]
    """(R,) how many of its rows are used."""
    start: NDArray[np.int64]
    """(R,) position of its first row."""
    bytes: NDArray[np.int64]
    """(R,) size of its images in the file."""
    image_column: str
    label_column: str | None
    """An integer column, or None."""
    has_id: bool
    """Whether there is a column `id`; without one, ids are positions."""
    classes: tuple[str, ...] | None
    """Names of the labels 0 ... C - 1, where the schema has them."""

    def __len__(self) -> int:
        return int(self.rows.sum())

    def filesystem(self) -> pafs.FileSystem:
        """The file system that `files` are in."""
        return resolve(self.uri)[0]


def open_index(data: str | Sequence[str], limit: int | None = None, row_group_limit: float = ROW_GROUP_LIMIT) -> Index:
    """Index a data set.

    Args:
        data: Folder, file or glob of Parquet shards, local or a URI that `pyarrow.fs` or fsspec opens; or a list of
            files, in which each entry counts, duplicates too.
        limit: Use only the first so many rows.
        row_group_limit: Bytes of images in a row group, uncompressed, at most.

    Raises:
        InputError: No such data, no Parquet in it, more than one split in it, no rows, no images, a corrupt shard, a
            row group that is too large, a column of another type than the first shard's.
    """
    if not data:
        raise InputError("the list of shards is empty: give a folder, a file or a glob of Parquet shards")
    uri = data if isinstance(data, str) else data[0]
    filesystem, _ = resolve(uri)
    try:
        infos = _shards(filesystem, data)
        uri = absolute(uri)
        cache = _cache_file(uri, infos, row_group_limit)
        index = _read_cache(cache, uri)
        if index is None:
            index = _build(filesystem, uri, infos, row_group_limit)
            _write_cache(cache, index)
    except OSError as error:
        raise InputError(f"cannot read {uri}: {one_line(error)}; check the path and the permissions") from error
    if len(index) == 0:
        raise InputError(f"{uri} has no rows: give a data set with images")
    return index if limit is None else _first(index, limit)


# --- which files ------------------------------------------------------------------------------------------------------


def _shards(filesystem: pafs.FileSystem, data: str | Sequence[str]) -> list[pafs.FileInfo]:
    if not isinstance(data, str):
        return [info for item in data for info in _one_file(filesystem, item)]
    path = resolve(data)[1]
    info = filesystem.get_file_info(path)
    if info.type == pafs.FileType.File:
        return [info]
    if info.type == pafs.FileType.Directory:
        return _in_folder(filesystem, data, path)
    if any(mark in path for mark in "*?["):
        return _matching(filesystem, data, path)
    raise InputError(f'no data at {data}: give a folder of Parquet shards, or make one with "jem ingest"')


def _one_file(filesystem: pafs.FileSystem, item: str) -> list[pafs.FileInfo]:
    info = filesystem.get_file_info(resolve(item)[1])
    if info.type != pafs.FileType.File:
        raise InputError(f"no file {item}: a list of shards must name Parquet files")
    return [info]


def _visible(path: str, base: str) -> bool:
    parts = PurePosixPath(path[len(base) :].lstrip("/")).parts
    return not any(part.startswith(("_", ".")) for part in parts)


def _parquet(infos: Iterable[pafs.FileInfo], base: str) -> list[pafs.FileInfo]:
    found = [info for info in infos if info.type == pafs.FileType.File and info.extension == "parquet"]
    return sorted((info for info in found if _visible(info.path, base)), key=lambda info: str(info.path))


def _in_folder(filesystem: pafs.FileSystem, data: str, path: str) -> list[pafs.FileInfo]:
    entries = filesystem.get_file_info(pafs.FileSelector(path))
    names = {entry.base_name for entry in entries}
    if UNFINISHED in names and FINISHED not in names:
        raise InputError(f'{data} is not finished: repeat the "jem ingest" that was interrupted, it goes on from there')
    found = _parquet(entries, path)
    if not found:
        below = _parquet(filesystem.get_file_info(pafs.FileSelector(path, recursive=True)), path)
        if below:
            folders = sorted({str(PurePosixPath(info.path).parent.relative_to(path)) for info in below})
            some = ", ".join(f"{data.rstrip('/')}/{folder}" for folder in folders[:4])
            raise InputError(f"{data} holds no Parquet files itself, but its folders do: give one of them ({some})")
        if not [entry for entry in entries if _visible(entry.path, path)]:
            raise InputError(f'{data} is empty: give a folder of Parquet shards, or make one with "jem ingest"')
        raise InputError(f'{data} has no Parquet files: make a data set of it with "jem ingest {data} DEST"')
    splits = {match[1].lower() for info in found if (match := SPLIT_NAME.match(info.base_name))}
    if len(splits) > 1:
        globs = " or ".join(f"'{data.rstrip('/')}/{split}-*.parquet'" for split in sorted(splits))
        raise InputError(f"{data} mixes the splits {', '.join(sorted(splits))}: give one of them, {globs}")
    return found


def _matching(filesystem: pafs.FileSystem, data: str, path: str) -> list[pafs.FileInfo]:
    parts = PurePosixPath(path).parts
    fixed = next(number for number, part in enumerate(parts) if any(mark in part for mark in "*?["))
    base = str(PurePosixPath(*parts[:fixed]))
    deep = len(parts) - fixed > 1
    found = filesystem.get_file_info(pafs.FileSelector(base, recursive=deep, allow_not_found=True))
    shards = [info for info in _parquet(found, base) if PurePosixPath(info.path).match(path)]
    if not shards:
        raise InputError(f"no Parquet files match {data}: check the pattern")
    return shards


# --- footers ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Footer:
    schema: pa.Schema
    rows: list[int]
    bytes: list[int]
    largest: dict[str, tuple[int, int]]
    """Of each column of images: uncompressed bytes and number of the largest row group."""


def _build(filesystem: pafs.FileSystem, uri: str, infos: list[pafs.FileInfo], row_group_limit: float) -> Index:
    paths = [str(info.path) for info in infos]
    different = list(dict.fromkeys(paths))
    with ThreadPoolExecutor(FOOTER_THREADS) as pool:
        footers = dict(zip(different, pool.map(lambda path: _footer(filesystem, path), different), strict=True))
    schema = footers[paths[0]].schema
    image = _image_column(schema, paths[0])
    label, classes = _labels(schema)
    has_id = _is_integer(schema, "id")
    numbers = [*([label] if label else []), *(["id"] if has_id else [])]
    for path in different:
        check_columns(footers[path].schema, path, image, numbers)
        _check_size(path, *footers[path].largest.get(image, (0, 0)), row_group_limit)
    counts = [len(footers[path].rows) for path in paths]
    rows = np.array([count for path in paths for count in footers[path].rows], np.int64)
    return Index(
        uri=uri,
        files=tuple(paths),
        file=np.repeat(np.arange(len(paths), dtype=np.int32), counts),
        row_group=np.concatenate([np.arange(count, dtype=np.int32) for count in counts]),
        rows=rows,
        start=np.cumsum(rows) - rows,
        bytes=np.array([size for path in paths for size in footers[path].bytes], np.int64),
        image_column=image,
        label_column=label,
        has_id=has_id,
        classes=classes,
    )


def _footer(filesystem: pafs.FileSystem, path: str) -> _Footer:
    try:
        with filesystem.open_input_file(path) as source:
            parquet = pq.ParquetFile(source)
            groups = [parquet.metadata.row_group(number) for number in range(parquet.num_row_groups)]
            sizes = [sum(group.column(c).total_compressed_size for c in range(group.num_columns)) for group in groups]
            schema = parquet.schema_arrow
            images = [field.name for field in schema if _holds_images(field.type)]
            largest = {
                name: max(((_uncompressed(group, name), number) for number, group in enumerate(groups)), default=(0, 0))
                for name in images
            }
            return _Footer(schema, [group.num_rows for group in groups], sizes, largest)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path} is not a readable Parquet file ({one_line(error)}): repair or remove it") from error


def _uncompressed(group: Any, name: str) -> int:
    """Bytes of a column of a row group: what its footer says, or what lies in the file if that is more."""
    chunks = [group.column(number) for number in range(group.num_columns)]
    own = [chunk for chunk in chunks if f"{chunk.path_in_schema}.".startswith(f"{name}.")]
    return sum(max(chunk.total_uncompressed_size, chunk.total_compressed_size) for chunk in own)


def _check_size(path: str, size: int, group: int, limit: float) -> None:
    if size > limit:
        raise InputError(
            f"row group {group} of {path} holds {size / 1e6:,.0f} MB of images, more than {limit / 1e6:,.0f} MB, and is"
            ' read as a whole: write it with smaller row groups, or let "jem ingest" do that (--max_row_group_mb)'
        )


def _holds_images(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        number = kind.get_field_index("bytes")
        return number >= 0 and _is_binary(kind.field(number).type)
    return _is_binary(kind)


def _is_binary(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _is_text(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind))


def _image_column(schema: pa.Schema, path: str) -> str:
    candidates = [field.name for field in schema if _holds_images(field.type)]
    if "image" in candidates:
        return "image"
    if len(candidates) == 1:
        return str(candidates[0])
    columns = ", ".join(schema.names)
    what = f"{len(candidates)} columns that may be images" if candidates else "no image column"
    raise InputError(
        f"{path} has {what}; its columns are {columns}: name one of type binary or struct<bytes, path> 'image'"
    )


def _is_integer(schema: pa.Schema, name: str) -> bool:
    number = schema.get_field_index(name)
    return number >= 0 and bool(pa.types.is_integer(schema.field(number).type))


def _labels(schema: pa.Schema) -> tuple[str | None, tuple[str, ...] | None]:
    """The column `label`, or else the only one that the Hugging Face metadata calls a class label."""
    features: dict[str, Any] = {}
    with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
        features = dict(json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"])
    labels = [
        name
        for name, feature in features.items()
        if isinstance(feature, dict) and isinstance(feature.get("names"), list)
    ]
    labels = [name for name in labels if _is_integer(schema, name)]
    column = "label" if _is_integer(schema, "label") else labels[0] if len(labels) == 1 else None
    names = features[column]["names"] if column in labels else None
    return column, tuple(map(str, names)) if names else None


def check_columns(schema: pa.Schema, path: str, image: str, numbers: list[str]) -> None:
    """Refuse a shard without these columns, or with others than plain ones.

    Arrow makes objects of registered extension types when a value is looked at; Ray registers one that unpickles.

    Raises:
        InputError: With the column.
    """
    missing = [name for name in [image, *numbers] if name not in schema.names]
    if missing:
        raise InputError(f"{path} has no column {', '.join(missing)}, as others have: give shards of one data set")
    kind = schema.field(image).type
    odd = {} if _holds_images(kind) else {image: kind}
    odd |= {name: schema.field(name).type for name in numbers if not _is_integer(schema, name)}
    number = kind.get_field_index("path") if pa.types.is_struct(kind) else -1
    if number >= 0 and not _is_text(kind.field(number).type):
        odd[f"{image}.path"] = kind.field(number).type
    for name, other in odd.items():
        raise InputError(
            f"{path}: column {name} is of type {other}, which is not read here: images are binary or "
            "struct<bytes, path: string>, labels and ids integers"
        )


def _first(index: Index, limit: int) -> Index:
    if limit < 1:
        raise InputError(f"limit must be at least 1, not {limit}")
    if limit >= len(index):
        return index
    groups = int(np.searchsorted(index.start, limit, side="left"))
    rows = index.rows[:groups].copy()
    rows[-1] = limit - index.start[groups - 1]
    arrays = {name: getattr(index, name)[:groups] for name in ("file", "row_group", "start", "bytes")}
    others = ("uri", "files", "image_column", "label_column", "has_id", "classes")
    return Index(rows=rows, **arrays, **{name: getattr(index, name) for name in others})


# --- cache ------------------------------------------------------------------------------------------------------------


def _cache_file(uri: str, infos: list[pafs.FileInfo], row_group_limit: float) -> Path:
    what = [CACHE_VERSION, uri, row_group_limit, [[info.path, info.size, info.mtime_ns] for info in infos]]
    key = hashlib.sha256(json.dumps(what).encode()).hexdigest()
    root = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return root / "jem" / "index" / f"{key[:32]}.npz"


def _read_cache(path: Path, uri: str) -> Index | None:
    try:
        with np.load(path, allow_pickle=False) as stored:
            head = json.loads(str(stored["head"]))
            arrays = {name: stored[name] for name in ("row_group", "rows", "start", "bytes")}
            shard = stored["shard"]
        classes = tuple(head["classes"]) if head["classes"] is not None else None
        return Index(
            uri=uri,
            files=tuple(head["files"]),
            file=shard,
            image_column=head["image_column"],
            label_column=head["label_column"],
            has_id=head["has_id"],
            classes=classes,
            **arrays,
        )
    except (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile):  # absent or damaged: only a cache
        return None


def _write_cache(path: Path, index: Index) -> None:
    names = ("files", "image_column", "label_column", "has_id", "classes")
    head = json.dumps({name: getattr(index, name) for name in names})
    if head != without_credentials(head):  # of files behind signed addresses
        return
    with contextlib.suppress(OSError):  # a home that cannot be written costs time, nothing else
        path.parent.mkdir(parents=True, exist_ok=True)
        number, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
        try:
            with os.fdopen(number, "wb") as file:
                np.savez(
                    file,
                    head=np.array(head),
                    shard=index.file,
                    row_group=index.row_group,
                    rows=index.rows,
                    start=index.start,
                    bytes=index.bytes,
                )
            Path(temporary).replace(path)
        except BaseException:
            Path(temporary).unlink()
            raise
