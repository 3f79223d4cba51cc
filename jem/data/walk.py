"""Finding the files of a folder, local or remote, with what is wrong with them."""

from __future__ import annotations

import os
import posixpath
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pyarrow import fs as pafs

if TYPE_CHECKING:
    from collections.abc import Iterator

IMAGES = frozenset({
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".dib", ".tif", ".tiff",
    ".jp2", ".j2k", ".jpx", ".avif", ".heic", ".heif", ".ppm", ".pgm", ".pbm",
})  # fmt: skip
"""Extensions of images; some may still be undecodable, which then is seen and counted."""

BYTES_LIMIT = 2**30
"""Larger files are no images that fit the memory of a worker."""

_MTIME_UNKNOWN = 0


@dataclass(frozen=True, order=True)
class File:
    """A file that was found, with the reason for which it cannot be read, if one is known already."""

    path: str
    """Relative to the folder, with `/`."""
    size: int
    """Bytes."""
    mtime: int
    """Nanoseconds; 0 if unknown."""
    problem: str | None = None


def extension(path: str) -> str:
    """Lower-case extension with its dot, "" if there is none."""
    return posixpath.splitext(path)[1].lower()


def walk(filesystem: pafs.FileSystem, base: str) -> list[File]:
    """Find all files below a folder, sorted by path; hidden ones (and `__MACOSX`) are left out.

    A problem is noted only for what counts as an image (by its extension), and for a folder that cannot be read.

    Raises:
        OSError: The folder itself cannot be read.
    """
    if isinstance(filesystem, pafs.LocalFileSystem):
        return sorted(_local(base, "", ()))
    return sorted(_remote(filesystem, base))


def _hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def _local(folder: str, prefix: str, above: tuple[tuple[int, int], ...]) -> Iterator[File]:
    """Arrow's own listing would follow a link to a folder above for ever, and does not say what is wrong."""
    here = Path(folder).stat()
    above = (*above, (here.st_dev, here.st_ino))
    with os.scandir(folder) as found:
        entries = [entry for entry in found if not _hidden(entry.name)]
    for entry in entries:
        name, problem = readable_name(prefix + entry.name)
        is_image = extension(name) in IMAGES
        try:
            about = entry.stat()
        except OSError as error:
            if is_image:
                problem = problem or ("link to nothing" if entry.is_symlink() else f"unreadable: {error.strerror}")
            yield File(name, 0, _MTIME_UNKNOWN, problem if is_image else None)
            continue
        if stat.S_ISDIR(about.st_mode):
            if is_image or problem:
                yield File(name, 0, about.st_mtime_ns, problem or "folder in place of a file")
            elif (about.st_dev, about.st_ino) in above:
                yield File(name, 0, about.st_mtime_ns, "a link to a folder above it")
            else:
                try:
                    yield from _local(entry.path, f"{name}/", above)
                except OSError as error:
                    yield File(name, 0, about.st_mtime_ns, f"unreadable folder: {error.strerror}")
            continue
        if is_image:
            # A pipe would be waited on for ever.
            special = None if stat.S_ISREG(about.st_mode) else "not a regular file"
            problem = problem or special or size_problem(about.st_size)
        yield File(name, about.st_size, about.st_mtime_ns, problem if is_image else None)


def readable_name(name: str) -> tuple[str, str | None]:
    """A name that can be stored and shown, and a problem if it is not the file's own name."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return os.fsencode(name).decode(errors="backslashreplace"), "name is not UTF-8"
    return name, None


def size_problem(size: int) -> str | None:
    """What keeps a file of so many bytes from being read."""
    if size == 0:
        return "empty file"
    return f"too large: {size} bytes" if size > BYTES_LIMIT else None


def _remote(filesystem: pafs.FileSystem, base: str) -> Iterator[File]:
    for info in filesystem.get_file_info(pafs.FileSelector(base, recursive=True)):
        path = posixpath.relpath(info.path, base)
        *folders, name = path.split("/")
        if any(_hidden(part) or extension(part) in IMAGES for part in folders) or _hidden(name):
            continue
        is_image = extension(name) in IMAGES
        if info.is_file or is_image:
            yield File(path, info.size or 0, info.mtime_ns or 0, info_problem(info) if is_image else None)


def info_problem(info: pafs.FileInfo) -> str | None:
    """What is wrong with a file that should be an image, as far as its file system knows."""
    if info.type == pafs.FileType.NotFound:
        return "no such file"
    if info.type == pafs.FileType.Directory:
        return "folder in place of a file"
    if info.type != pafs.FileType.File:
        return "not a regular file"
    return size_problem(info.size or 0)
