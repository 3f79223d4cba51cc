"""The folder that an ingest writes to: free, unfinished or finished, and how the one becomes the other.

Until all shards are complete they lie in `DEST/_unfinished`. Publishing then removes the set that is to be replaced,
notes in `_unfinished` that it did, moves the shards, and writes `_jem.json` last. Each step can be repeated after a
kill.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs as pafs

from jem.data.shards import WorkPlan, read_plan
from jem.data.storage import FINISHED, UNFINISHED, exists, folder_uri, one_line, resolve, written
from jem.errors import InputError

if TYPE_CHECKING:
    from jem.data.shards import ShardSettings

REJECTED = "_rejected.parquet"
PUBLISHING = "publishing.json"
PART = re.compile(r"part-\d{5,}\.parquet")
FORMAT = 1
THREADS = 16

REJECTED_SCHEMA = pa.schema([("path", pa.string()), ("reason", pa.string()), ("bytes", pa.int64())])
Results = dict[int, dict[str, Any]]
"""What came of each complete shard, by number: `shards.write_shard`."""


@dataclass(frozen=True)
class Renumbering:
    """A shard whose ids begin elsewhere than it was written with."""

    number: int
    first: int


class Destination:
    """A folder or URI for a data set.

    Raises:
        InputError: It is a URI that nothing opens, or one with options.
    """

    def __init__(self, dest: str) -> None:
        self.uri = folder_uri(dest)
        self.work = f"{self.uri}/{UNFINISHED}"
        self.filesystem, self.path = resolve(self.uri)
        self._here = f"{self.path}/{UNFINISHED}"

    # --- before -------------------------------------------------------------------------------------------------------

    def check_free(self, *, overwrite: bool) -> None:
        """Check that a data set may be written here.

        Raises:
            InputError: A finished data set is here, without `overwrite`; or something else, which is never removed.
        """
        try:
            kind = self.filesystem.get_file_info(self.path).type
            if kind == pafs.FileType.NotFound:
                return
            if kind != pafs.FileType.Directory:
                raise InputError(f"DEST {self.uri} is a file: give a folder")
            names = {info.base_name for info in self.filesystem.get_file_info(pafs.FileSelector(self.path))}
        except OSError as error:
            raise InputError(f"cannot read {self.uri}: {one_line(error)}; check the path and permissions") from error
        ours = {UNFINISHED, FINISHED, REJECTED}
        if names & {UNFINISHED, FINISHED}:
            ours |= {name for name in names if PART.fullmatch(name)}
        foreign = sorted(name for name in names - ours if not name.startswith(".") and name != "lost+found")
        if foreign:
            some = ", ".join(foreign[:3]) + (", ..." if len(foreign) > 3 else "")
            raise InputError(f"{self.uri} holds other files ({some}): choose an empty or a new folder")
        if FINISHED in names and not overwrite:
            raise InputError(
                f"{self.uri} holds a finished data set: replace it with --overwrite or choose another DEST"
            )

    def continues(self, digest: str, settings: ShardSettings, *, overwrite: bool) -> bool:
        """Whether an ingest of the same source with the same settings was interrupted here.

        Raises:
            InputError: One with another source or other settings was, and is not to be overwritten.
        """
        if not exists(self.filesystem, f"{self._here}/plan.json"):
            return False
        try:
            before = read_plan(self.work)
        except ValueError:
            changed = ["version of jem"]
        else:
            then, now = asdict(before.settings), asdict(settings)
            words = {"shard_bytes": "shard_mb", "row_group_bytes": "row_group_mb"}
            changed = [words.get(name, name) for name in now if now[name] != then[name]]
            if before.digest != digest:
                changed.insert(0, "source (files, sizes, times or labels)")
        if changed and not overwrite:
            raise InputError(
                f"{self.uri} holds an unfinished ingest with another {' and '.join(changed)}: "
                "repeat it as it was to go on, or start over with --overwrite"
            )
        return not changed

    def begin(self, plan: WorkPlan, entries: pa.Table, cuts: list[int], listed: pa.Table) -> None:
        """Write the plan: `entries`, cut into shards that end before the rows `cuts`, and the `listed` bad ones.

        Raises:
            InputError: DEST cannot be written.
        """
        try:
            if exists(self.filesystem, self._here):
                self.filesystem.delete_dir(self._here)
            self.filesystem.create_dir(self._here, recursive=True)
            with (
                written(self.filesystem, f"{self._here}/entries.parquet") as sink,
                pq.ParquetWriter(sink, entries.schema) as out,
            ):
                for begin, end in zip([0, *cuts], cuts, strict=False):
                    out.write_table(entries.slice(begin, end - begin), row_group_size=end - begin)
            with written(self.filesystem, f"{self._here}/listed.parquet") as sink:
                pq.write_table(listed, sink)
            with written(self.filesystem, f"{self._here}/plan.json") as sink:
                sink.write(plan.to_json())
        except OSError as error:
            raise InputError(f"cannot write {self.uri}: {one_line(error)}; choose another DEST") from error

    # --- in between ---------------------------------------------------------------------------------------------------

    def results(self) -> Results:
        """What came of the shards that are complete."""
        names = {info.base_name for info in self.filesystem.get_file_info(pafs.FileSelector(self._here))}
        complete = sorted(int(name[6:-5]) for name in names if re.fullmatch(r"shard-\d+\.json", name))

        def read(number: int) -> dict[str, Any]:
            with self.filesystem.open_input_stream(f"{self._here}/shard-{number:05d}.json") as stream:
                result: dict[str, Any] = json.loads(stream.read())
                return result

        with ThreadPoolExecutor(THREADS) as pool:
            return dict(zip(complete, pool.map(read, complete), strict=True))

    def rejected(self, results: Results) -> pa.Table:
        """The table of rejected images, by path."""
        with self.filesystem.open_input_file(f"{self._here}/listed.parquet") as file:
            listed = pq.read_table(file)
        rows = [row for result in results.values() for row in result["rejected"]]
        columns = [[row[place] for row in rows] for place in range(3)]
        arrays = [pa.array(column, type=kind) for column, kind in zip(columns, REJECTED_SCHEMA.types, strict=True)]
        found = pa.table(arrays, schema=REJECTED_SCHEMA)
        return pa.concat_tables([listed.cast(REJECTED_SCHEMA), found]).sort_by("path")

    def leave_rejected(self, table: pa.Table) -> str:
        """Write the table for the user of an ingest that failed; return where."""
        with written(self.filesystem, f"{self._here}/rejected.parquet") as sink:
            pq.write_table(table, sink)
        return f"{self.work}/rejected.parquet"

    # --- after --------------------------------------------------------------------------------------------------------

    def renumberings(self, plan: WorkPlan, results: Results) -> list[Renumbering]:
        """The shards whose ids are not right, because one before them rejected images, and are not yet set right."""
        wanted = []
        first = 0
        for name, number in self._kept(results).items():
            final = f"{self._here}/final-{number:05d}.parquet"
            if first != plan.first[number] and not exists(self.filesystem, final) and not self._published(name):
                wanted.append(Renumbering(number, first))
            first += results[number]["rows"]
        return wanted

    def publish(self, plan: WorkPlan, results: Results, facts: dict[str, Any]) -> int:
        """Put the shards where readers find them; return how many.

        `facts` go into `_jem.json`.
        """
        filesystem = self.filesystem
        if not exists(filesystem, f"{self._here}/{PUBLISHING}"):
            self._remove_old()
            with written(filesystem, f"{self._here}/{PUBLISHING}") as sink:
                sink.write(b"{}")
        kept = self._kept(results)

        def move(item: tuple[str, int]) -> None:
            name, number = item
            if self._published(name):
                return
            final = f"{self._here}/final-{number:05d}.parquet"
            source = final if exists(filesystem, final) else f"{self._here}/shard-{number:05d}.parquet"
            filesystem.move(source, f"{self.path}/{name}")

        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(move, kept.items()))
        with written(filesystem, f"{self.path}/{REJECTED}", self._here) as sink:
            pq.write_table(self.rejected(results), sink)
        head = {
            "format": FORMAT,
            "source": plan.source.uri,
            "kind": plan.source.kind,
            **facts,
            "shards": len(kept),
            "settings": asdict(plan.settings),
            "digest": plan.digest,
        }
        with written(filesystem, f"{self.path}/{FINISHED}", self._here) as sink:
            sink.write(json.dumps(head, indent=1).encode())
        filesystem.delete_dir(self._here)
        return len(kept)

    def _kept(self, results: Results) -> dict[str, int]:
        """Final names of the shards that are not empty, in order, and their numbers."""
        numbers = [number for number in sorted(results) if results[number]["rows"]]
        return {f"part-{place:05d}.parquet": number for place, number in enumerate(numbers)}

    def _published(self, name: str) -> bool:
        """Whether this shard was moved already, by a publishing that was interrupted."""
        publishing = exists(self.filesystem, f"{self._here}/{PUBLISHING}")
        return publishing and exists(self.filesystem, f"{self.path}/{name}")

    def _remove_old(self) -> None:
        infos = self.filesystem.get_file_info(pafs.FileSelector(self.path))
        names = [info.base_name for info in infos]
        for name in sorted(names, key=lambda name: name != FINISHED):  # first what calls it finished
            if name in (FINISHED, REJECTED) or PART.fullmatch(name):
                self.filesystem.delete_file(f"{self.path}/{name}")


def reasons(rejected: pa.Table) -> dict[str, int]:
    """Count rejected images by kind of reason, the most frequent first."""
    kinds = Counter(reason.split(":")[0] for reason in rejected.column("reason").to_pylist())
    return dict(kinds.most_common())
