"""Writing one shard of a data set: what a task of the ingest does, without Ray.

The work lies in `DEST/_unfinished` until all of it is done (readers leave out names with an underscore):

| file | what |
| --- | --- |
| `plan.json` | source, settings, the expected first id of each shard; written last, so with it the plan is complete |
| `entries.parquet` | the source's entries in their new order, one row group per shard |
| `listed.parquet` | entries that the listing found bad |
| `shard-00007.parquet` | a shard; its ids are right if no shard before it rejected an image |
| `shard-00007.json` | what came of it; written after the shard, so with it the shard is complete |
| `final-00007.parquet` | the shard with its ids set right, where they were not |

Every file gets its name when it is complete, and what a task writes depends on the plan alone: it can be killed,
repeated, and even run twice at once.
"""

from __future__ import annotations

import contextlib
import json
import warnings
from dataclasses import asdict, dataclass
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from jem.credentials import stripped
from jem.data.decode import DecodeError, check, shrink
from jem.data.fetch import fetch
from jem.data.sources import ENTRIES, Source
from jem.data.storage import resolve, written

if TYPE_CHECKING:
    from typing_extensions import Self

    from jem.data.fetch import Encoded

COMPRESSION = "zstd"
"""Measured on photographs: write 650 and read 4100 MB/s (without compression 1500 and 6600), little beside their
decoding at 80 MB/s. CIFAR's small JPEGs, whose headers are alike, shrink to 38 %."""


@dataclass(frozen=True)
class ShardSettings:
    """What the content of the shards depends on, besides the source."""

    seed: int
    short_side: int | None
    shard_bytes: int
    row_group_bytes: int
    row_group_rows: int
    pixel_limit: int


@dataclass(frozen=True)
class WorkPlan:
    """The head of `plan.json`."""

    source: Source
    digest: str
    """Of the source's listing: names, sizes, times, labels."""
    settings: ShardSettings
    first: tuple[int, ...]
    """Expected first id of each shard."""
    images: int
    """Images that the source lists, bad ones included."""

    def to_json(self) -> bytes:
        """Encode; the inverse of `from_json`, but for credentials in the source's URI: it lies in storage."""
        return json.dumps(stripped(asdict(self))).encode()

    @staticmethod
    def from_json(text: bytes) -> WorkPlan:
        """Decode.

        Raises:
            ValueError: It is not a plan of this version.
        """
        try:
            head = json.loads(text)
            source = head["source"]
            source["classes"] = None if source["classes"] is None else tuple(source["classes"])
            return WorkPlan(
                Source(**source),
                head["digest"],
                ShardSettings(**head["settings"]),
                tuple(head["first"]),
                head["images"],
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a plan: {error}") from error


def shard_schema(source: Source) -> pa.Schema:
    """The columns of a data set, with the Hugging Face description of them in the metadata."""
    fields = {"image": pa.struct({"bytes": pa.binary(), "path": pa.string()})}
    features: dict[str, Any] = {"image": {"_type": "Image"}}
    if source.labelled:
        fields["label"] = pa.int64()
        value = {"dtype": "int64", "_type": "Value"}
        features["label"] = {"names": list(source.classes), "_type": "ClassLabel"} if source.classes else value
    for name, kind in (("id", "int64"), ("height", "int32"), ("width", "int32")):
        fields[name] = pa.type_for_alias(kind)
        features[name] = {"dtype": kind, "_type": "Value"}
    return pa.schema(fields, metadata={"huggingface": json.dumps({"info": {"features": features}})})


def read_plan(work: str) -> WorkPlan:
    """Read the plan of the work at this path or URI."""
    filesystem, path = resolve(work)
    with filesystem.open_input_stream(f"{path}/plan.json") as stream:
        return WorkPlan.from_json(stream.read())


def write_shard(work: str, number: int, source: Source) -> dict[str, Any]:
    """Read, check and write the images of one shard.

    Args:
        work: Path or URI of the work.
        number: Of the shard.
        source: The plan's, with the credentials that the plan does not keep.

    Returns:
        What `shard-NUMBER.json` says: `rows` and `bytes` written, `rejected` as lists [path, reason, bytes].

    Raises:
        RunError: The source's storage failed.
    """
    warnings.filterwarnings("ignore", module="PIL")  # what Pillow finds odd but can read is no news to the user
    filesystem, path = resolve(work)
    plan = read_plan(work)
    with filesystem.open_input_file(f"{path}/entries.parquet") as file:
        entries = pq.ParquetFile(file).read_row_group(number).cast(ENTRIES)  # whatever lies there: plain columns
    name = f"{path}/shard-{number:05d}"
    rejected: list[tuple[str, str, int]] = []
    generator = np.random.default_rng([plan.settings.seed % 2**64, number])
    with (
        written(filesystem, f"{name}.parquet") as sink,
        _ShardWriter(sink, source, plan.settings, plan.first[number]) as shard,
    ):
        for image in fetch(source, entries, generator):
            if image.problem is not None:
                rejected.append((image.path, image.problem, image.size))
                continue
            try:
                shard.add(image)
            except DecodeError as error:
                rejected.append((image.path, str(error), image.size))
    result = {"number": number, "rows": shard.rows, "bytes": shard.bytes, "rejected": rejected}
    with written(filesystem, f"{name}.json") as sink:
        sink.write(json.dumps(result).encode())
    return result


def renumber(work: str, number: int, first: int) -> None:
    """Copy a shard with its ids counted from `first`; all else stays."""
    filesystem, path = resolve(work)
    with filesystem.open_input_file(f"{path}/shard-{number:05d}.parquet") as file:
        parquet = pq.ParquetFile(file)
        with (
            written(filesystem, f"{path}/final-{number:05d}.parquet") as sink,
            _parquet(sink, parquet.schema_arrow) as out,
        ):
            for group in range(parquet.num_row_groups):
                table = parquet.read_row_group(group)
                ids = pa.array(np.arange(first, first + len(table)))
                out.write_table(table.set_column(table.schema.get_field_index("id"), table.schema.field("id"), ids))
                first += len(table)


def _parquet(sink: IO[bytes], schema: pa.Schema) -> pq.ParquetWriter:
    # Statistics and dictionaries of encoded images are only in the way: the footer would hold whole images.
    numbers = [name for name in schema.names if name != "image"]
    return pq.ParquetWriter(
        sink, schema, compression=COMPRESSION, use_dictionary=False, write_statistics=numbers, store_schema=True
    )


class _ShardWriter:
    """Collects images and writes them in row groups of limited bytes and rows."""

    def __init__(self, sink: IO[bytes], source: Source, settings: ShardSettings, first: int) -> None:
        self._schema = shard_schema(source)
        self._settings = settings
        self._out = _parquet(sink, self._schema)
        self._first = first
        self._columns: dict[str, list[Any]] = {name: [] for name in self._schema.names}
        self._held = 0
        self.rows = 0
        self.bytes = 0

    def add(self, image: Encoded) -> None:
        """Check and keep one image.

        Raises:
            DecodeError: It cannot be decoded; nothing was kept.
        """
        settings = self._settings
        if settings.short_side is None:
            data, (height, width) = image.data, check(image.data, settings.pixel_limit)
        else:
            data, (height, width) = shrink(image.data, settings.short_side, settings.pixel_limit)
        held = len(self._columns["image"])
        if held and (held >= settings.row_group_rows or self._held + len(data) > settings.row_group_bytes):
            self._flush()
        row = {
            "image": {"bytes": data, "path": image.path},
            "label": image.label,
            "id": self._first + self.rows,
            "height": height,
            "width": width,
        }
        for name, column in self._columns.items():
            column.append(row[name])
        self._held += len(data)
        self.rows += 1
        self.bytes += len(data)

    def _flush(self) -> None:
        table = pa.table(self._columns, schema=self._schema)
        self._out.write_table(table, row_group_size=len(table))
        for column in self._columns.values():
            column.clear()
        self._held = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:  # the file is given up; Arrow's writer would else complain when it is collected
            with contextlib.suppress(OSError):
                self._out.close()
            return
        if self._columns["image"]:
            self._flush()
        self._out.close()
