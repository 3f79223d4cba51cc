"""Embeddings on disk: sorted by id whatever order they come in, whole or not at all."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jem.data import embeddings
from jem.data.embeddings import MARKER, Written, check_free, write_embeddings
from jem.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

ABOUT = {"encoder": "models:/x/1", "classes": None}


def blocks_of(ids: np.ndarray, size: int, dimensions: int = 3) -> Iterator[dict[str, Any]]:
    """Embeddings that can be told from their ids; every third has no label."""
    for low in range(0, len(ids), size):
        some = ids[low : low + size]
        values = some[:, None] + np.arange(dimensions, dtype=np.float32) / 10
        yield {"id": some, "embedding": values.astype(np.float32), "label": np.where(some % 3, some % 7, -1)}


def read(folder: Path) -> list[pa.Table]:
    return [pq.read_table(path) for path in sorted(folder.glob("*.parquet"))]


@given(
    rows=st.integers(0, 60),
    block=st.integers(1, 20),
    shard=st.integers(1, 25),
    shuffled=st.booleans(),
    dimensions=st.integers(1, 5),
)
def test_every_row_comes_back_sorted_within_and_across_files(
    tmp_path_factory: pytest.TempPathFactory, rows: int, block: int, shard: int, shuffled: bool, dimensions: int
) -> None:
    out = tmp_path_factory.mktemp("out") / "embeddings"
    ids = np.arange(rows) * 2
    if shuffled:
        ids = np.random.default_rng(rows).permutation(ids)
    written = write_embeddings(blocks_of(ids, block, dimensions), str(out), dimensions, ABOUT, rows_per_shard=shard)
    tables = read(out)
    assert written == Written(rows, max(1, -(-rows // shard)))
    assert len(tables) == written.shards
    assert all(len(table) == shard for table in tables[:-1])
    table = pa.concat_tables(tables)
    assert table.schema.field("embedding").type == pa.list_(pa.float32(), dimensions)
    assert table.column("id").to_pylist() == sorted(ids.tolist())
    found = np.array(table.column("embedding").to_pylist(), np.float32).reshape(rows, dimensions)
    np.testing.assert_array_equal(
        found,
        np.concatenate(
            [np.empty((0, dimensions)), *(b["embedding"] for b in blocks_of(np.sort(ids), 9, dimensions))]
        ).astype(np.float32),
    )
    assert table.column("label").to_pylist() == [int(i % 7) if i % 3 else None for i in np.sort(ids)]
    assert sorted(path.name for path in out.iterdir()) == sorted(
        [MARKER, *(f"part-{i:05d}.parquet" for i in range(written.shards))]
    )


def test_what_made_them_is_said(tmp_path: Path) -> None:
    write_embeddings(blocks_of(np.arange(5), 5), str(tmp_path / "e"), 3, ABOUT)
    assert json.loads((tmp_path / "e" / MARKER).read_text()) == {**ABOUT, "rows": 5, "shards": 1}
    assert json.loads(read(tmp_path / "e")[0].schema.metadata[b"jem"]) == ABOUT


def failing() -> Iterator[dict[str, Any]]:
    yield from blocks_of(np.arange(10), 5)
    raise KeyboardInterrupt


def test_a_failure_leaves_nothing_and_what_was_there_untouched(tmp_path: Path) -> None:
    out = tmp_path / "e"
    with pytest.raises(KeyboardInterrupt):
        write_embeddings(failing(), str(out), 3, ABOUT, rows_per_shard=4)
    assert list(tmp_path.iterdir()) == []
    write_embeddings(blocks_of(np.arange(7), 5), str(out), 3, ABOUT)
    with pytest.raises(KeyboardInterrupt):
        write_embeddings(failing(), str(out), 3, ABOUT, rows_per_shard=4, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["e"]
    assert sum(len(table) for table in read(out)) == 7


def test_only_embeddings_are_overwritten_and_only_when_asked(tmp_path: Path) -> None:
    out = tmp_path / "e"
    out.mkdir()  # an empty folder is free
    write_embeddings(blocks_of(np.arange(7), 5), str(out), 3, ABOUT)
    with pytest.raises(InputError, match="--overwrite"):
        write_embeddings(blocks_of(np.arange(4), 5), str(out), 3, ABOUT)
    assert sum(len(table) for table in read(out)) == 7
    write_embeddings(blocks_of(np.arange(4), 5), str(out), 3, ABOUT, overwrite=True)
    assert sum(len(table) for table in read(out)) == 4
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    for taken in (tmp_path / "mine", tmp_path / "mine" / "thesis.tex"):
        with pytest.raises(InputError, match="does not hold embeddings"):
            check_free(str(taken), overwrite=True)


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write to"):
        write_embeddings(blocks_of(np.arange(4), 5), str(tmp_path / "file" / "e"), 3, ABOUT)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_an_object_store_gets_the_same_and_the_marker_last(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = fsspec.filesystem("memory")
    order: list[str] = []
    written = embeddings.written

    def noted(filesystem: Any, path: str) -> Any:
        order.append(path.rpartition("/")[2])
        return written(filesystem, path)

    monkeypatch.setattr(embeddings, "written", noted)
    ids = np.random.default_rng(0).permutation(20)
    for overwrite in (False, True):
        write_embeddings(
            blocks_of(ids, 6), "memory://bucket/embeddings", 3, ABOUT, rows_per_shard=8, overwrite=overwrite
        )
        files = sorted(path.rpartition("/")[2] for path in memory.ls("/bucket/embeddings", detail=False))
        assert files == [MARKER, "part-00000.parquet", "part-00001.parquet", "part-00002.parquet"]
    assert order[-1] == MARKER
    with memory.open("/bucket/embeddings/part-00002.parquet") as file:
        assert pq.read_table(file).column("id").to_pylist() == [16, 17, 18, 19]
    with pytest.raises(InputError, match="--overwrite"):
        check_free("memory://bucket/embeddings", overwrite=False)
    with pytest.raises(KeyboardInterrupt):
        write_embeddings(failing(), "memory://bucket/other", 3, ABOUT, rows_per_shard=4)
    assert not memory.exists("/bucket/other")
