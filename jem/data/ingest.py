"""Building a data set from a source of images, in parallel on Ray Data; interrupted, it goes on where it was.

`prepare` lists the source, puts the images into a seeded order and looks whether DEST is free; it writes nothing.
`run` cuts the order into shards, which tasks read, check and write independently (`shards.py`), and publishes them when
all are complete (`destination.py`).

Ids are dense, 0 ... N - 1 in the order of the shards, although the shards are written at the same time and nobody knows
how many images each will reject: each is written with the ids that it gets if nothing before it is rejected, and those
that turn out wrong are copied with the right ones. Every image is read from the source and checked once.

The order is a seeded shuffle, so that shards (and row groups) are mixed. Of a Parquet source the row groups are
shuffled, and the rows of those that come into one shard: a row group is read once, not once per row.
"""

from __future__ import annotations

import hashlib
import json
import logging
import queue
import threading
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
import ray.data

from jem.data.decode import DecodeError, shrink
from jem.data.destination import FORMAT, REJECTED_SCHEMA, Destination, reasons
from jem.data.fetch import fetch
from jem.data.shards import ShardSettings, WorkPlan, read_plan, renumber, write_shard
from jem.data.sources import Source, list_source
from jem.data.storage import absolute, one_line
from jem.errors import InputError, RunError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    from jem.config import IngestConfig

SAMPLE = 32
"""Images that are shrunk to estimate how much `short_side` saves."""
TASKS = 4096
"""Ray Data tasks at most, each for one shard or more."""
STALLED = 1800.0
"""Seconds in which a shard must come; one takes seconds to a few minutes."""
QUIET = {"ray.data": logging.WARNING, "ray.data._internal.progress": logging.ERROR}


class Bar(Protocol):
    """What shows the progress, such as `jem.progress.Progress`."""

    def update(self, count: int, **info: object) -> None:
        """Add `count` images."""


@dataclass(frozen=True)
class IngestResult:
    """What an ingest did."""

    dest: str
    kind: str
    """What the source was taken for."""
    images: int
    rejected: int
    shards: int
    reasons: dict[str, int]
    """Rejected images by kind of reason, the most frequent first."""
    classes: tuple[str, ...] | None
    labelled: bool
    ignored: dict[str, int]
    """Files that are no images, by extension."""
    continued: bool
    """Whether shards of an interrupted ingest were used."""
    examples: tuple[tuple[str, str], ...]
    """The first rejected images, by path, with their reasons."""


@dataclass(frozen=True)
class Prepared:
    """A listed source and a free destination."""

    config: IngestConfig
    destination: Destination
    source: Source
    entries: pa.Table
    """In the new order, without those known to be bad."""
    listed: pa.Table
    """Those known to be bad: path, reason, bytes."""
    settings: ShardSettings
    digest: str
    continues: bool


def ingest(config: IngestConfig, progress: Callable[..., AbstractContextManager[Bar]]) -> IngestResult:
    """Build the data set; Ray must be connected.

    Args:
        config: The job.
        progress: Called as `jem.progress.Progress` is.

    Raises:
        InputError: The source or the destination is not usable, or too many images are bad.
        RunError: It stopped; the same call goes on from there.
    """
    return run(prepare(config), progress)


def prepare(config: IngestConfig) -> Prepared:
    """List the source and look at the destination; nothing is written.

    Raises:
        InputError: The source cannot be read or understood, or the destination is not free.
    """
    destination = Destination(config.dest)
    source_uri = absolute(config.source).rstrip("/")
    if destination.uri == source_uri or destination.uri.startswith(f"{source_uri}/"):
        raise InputError(f"DEST {config.dest} lies in SOURCE {config.source}: choose a folder elsewhere")
    destination.check_free(overwrite=config.overwrite)
    source, entries = list_source(config.source, config.format, config.max_row_group_mb * 1e6)
    settings = ShardSettings(
        seed=config.seed,
        short_side=config.short_side,
        shard_bytes=round(config.shard_mb * 1e6),
        row_group_bytes=round(config.row_group_mb * 1e6),
        row_group_rows=config.row_group_rows,
        pixel_limit=config.pixel_limit,
    )
    digest = _digest(source, entries)
    continues = destination.continues(digest, settings, overwrite=config.overwrite)
    good = pc.is_null(entries.column("problem"))
    bad = entries.filter(pc.invert(good))
    listed = pa.table([bad.column(name) for name in ("path", "problem", "size")], schema=REJECTED_SCHEMA)
    entries = entries.filter(good)
    order = np.random.default_rng(config.seed % 2**64).permutation(len(entries))
    return Prepared(config, destination, source, entries.take(order), listed, settings, digest, continues)


def _digest(source: Source, entries: pa.Table) -> str:
    """Fingerprint of a listing."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, entries.schema) as stream:
        stream.write_table(entries.combine_chunks())
    head = json.dumps([FORMAT, source.kind, source.classes, source.labelled]).encode()
    return hashlib.sha256(head + sink.getvalue().to_pybytes()).hexdigest()


def run(prepared: Prepared, progress: Callable[..., AbstractContextManager[Bar]]) -> IngestResult:
    """Write and publish the shards; Ray must be connected. Arguments and errors as of `ingest`."""
    destination, source = prepared.destination, prepared.source
    if not prepared.continues:
        _begin(prepared)
    try:
        work = destination.work
        plan = read_plan(work)
        results = destination.results()
        continued = bool(results)
        rejected = len(prepared.listed) + sum(len(result["rejected"]) for result in results.values())
        done = rejected + sum(result["rows"] for result in results.values())
        todo = [{"number": number} for number in range(len(plan.first)) if number not in results]
        limit = prepared.config.max_rejected * plan.images
        with progress("ingest", plan.images, done=done) as bar:
            if rejected <= limit:
                for result in _each(lambda row: write_shard(work, row["number"], source), todo, prepared):
                    rejected += len(result["rejected"])
                    bar.update(result["rows"] + len(result["rejected"]), rejected=rejected)
                    if rejected > limit:  # more would not change it
                        break
        results = destination.results()
        images = sum(result["rows"] for result in results.values())
        bad = destination.rejected(results)
        if rejected > limit or images == 0:
            raise _too_many(prepared, bad, plan.images)
        wrong = [asdict(renumbering) for renumbering in destination.renumberings(plan, results)]
        for _ in _each(lambda row: renumber(work, row["number"], row["first"]), wrong, prepared):
            pass
        facts = {
            "images": images,
            "rejected": len(bad),
            "reasons": reasons(bad),
            "classes": source.classes,
            "ignored": source.ignored,
        }
        shards = destination.publish(plan, results, facts)
    except OSError as error:
        raise RunError(f"ingest stopped: {one_line(error)}; mend that and repeat the command to go on") from error
    return IngestResult(
        dest=destination.uri,
        kind=source.kind,
        images=images,
        rejected=len(bad),
        shards=shards,
        reasons=reasons(bad),
        classes=source.classes,
        labelled=source.labelled,
        ignored=source.ignored,
        continued=continued,
        examples=tuple((row["path"], row["reason"]) for row in bad.slice(0, 5).to_pylist()),
    )


def _begin(prepared: Prepared) -> None:
    """Cut the entries into shards of about the same size, and write the plan."""
    entries = prepared.entries
    sizes = entries.column("size").to_numpy() * _shrinkage(prepared)
    shard = (np.cumsum(sizes) - sizes) // prepared.settings.shard_bytes
    starts = np.flatnonzero(np.diff(shard, prepend=-1))
    rows = np.concatenate([[0], np.cumsum(entries.column("rows").to_numpy())])
    plan = WorkPlan(
        source=prepared.source,
        digest=prepared.digest,
        settings=prepared.settings,
        first=tuple(rows[starts].tolist()),
        images=int(rows[-1]) + len(prepared.listed),
    )
    cuts = [*starts[1:].tolist(), len(entries)] if len(entries) else []
    prepared.destination.begin(plan, entries, cuts, prepared.listed)


def _shrinkage(prepared: Prepared) -> float:
    """Share of the bytes that is left after `short_side`, estimated from the first images."""
    short_side = prepared.settings.short_side
    if short_side is None:
        return 1.0
    before = after = 1
    some = prepared.entries.slice(0, 1 if prepared.source.kind == "parquet" else SAMPLE)
    images = fetch(prepared.source, some, np.random.default_rng(0)) if len(some) else iter(())
    for _, image in zip(range(SAMPLE), images, strict=False):
        try:
            data, _ = shrink(image.data, short_side, prepared.settings.pixel_limit)
        except DecodeError:
            continue
        before, after = before + image.size, after + len(data)
    return after / before


def _too_many(prepared: Prepared, bad: pa.Table, images: int) -> InputError:
    where = prepared.destination.leave_rejected(bad)
    counted = ", ".join(f"{count} {reason}" for reason, count in list(reasons(bad).items())[:3])
    share = f"more than max_rejected {prepared.config.max_rejected:g}"
    remedy = "mend the source" if len(bad) == images else "mend the source or raise --max_rejected"
    return InputError(f"{len(bad)} of {images} images are bad ({counted}), {share}: see {where}, {remedy}")


# --- on Ray Data ------------------------------------------------------------------------------------------------------


def _each(
    function: Callable[[dict[str, int]], Any], rows: list[dict[str, int]], prepared: Prepared
) -> Iterator[dict[str, Any]]:
    """Do something for each row, in tasks of one CPU, as many at a time as there are CPUs; results as they come."""
    if not rows:
        return
    _await_cpu(prepared.config.cluster.start_timeout)

    def task(batch: dict[str, np.ndarray]) -> dict[str, list[str]]:
        row = {name: int(column[0]) for name, column in batch.items()}
        try:
            result = {"result": function(row)}
        except (RunError, OSError) as error:  # Ray would wrap it in pages of its own
            known = isinstance(error, RunError)
            result = {"error": str(error) if known else f"{one_line(error)}; mend that and repeat the command to go on"}
        return {"json": [json.dumps(result)]}

    for name, level in QUIET.items():
        logging.getLogger(name).setLevel(level)
    manifest = ray.data.from_items(rows, override_num_blocks=min(len(rows), TASKS))
    manifest.context.enable_progress_bars = False
    manifest.context.print_on_execution_start = False
    for result in _awaited(manifest.map_batches(task, batch_size=1, num_cpus=1)):
        if "error" in result:
            raise RunError(f"ingest stopped: {result['error']}")
        yield result["result"]


def _awaited(dataset: ray.data.Dataset) -> Iterator[dict[str, Any]]:
    """Take the results in a thread, so that waiting for one has an end."""
    results: queue.Queue[dict[str, Any] | BaseException | None] = queue.Queue()
    closed = threading.Event()

    def take() -> None:
        try:
            rows = dataset.iter_rows()
            for row in rows:
                results.put(json.loads(row["json"]))
                if closed.is_set():
                    break
            del rows  # which ends the execution
            results.put(None)
        except BaseException as error:  # noqa: BLE001 - raised again below
            results.put(error)

    threading.Thread(target=take, name="jem-ingest", daemon=True).start()
    try:
        while True:
            try:
                result = results.get(timeout=STALLED)
            except queue.Empty:
                has, free = _cpus()
                raise RunError(
                    f"no shard came for {STALLED:g} s; the cluster has {has:g} CPUs, of which {free:g} are free: "
                    "look at `ray status`, and repeat the command to go on"
                ) from None
            if result is None:
                return
            if isinstance(result, BaseException):
                raise RunError(f"ingest stopped: {one_line(result)}; repeat the command to go on") from result
            yield result
    finally:
        closed.set()


def _cpus() -> tuple[float, float]:
    """CPUs that the cluster has, and those of them that are free."""
    has, free = ray.cluster_resources(), ray.available_resources()  # type: ignore[no-untyped-call]
    return float(has.get("CPU", 0.0)), float(free.get("CPU", 0.0))


def _await_cpu(seconds: float) -> None:
    """Wait until a task can start.

    Raises:
        InputError: None could in that time.
    """
    end = time.monotonic() + seconds
    while (cpus := _cpus())[1] < 1:
        if cpus[0] < 1 or time.monotonic() > end:
            raise InputError(
                f"no CPU for the ingest: the cluster has {cpus[0]:g}, of which {cpus[1]:g} are free, and it needs one; "
                "add a node, or wait for other jobs"
            )
        time.sleep(1.0)
