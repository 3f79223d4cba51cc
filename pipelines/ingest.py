"""`jem ingest SOURCE DEST`: build a data set of Parquet shards from images."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.command import main_for

if TYPE_CHECKING:
    from jem.config import IngestConfig
    from jem.data.ingest import IngestResult

SOURCES = {
    "classes": "class folders",
    "flat": "a folder without labels",
    "list": "a list",
    "parquet": "Parquet",
    "webdataset": "WebDataset tars",
}


def ingest(config: IngestConfig) -> IngestResult:
    """Build the data set `config.dest` from `config.source`, and print what came of it.

    Raises:
        InputError: The source or the destination is not usable, or too many images are bad.
        RunError: It stopped; the same call goes on from there.
    """
    from jem.data.ingest import prepare, run
    from jem.progress import Progress
    from pipelines.cluster import check_shared, connect

    prepared = prepare(config)
    if prepared.continues:
        print(f"going on with the interrupted ingest in {config.dest}")
    with connect(config.cluster) as cluster:
        if len(cluster.nodes) > 1:
            if "://" not in prepared.destination.uri:
                Path(prepared.destination.uri).mkdir(parents=True, exist_ok=True)
            check_shared(cluster, prepared.destination.uri, prepared.source.uri)
        result = run(prepared, Progress)
    _print(result)
    return result


def _print(result: IngestResult) -> None:
    names = f", {len(result.classes)} classes" if result.classes else ", labelled" if result.labelled else ", no labels"
    print(f"{result.images:,} images in {result.shards} shard(s){names}, from {SOURCES[result.kind]}: {result.dest}")
    if result.rejected:
        counts = ", ".join(f"{count:,} {reason}" for reason, count in result.reasons.items())
        print(f"{result.rejected:,} rejected ({counts}), listed in {result.dest}/_rejected.parquet:")
        for path, reason in result.examples:
            print(f"  {path}: {reason}")
        if result.rejected > len(result.examples):
            print(f"  ... and {result.rejected - len(result.examples):,} more")
    if result.ignored:
        counts = ", ".join(f"{count:,} {ending or 'without extension'}" for ending, count in result.ignored.items())
        print(f"other files left out: {counts}")
    print(f"next: jem pretrain --data {result.dest}")


if __name__ == "__main__":
    raise SystemExit(main_for("ingest"))
