"""Lists of images with labels: CSV with a header, or JSON lines."""

from __future__ import annotations

import csv
import io
import json
import posixpath
from typing import TYPE_CHECKING

from jem.credentials import without_credentials
from jem.data.storage import one_line
from jem.data.walk import File, extension, info_problem
from jem.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from pyarrow import fs as pafs

LISTS = (".csv", ".jsonl", ".ndjson")
Label = int | str | None
OUTSIDE = "path leaves the list's folder (put the list into a folder that holds all its images)"


def read_list(filesystem: pafs.FileSystem, uri: str, path: str) -> tuple[list[File], list[Label]]:
    """Read a list and look up its images; what is not there, or lies outside the list's folder, gets a problem.

    A path may begin with the list's folder, as absolute paths and URIs do; any other one that is absolute is outside.

    Returns:
        The files, by their paths in the list's folder, and their labels, in the list's order.

    Raises:
        InputError: It is not a list with a column `path`; the message names the line.
    """
    with filesystem.open_input_stream(path) as stream:
        try:
            text = stream.read().decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise InputError(f"{uri} is not UTF-8 text ({one_line(error)}): save the list as UTF-8") from error
    rows = list(_csv_rows(uri, text) if extension(path) == ".csv" else _json_rows(uri, text))
    if not rows:
        raise InputError(f"{uri} lists no images: give a list with at least one line")
    own = posixpath.dirname(uri)
    own = own if "://" in own else posixpath.normpath(own)
    given = [name.removeprefix(f"{own}/") for name, _ in rows]
    names = [posixpath.normpath(name) for name in given]
    leaves = [
        posixpath.isabs(name) or "://" in raw or name.split("/")[0] == ".." or "\0" in name
        for name, raw in zip(names, given, strict=True)
    ]
    base = posixpath.dirname(path)
    inside = [posixpath.join(base, name) for name, out in zip(names, leaves, strict=True) if not out]
    infos = iter(filesystem.get_file_info(inside))
    files = []
    for name, raw, out in zip(names, given, leaves, strict=True):
        if out:
            files.append(File(without_credentials(raw), 0, 0, OUTSIDE))
        else:
            info = next(infos)
            files.append(File(name, info.size or 0, info.mtime_ns or 0, info_problem(info)))
    return files, [label for _, label in rows]


def _csv_rows(uri: str, text: str) -> Iterable[tuple[str, Label]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), skipinitialspace=True)
    if "path" not in (reader.fieldnames or ()):
        columns = ", ".join(reader.fieldnames or ()) or "none"
        raise InputError(f"{uri} has no column path; its columns are {columns}: name the column of image paths 'path'")
    try:
        for row in reader:
            if not row["path"]:
                raise InputError(f"{uri}, line {reader.line_num}: no path; give one, or remove the line")
            yield row["path"], row.get("label") or None
    except csv.Error as error:
        raise InputError(f"{uri}, line {reader.line_num}: {one_line(error)}; mend the list") from error


def _json_rows(uri: str, text: str) -> Iterable[tuple[str, Label]]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{uri}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{where} is not JSON ({one_line(error)}): mend the list") from error
        if not isinstance(row, dict) or not isinstance(row.get("path"), str) or not row["path"]:
            raise InputError(f'{where} has no path: write objects such as {{"path": "a.jpg", "label": "cat"}}')
        label = row.get("label")
        if label is not None and (isinstance(label, bool) or not isinstance(label, int | str)):
            raise InputError(f"{where}: label {label!r} is neither a name nor an integer: use one of these")
        try:
            f"{row['path']}{label}".encode()
        except UnicodeEncodeError as error:
            raise InputError(f"{where} is not valid text ({one_line(error)}): mend the list") from error
        yield row["path"], label


def number_labels(labels: Sequence[Label]) -> tuple[list[int | None] | None, tuple[str, ...] | None]:
    """Number the labels (None if there are none); with the names in order, where they are not all integers."""
    given = {label for label in labels if label is not None}
    if not given:
        return None, None
    try:
        integers = {label: int(label) for label in given}
    except ValueError:
        integers = {}
    if not integers or max(map(abs, integers.values())) >= 2**63:
        names = sorted({str(label) for label in given})
        number = {name: place for place, name in enumerate(names)}
        return [None if label is None else number[str(label)] for label in labels], tuple(names)
    return [None if label is None else integers[label] for label in labels], None
