"""The folder of a run: its configuration, its MLflow run and its checkpoints, local or behind a URI."""

from __future__ import annotations

import contextlib
import json
import re
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyarrow import fs

from jem.data.storage import folder_uri, one_line
from jem.errors import InputError

CONFIG, RECORD = "config.yaml", "run.json"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True)
class RunFolder:
    """`storage`/`name`, which Ray Train writes its checkpoints to as well."""

    storage: str
    """Absolute folder, or URI."""
    name: str

    @classmethod
    def at(cls, storage: str, name: str) -> RunFolder:
        """The folder of the run `name`; nothing is made.

        Raises:
            InputError: A name that cannot be a folder's, or a URI with options.
        """
        if not NAME.fullmatch(name):
            raise InputError(f"{name!r} cannot name a run: use letters, digits, '.', '_' and '-', at most 100")
        return cls(folder_uri(storage) if "://" in storage else str(Path(storage).expanduser().resolve()), name)

    @property
    def path(self) -> str:
        """The folder itself, in which others may be."""
        return f"{self.storage.rstrip('/')}/{self.name}"

    # Opened as Ray Train opens it, which knows no fsspec.
    def _open(self, *parts: str) -> tuple[fs.FileSystem, str]:
        try:
            filesystem, root = fs.FileSystem.from_uri(self.storage)
        except (OSError, ValueError) as error:
            raise InputError(
                f"storage {self.storage} cannot be opened ({one_line(error)}): give a folder or a URI"
            ) from error
        return filesystem, "/".join([root.rstrip("/"), *parts])

    def check_writable(self) -> None:
        """Try to write to the storage; leaves nothing behind.

        Raises:
            InputError: It is not writable, with the reason.
        """
        filesystem, root = self._open()
        marker = f"{root}/.jem-{uuid.uuid4().hex}"
        made = _missing(filesystem, root)
        try:
            filesystem.create_dir(root, recursive=True)
            with filesystem.open_output_stream(marker) as out:
                out.write(b"")
            filesystem.delete_file(marker)
            if made is not None:
                filesystem.delete_dir(made)
        except OSError as error:
            raise InputError(
                f"storage {self.storage} is not writable ({one_line(error)}): give another with --storage"
            ) from error

    def exists(self) -> bool:
        """Whether there is anything of a run of this name.

        Raises:
            InputError: The storage does not answer.
        """
        filesystem, path = self._open(self.name)
        with self._answering():
            return bool(filesystem.get_file_info(path).type != fs.FileType.NotFound)

    def others(self) -> list[str]:
        """Names of the runs in this storage.

        Raises:
            InputError: The storage does not answer.
        """
        filesystem, root = self._open()
        with self._answering():
            infos = filesystem.get_file_info(fs.FileSelector(root, allow_not_found=True))
        return sorted(info.base_name for info in infos if info.type == fs.FileType.Directory)

    def write(self, config: str, record: dict[str, Any]) -> None:
        """Begin the folder: the configuration, as YAML, and the record of the run."""
        filesystem, path = self._open(self.name)
        filesystem.create_dir(path, recursive=True)
        self._put(CONFIG, config.encode())
        self.note(record)

    def note(self, record: dict[str, Any]) -> None:
        """Replace the record of the run."""
        self._put(RECORD, json.dumps(record, indent=2).encode())

    def save(self, folder: str, name: str, content: bytes) -> None:
        """Write the file `folder`/`name`, or `name` alone, in place of one that there is."""
        filesystem, path = self._open(self.name, *filter(None, (folder,)))
        filesystem.create_dir(path, recursive=True)
        self._put("/".join(filter(None, (folder, name))), content)

    def fetch(self, folder: str, dest: Path) -> None:
        """Copy the files of `folder` to a local one.

        Raises:
            InputError: It is not there.
        """
        filesystem, path = self._open(self.name, folder)
        try:
            fs.copy_files(path, str(dest), source_filesystem=filesystem, destination_filesystem=fs.LocalFileSystem())
        except OSError as error:
            raise InputError(f"cannot read {self.storage}/{self.name}/{folder}: {error}") from error

    def _put(self, name: str, content: bytes) -> None:
        filesystem, path = self._open(self.name, name)
        with filesystem.open_output_stream(f"{path}.part") as out:
            out.write(content)
        filesystem.move(f"{path}.part", path)

    def read(self) -> tuple[str, dict[str, Any]]:
        """The configuration and the record.

        Raises:
            InputError: There is no such run here, or the storage does not answer.
        """
        texts = []
        for name in (CONFIG, RECORD):
            filesystem, path = self._open(self.name, name)
            try:
                with self._answering(), filesystem.open_input_stream(path) as source:
                    texts.append(source.read().decode())
            except FileNotFoundError:
                there = ", ".join(self.others()[-5:]) or "none"
                raise InputError(f"no run {self.name} in {self.storage}: there are {there}") from None
        return texts[0], json.loads(texts[1])

    @contextlib.contextmanager
    def _answering(self) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            raise
        except OSError as error:
            raise InputError(
                f"storage {self.storage} cannot be read ({one_line(error)}): check its address, and the credentials"
            ) from error


def _missing(filesystem: fs.FileSystem, path: str) -> str | None:
    """The topmost folder of a local `path` that does not exist yet."""
    if not isinstance(filesystem, fs.LocalFileSystem) or Path(path).exists():
        return None
    missing = Path(path)
    while not missing.parent.exists():
        missing = missing.parent
    return str(missing)
