"""What `jem ingest` can read: folders of images, lists, Hugging Face Parquet, WebDataset tars.

Listing finds every image, reading brings its bytes. Decisions, where several are usual:

- In folders a file is an image if its extension says so. Other files are left out and counted by extension; hidden
  files and folders (and `__MACOSX`) are left out. Links are followed, but not back up.
- Class folders: at least two folders and no image outside them. The class is the first folder of the path, however
  deep the image lies; classes are numbered in the order of their names. Images both in the root and in folders, and
  folders named like splits (`train`, `val`), are refused: there is no telling what was meant.
- One folder alone, or more than 100 with fewer than two images each on average, are no classes: a set of
  150,000 patients is not 150,000 classes. It is read as flat, without labels; `--format classes` overrules that.
- A list is CSV (header with `path` and perhaps `label`) or JSON lines (keys alike). Paths are relative to its folder,
  or begin with it, and do not leave it. Labels that are all integers stay as they are, otherwise they are names,
  numbered in order.
- Bad entries of a source (links to nothing, folders named `.jpg`, paths that leave the folder) are listed with their
  problem, for the quarantine.
"""

from __future__ import annotations

import fnmatch
import posixpath
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import repeat
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from pyarrow import fs as pafs

from jem.data.index import ROW_GROUP_LIMIT, open_index
from jem.data.lists import LISTS, number_labels, read_list
from jem.data.storage import absolute, one_line, resolve
from jem.data.tars import list_tar
from jem.data.walk import IMAGES, File, extension, walk
from jem.errors import InputError

Kind = Literal["classes", "flat", "list", "parquet", "webdataset"]

ENTRIES = pa.schema(
    [
        ("path", pa.string()),  # relative to the source; in a tar: the tar's, then the member's
        ("file", pa.string()),  # what is opened, a path in the source's file system
        ("offset", pa.int64()),  # tar: where the image begins, bytes; Parquet: number of the row group
        ("size", pa.int64()),  # encoded bytes
        ("rows", pa.int64()),  # images: 1, but for Parquet's row groups
        ("label", pa.int64()),
        ("mtime", pa.int64()),  # ns, of `file`
        ("problem", pa.string()),  # why it cannot be read; null if nothing is known against it
    ]
)
"""One entry per image, or per row group of a Parquet source."""

PACKED = (".zip", ".gz", ".tgz", ".zst", ".xz", ".bz2", ".7z", ".rar")
SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing", "dev"}
MANY_FOLDERS = 100
TAR_THREADS = 16


@dataclass(frozen=True)
class Source:
    """A source as it was listed; small, to be sent to every task."""

    kind: Kind
    uri: str
    classes: tuple[str, ...] | None = None
    """Names of the labels, where they have names."""
    labelled: bool = False
    image_column: str = "image"
    """Of a Parquet source."""
    label_column: str | None = None
    """Of a Parquet source."""
    ignored: dict[str, int] = field(default_factory=dict)
    """Files that are no images, counted by extension."""


def list_source(
    source: str, kind: Kind | Literal["auto"] = "auto", row_group_limit: float = ROW_GROUP_LIMIT
) -> tuple[Source, pa.Table]:
    """Recognise a source and list what it holds; a Parquet source's row groups are limited as `open_index` does.

    Returns:
        The source; and a table with the schema `ENTRIES`, in the order of paths (of lines for a list).

    Raises:
        InputError: No such source, nothing that is an image in it, or no telling what it is.
    """
    uri = absolute(source)
    filesystem, path = resolve(uri)
    try:
        found = filesystem.get_file_info(path).type
        if kind == "auto" and found != pafs.FileType.Directory:
            kind = _kind_of_file(source, path, exists=found == pafs.FileType.File)
        if kind == "parquet":
            return _list_parquet(uri, row_group_limit)
        if found == pafs.FileType.NotFound and not (kind == "webdataset" and _is_glob(path)):
            raise InputError(f"no source at {source}: give a folder of images, a list, Parquet or tars")
        if kind == "list":
            return _list_list(filesystem, uri, path)
        if found != pafs.FileType.Directory:
            return _list_tars(filesystem, uri, "", _tars_at(filesystem, path))
        files = walk(filesystem, path)
        if kind == "auto":
            kind = _kind_of_folder(source, files)
        if kind == "parquet":
            return _list_parquet(uri, row_group_limit)
        if kind == "webdataset":
            return _list_tars(filesystem, uri, path, [file for file in files if extension(file.path) == ".tar"])
        return _list_folder(uri, path, files, kind)
    except OSError as error:
        raise InputError(f"cannot read {source}: {one_line(error)}; check the path and the permissions") from error


# --- what is it -------------------------------------------------------------------------------------------------------


def _is_glob(path: str) -> bool:
    return any(mark in path for mark in "*?[")


def _kind_of_file(source: str, path: str, exists: bool) -> Kind:
    ending = extension(path)
    if exists or _is_glob(path):
        if ending == ".parquet" or (not exists and ending != ".tar"):
            return "parquet"
        if ending == ".tar":
            return "webdataset"
    if not exists:
        raise InputError(f"no source at {source}: give a folder of images, a list, Parquet or tars")
    if ending in LISTS:
        return "list"
    if ending in PACKED:
        raise InputError(f"{source} is packed: unpack it and give the folder (plain .tar is read as it is)")
    raise InputError(f"{source} is no folder, list (.csv, .jsonl), .parquet or .tar: give one of these")


def _kind_of_folder(source: str, files: list[File]) -> Kind:
    endings = Counter(extension(file.path) for file in files)
    images = [file for file in files if _is_image(file)]
    families = {"images": len(images), ".parquet files": endings[".parquet"], ".tar files": endings[".tar"]}
    held = {name: count for name, count in families.items() if count}
    if len(held) > 1:
        what = " and ".join(f"{count} {name}" for name, count in held.items())
        raise InputError(
            f"{source} holds {what}: say which to read, with --format flat, classes, parquet or webdataset"
        )
    if not held:
        others = ", ".join(f"{count} {ending or 'without extension'}" for ending, count in endings.most_common(5))
        packed = " (unpack archives first)" if any(ending in PACKED for ending in endings) else ""
        raise InputError(f"{source} has no images: it holds {others or 'no files'}{packed}; give a folder with images")
    if not images:
        return "parquet" if endings[".parquet"] else "webdataset"
    return _kind_of_images(source, images)


def _kind_of_images(source: str, images: list[File]) -> Kind:
    # Entries that are bad anyway must not decide: a link to nothing in the root does not make class folders ambiguous.
    good = [file for file in images if file.problem is None] or images
    folders = Counter(_class(file) for file in good if _class(file))
    inside = sum(folders.values())
    if not folders:
        return "flat"
    splits = sorted(name for name in folders if name.lower() in SPLITS)
    if splits:
        raise InputError(
            f"{source} has folders named like splits ({', '.join(splits)}): give one of them, such as "
            f"{source.rstrip('/')}/{splits[0]}, or say --format classes or flat"
        )
    if inside < len(good):
        raise InputError(
            f"{source} holds {len(good) - inside} images itself and {inside} in {len(folders)} folders: say "
            "--format flat (all, without labels) or --format classes (only those in folders)"
        )
    if len(folders) == 1 or (len(folders) > MANY_FOLDERS and inside < 2 * len(folders)):
        return "flat"
    return "classes"


# --- listing ----------------------------------------------------------------------------------------------------------


def _list_folder(uri: str, base: str, files: list[File], kind: Kind) -> tuple[Source, pa.Table]:
    images = [file for file in files if _is_image(file)]
    if not images:
        raise InputError(f"{uri} has no images: give a folder with images, or leave --format out")
    ignored = dict(Counter(extension(file.path) for file in files if not _is_image(file)))
    if kind == "flat":
        return Source(kind, uri, ignored=ignored), _entries(base, images)
    names = sorted({_class(file) for file in images if file.problem is None} - {""})
    if not names:
        raise InputError(f"{uri} has no class folders: say --format flat")
    images = [
        replace(file, problem=file.problem or (None if _class(file) else "lies in no class folder")) for file in images
    ]
    number = {name: label for label, name in enumerate(names)}
    labels = [number.get(_class(file)) for file in images]
    source = Source("classes", uri, classes=tuple(names), labelled=True, ignored=ignored)
    return source, _entries(base, images, labels)


def _is_image(file: File) -> bool:
    return file.problem is not None or extension(file.path) in IMAGES


def _class(file: File) -> str:
    return file.path.split("/")[0] if "/" in file.path else ""


def _entries(base: str, files: list[File], labels: list[int | None] | None = None) -> pa.Table:
    count = len(files)
    columns: dict[str, Any] = {
        "path": [file.path for file in files],
        "file": [posixpath.join(base, file.path) for file in files],
        "offset": np.zeros(count, np.int64),
        "size": [file.size for file in files],
        "rows": np.ones(count, np.int64),
        "label": labels if labels is not None else pa.nulls(count, pa.int64()),
        "mtime": [file.mtime for file in files],
        "problem": [file.problem for file in files],
    }
    return _table(columns)


def _list_list(filesystem: pafs.FileSystem, uri: str, path: str) -> tuple[Source, pa.Table]:
    files, labels = read_list(filesystem, uri, path)
    numbers, classes = number_labels(labels)
    source = Source("list", uri, classes=classes, labelled=numbers is not None)
    return source, _entries(posixpath.dirname(path), files, numbers)


def _list_parquet(uri: str, row_group_limit: float) -> tuple[Source, pa.Table]:
    index = open_index(uri, row_group_limit=row_group_limit)
    infos = {info.path: info for info in index.filesystem().get_file_info(list(dict.fromkeys(index.files)))}
    files = [index.files[number] for number in index.file]
    base = posixpath.commonpath([posixpath.dirname(file) for file in files])
    columns: dict[str, Any] = {
        "path": [posixpath.relpath(file, base) for file in files],
        "file": files,
        "offset": index.row_group,
        "size": index.bytes,
        "rows": index.rows,
        "label": pa.nulls(len(files), pa.int64()),
        "mtime": [infos[file].mtime_ns or 0 for file in files],
        "problem": pa.nulls(len(files), pa.string()),
    }
    source = Source(
        "parquet",
        uri,
        classes=index.classes,
        labelled=index.label_column is not None,
        image_column=index.image_column,
        label_column=index.label_column,
    )
    return source, _table(columns)


def _tars_at(filesystem: pafs.FileSystem, path: str) -> list[File]:
    """The tar of this path, or those in its folder that match it as a pattern."""
    if _is_glob(path):
        folder, pattern = posixpath.split(path)
        near = filesystem.get_file_info(pafs.FileSelector(folder, allow_not_found=True))
        infos = [info for info in near if info.is_file and fnmatch.fnmatchcase(info.base_name, pattern)]
    else:
        infos = [filesystem.get_file_info(path)]
    return sorted(File(info.path, info.size or 0, info.mtime_ns or 0) for info in infos)


def _list_tars(filesystem: pafs.FileSystem, uri: str, base: str, tars: list[File]) -> tuple[Source, pa.Table]:
    paths = [posixpath.join(base, tar.path) for tar in tars]
    with ThreadPoolExecutor(TAR_THREADS) as pool:
        found = list(pool.map(list_tar, repeat(filesystem), paths, [tar.size for tar in tars]))
    members = [
        (tar, path, member) for tar, path, held in zip(tars, paths, found, strict=True) for member in held.members
    ]
    ignored = sum((held.ignored for held in found), Counter[str]())
    if not members:
        others = ", ".join(f"{count} {ending or 'without extension'}" for ending, count in ignored.most_common(5))
        raise InputError(
            f"{uri} has no tars with images (it holds {others or 'nothing'}): name members KEY.jpg, KEY.cls"
        )
    labels, classes = number_labels([member.label for _, _, member in members])
    count = len(members)
    columns: dict[str, Any] = {
        "path": [posixpath.join(posixpath.basename(tar.path), member.path.lstrip("/")) for tar, _, member in members],
        "file": [path for _, path, _ in members],
        "offset": [member.offset for _, _, member in members],
        "size": [member.size for _, _, member in members],
        "rows": np.ones(count, np.int64),
        "label": labels if labels is not None else pa.nulls(count, pa.int64()),
        "mtime": [tar.mtime for tar, _, _ in members],
        "problem": [member.problem for _, _, member in members],
    }
    return Source("webdataset", uri, classes, labels is not None, ignored=dict(ignored)), _table(columns)


def _table(columns: dict[str, Any]) -> pa.Table:
    arrays = [pa.array(columns[name], type=kind) for name, kind in zip(ENTRIES.names, ENTRIES.types, strict=True)]
    return pa.table(arrays, schema=ENTRIES)
