"""Where files are (a local path, or a URI that Arrow or fsspec opens), and writing them so that none is half there."""

from __future__ import annotations

import contextlib
import uuid
from pathlib import Path
from typing import IO, TYPE_CHECKING

import fsspec.core
import pyarrow as pa
from pyarrow import fs as pafs

from jem.credentials import without_credentials
from jem.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator

UNFINISHED = "_unfinished"
"""Folder in a data set's folder where an ingest keeps its work; readers leave out names with an underscore."""
FINISHED = "_jem.json"
"""File that an ingest writes last."""


def absolute(uri: str) -> str:
    """Make a local path absolute (workers have another working directory); a URI stays as it is."""
    return uri if "://" in uri else str(Path(uri).expanduser().absolute())


def folder_uri(uri: str) -> str:
    """The absolute path, or the URI, of a folder that is to be written in.

    Raises:
        InputError: A URI with options, which would come before the names of the files in it.
    """
    if "://" in uri and "?" in uri:
        raise InputError(
            f"{uri} has options after the ?, which a folder to write in cannot have: give a store's address and "
            "credentials in the environment of all nodes (AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, ...)"
        )
    return absolute(uri).rstrip("/")


def resolve(uri: str) -> tuple[pafs.FileSystem, str]:
    """Find the file system and the path in it: Arrow's own file systems first, then fsspec's.

    Raises:
        InputError: Nothing opens this kind of URI, or it cannot be reached.
    """
    if "://" not in uri:
        return pafs.LocalFileSystem(), absolute(uri)
    try:
        filesystem, path = pafs.FileSystem.from_uri(uri)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        try:
            other, path = fsspec.core.url_to_fs(uri)
        except (ValueError, ImportError) as error:
            raise InputError(f"cannot open {uri}: {one_line(error)}; give a folder or a URI fsspec opens") from error
        return pafs.PyFileSystem(pafs.FSSpecHandler(other)), path
    except OSError as error:
        raise InputError(f"cannot open {uri}: {one_line(error)}; check the address and the credentials") from error
    return filesystem, path


def exists(filesystem: pafs.FileSystem, path: str) -> bool:
    """Whether there is a file or folder of this path."""
    return bool(filesystem.get_file_info(path).type != pafs.FileType.NotFound)


@contextlib.contextmanager
def written(filesystem: pafs.FileSystem, path: str, folder: str | None = None) -> Iterator[IO[bytes]]:
    """Open a file for writing that gets its name only when the block ends well.

    Until then it lies beside `path`, or in another `folder` of the same file system.
    """
    beside, _, name = path.rpartition("/")
    temporary = f"{folder or beside}/{name}.{uuid.uuid4().hex}.tmp"
    try:
        with filesystem.open_output_stream(temporary) as sink:
            yield sink
        filesystem.move(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            filesystem.delete_file(temporary)
        raise


def one_line(error: BaseException) -> str:
    """The message of an error from elsewhere, fit for one line. Credentials go before it is cut, or a part stays."""
    words = " ".join(without_credentials(str(error)).split())
    return words[:300] if words else type(error).__name__
