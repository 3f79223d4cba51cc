"""Finding the images in WebDataset tars, without reading them: `KEY.jpg` with its label in `KEY.cls`.

As in WebDataset, a key is everything up to the first dot of the last part of a member's name. Links, devices, absolute
names and names with `..` are refused, not followed. An image is read later from its place in the tar, in any order:
nothing is ever unpacked.
"""

from __future__ import annotations

import io
import tarfile
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

from pyarrow import fs as pafs

from jem.data.walk import IMAGES, readable_name, size_problem

if TYPE_CHECKING:
    from typing import IO

LABEL = ".cls"
LABEL_BYTES = 4096
BUFFER = 2**20


@dataclass(frozen=True)
class Member:
    """An image in a tar."""

    path: str
    """Its name in the tar."""
    offset: int
    """Where its bytes begin."""
    size: int
    """Bytes."""
    label: str | None = None
    problem: str | None = None


@dataclass
class Contents:
    """What a tar holds."""

    members: list[Member] = field(default_factory=list)
    ignored: Counter[str] = field(default_factory=Counter)
    """Members that are neither images nor labels, by extension."""


def list_tar(filesystem: pafs.FileSystem, path: str, size: int) -> Contents:
    """Read the headers (and the labels) of a tar of `size` bytes.

    A tar that ends early or is damaged gives the members before the damage, and one more with the problem.

    Raises:
        OSError: It cannot be opened.
    """
    contents = Contents()
    labels: dict[str, str] = {}
    images: list[tuple[str, Member]] = []
    taken: set[str] = set()
    with filesystem.open_input_file(path) as raw:
        # On a remote store each small read is a request; on a local disk a buffer would read what is skipped.
        file = raw if isinstance(filesystem, pafs.LocalFileSystem) else io.BufferedReader(raw, BUFFER)
        source = cast("IO[bytes]", _Headers(file))
        try:
            with tarfile.open(fileobj=source, mode="r:") as tar:
                at = -1
                while (info := tar.next()) is not None:
                    if tar.offset <= at:  # a negative size, which some versions of tarfile go round and round on
                        raise tarfile.ReadError(f"a header that leads back to byte {tar.offset}")
                    at = tar.offset
                    tar.members.clear()  # type: ignore[attr-defined]  # it would keep every header
                    key, ending = _split(info.name)
                    problem = _problem(info, size)
                    if ending == LABEL and problem is None:
                        labels[key] = _text(source, info)
                    elif ending in IMAGES and key not in taken:
                        taken.add(key)
                        name, unreadable = readable_name(info.name)
                        images.append((key, Member(name, info.offset_data, info.size, None, unreadable or problem)))
                    elif not info.isdir():
                        contents.ignored[ending] += 1
                source.seek(tar.offset)
                if any(source.read(tarfile.BLOCKSIZE)):  # tarfile takes a damaged header for the end
                    raise tarfile.ReadError(f"no header at byte {tar.offset}")
        except (tarfile.TarError, OSError, ValueError, OverflowError, EOFError, RecursionError) as error:
            images.append(("", Member("", 0, 0, None, f"damaged tar: {error}")))
    for key, member in images:
        label = labels.get(key)
        contents.members.append(Member(member.path, member.offset, member.size, label, member.problem))
    return contents


class _Headers:
    """A tar's headers, in small reads: a long name has the length that its header claims, which may be terabytes."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int) -> bytes:
        if not 0 <= size <= BUFFER:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return self._file.read(size)


def _split(name: str) -> tuple[str, str]:
    folder, _, last = name.rpartition("/")
    stem, dot, rest = last.partition(".")
    return f"{folder}/{stem}", (dot + rest).lower()


def _problem(info: tarfile.TarInfo, size: int) -> str | None:
    if info.issym() or info.islnk():
        return "a link in a tar"
    if not info.isreg() or info.issparse():
        return "not a regular file"
    if info.name.startswith("/") or ".." in info.name.split("/"):
        return "name leaves the tar"
    if info.offset_data + info.size > size:
        return "truncated tar"
    return size_problem(info.size)


def _text(source: IO[bytes], info: tarfile.TarInfo) -> str:
    source.seek(info.offset_data)
    return source.read(min(info.size, LABEL_BYTES)).decode("utf-8", "replace").strip()
