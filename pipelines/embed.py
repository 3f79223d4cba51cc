"""`jem embed`: a data set and an encoder in, Parquet with id, embedding and label out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jem.credentials import stripped
from pipelines.command import main_for

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from jem.config import EmbedConfig
    from jem.data.index import Index


@dataclass(frozen=True)
class EmbedResult:
    """What was written."""

    out: str
    encoder: str
    """The very version, where an alias was given."""
    images: int
    dimensions: int
    shards: int


def embed(config: EmbedConfig) -> EmbedResult:
    """Embed `config.data` with `config.encoder` into Parquet files in `config.out`, sorted by id.

    Raises:
        InputError: no such data or encoder, OUT is taken or cannot be written, or the cluster is too small.
        RunError: an image cannot be decoded, or the cluster stopped working.
    """
    from jem.data.embeddings import check_free, write_embeddings
    from jem.data.index import open_index
    from jem.data.storage import absolute
    from jem.evaluate.extract import DEADLINE, encode, stream_of, within
    from jem.tracking.registry import load_encoder, show
    from pipelines.cluster import connect

    out = absolute(config.out)
    check_free(out, overwrite=config.overwrite)
    manifest, version = show(config.encoder, config.track)
    uri = version.uri if version else config.encoder
    encoder = load_encoder(uri, config.track)
    index = open_index(config.data, config.limit)
    about = {
        "encoder": uri,
        "sha256": manifest.sha256,
        "data": index.uri,
        "dimensions": manifest.dimensions,
        "classes": index.classes,
    }
    with connect(config.cluster) as cluster:
        gpu = config.cluster.gpu if config.cluster.gpu is not None else cluster.gpus >= config.actors
        stream = stream_of(manifest.info.config, config.stream)  # other canvases would give other features
        rows = encode(encoder, index, stream, config.batch_size, config.actors, gpu=gpu)
        blocks = _counted(within(rows, DEADLINE), index)
        written = write_embeddings(blocks, out, manifest.dimensions, stripped(about), overwrite=config.overwrite)
    result = EmbedResult(out, uri, written.rows, manifest.dimensions, written.shards)
    print(f"{out}: {result.images:,} embeddings of {result.dimensions} numbers by {uri}, in {result.shards} file(s)")
    return result


def _counted(blocks: Iterable[dict[str, Any]], index: Index) -> Iterator[dict[str, Any]]:
    """The same blocks, shown as they pass; RunError if they are not all that there should be."""
    from jem.errors import RunError
    from jem.progress import Progress

    done = 0
    with Progress("embed", len(index)) as progress:
        for block in blocks:
            yield block
            done += len(block["id"])
            progress.update(len(block["id"]))
    if done != len(index):
        raise RunError(f"{done} of {len(index)} images of {index.uri} came back encoded: run it again")


if __name__ == "__main__":
    raise SystemExit(main_for("embed"))
