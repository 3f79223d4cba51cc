"""The index: where each row is, and which data sets are refused, with cause and remedy."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jem.data.index import open_index
from jem.errors import InputError

NAMES = {"info": {"features": {"image": {"_type": "Image"}, "label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}}}


def write(path: Path, rows: int, *, group: int = 4, names: bool = True, **columns: pa.Array) -> Path:
    """A shard whose images are numbers as text: an index decodes nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = [{"bytes": str(row).encode(), "path": None} for row in range(rows)]
    table = pa.table({"image": pa.array(image, pa.struct({"bytes": pa.binary(), "path": pa.string()})), **columns})
    if names:
        table = table.replace_schema_metadata({"huggingface": json.dumps(NAMES)})
    pq.write_table(table, path, row_group_size=group)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Shards of 10, 3 and 6 rows with labels, and things beside them that are no part of the data set."""
    data = tmp_path / "set"
    for number, rows in enumerate((10, 3, 6)):
        write(data / f"part-{number}.parquet", rows, label=pa.array(np.zeros(rows, np.int64)))
    write(data / "_rejected.parquet", 5)
    write(data / ".hidden.parquet", 5)
    write(data / "_staging" / "part-9.parquet", 5)
    (data / "_jem.json").write_text("{}")
    (data / "README.md").write_text("about")
    return data


def test_an_index_says_where_each_row_is(folder: Path) -> None:
    index = open_index(str(folder))
    assert len(index) == 19
    assert [Path(file).name for file in index.files] == ["part-0.parquet", "part-1.parquet", "part-2.parquet"]
    assert index.file.tolist() == [0, 0, 0, 1, 2, 2]
    assert index.row_group.tolist() == [0, 1, 2, 0, 0, 1]
    assert index.rows.tolist() == [4, 4, 2, 3, 4, 2]
    assert index.start.tolist() == [0, 4, 8, 10, 13, 17]
    assert (index.bytes > 0).all()
    assert (index.image_column, index.label_column, index.has_id) == ("image", "label", False)
    assert index.classes == ("cat", "dog")


def test_a_folder_a_glob_a_file_and_a_list_are_all_data(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(open_index(f"{folder}/part-[12].parquet")) == 9
    assert len(open_index(f"{folder.parent}/*/part-*.parquet")) == 19
    assert len(open_index(str(folder / "part-1.parquet"))) == 3
    assert len(open_index([str(folder / "part-2.parquet"), str(folder / "part-1.parquet")])) == 9
    assert len(open_index(f"file://{folder}")) == 19
    monkeypatch.chdir(folder.parent)
    index = open_index("set")
    assert all(Path(file).is_absolute() for file in index.files), "workers have another working directory"


def test_a_shard_that_is_listed_twice_counts_twice(folder: Path) -> None:
    path = str(folder / "part-0.parquet")
    index = open_index([path, str(folder / "part-1.parquet"), path])
    assert len(index) == 23
    assert index.file.tolist() == [0, 0, 0, 1, 2, 2, 2]


def test_a_file_system_that_only_fsspec_knows_works(folder: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe("/pictures/part-0.parquet", (folder / "part-0.parquet").read_bytes())
    index = open_index("memory://pictures")
    assert len(index) == 10
    assert pq.read_table(index.files[0], filesystem=index.filesystem()).num_rows == 10


@pytest.mark.parametrize("limit", [1, 4, 5, 10, 12, 18])
def test_a_limit_keeps_the_first_rows(folder: Path, limit: int) -> None:
    index = open_index(str(folder), limit)
    assert len(index) == limit
    assert (index.start + index.rows)[-1] == limit
    assert len(index.rows) == len(index.bytes) == len(index.file) == len(index.row_group)
    assert (index.rows > 0).all()


@pytest.mark.parametrize("limit", [19, 10**9])
def test_a_limit_beyond_the_data_keeps_all(folder: Path, limit: int) -> None:
    assert len(open_index(str(folder), limit)) == 19


def test_an_index_goes_to_tasks(folder: Path) -> None:
    index = open_index(str(folder))
    there = pickle.loads(pickle.dumps(index))
    assert there.files == index.files
    np.testing.assert_array_equal(there.start, index.start)


# --- columns ----------------------------------------------------------------------------------------------------------


def table(path: Path, columns: dict[str, pa.Array], features: dict[str, object] | None = None) -> str:
    data = pa.table(columns)
    if features is not None:
        data = data.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(data, path)
    return str(path)


def test_the_only_column_of_bytes_holds_the_images(tmp_path: Path) -> None:
    struct = pa.array([{"bytes": b"x", "path": ""}])
    for name, column in (("img", struct), ("jpg", pa.array([b"x"])), ("png", pa.array([b"x"], pa.large_binary()))):
        index = open_index(table(tmp_path / f"{name}.parquet", {"text": pa.array(["a"]), name: column}))
        assert index.image_column == name


def test_of_several_columns_of_bytes_the_one_named_image_is_taken(tmp_path: Path) -> None:
    two = {"mask": pa.array([b"x"]), "image": pa.array([b"x"])}
    assert open_index(table(tmp_path / "two.parquet", two)).image_column == "image"
    with pytest.raises(InputError, match="2 columns that may be images; its columns are mask, photo"):
        open_index(table(tmp_path / "which.parquet", {"mask": pa.array([b"x"]), "photo": pa.array([b"x"])}))


def test_without_an_image_column_the_columns_are_named(tmp_path: Path) -> None:
    path = table(tmp_path / "words.parquet", {"text": pa.array(["a"]), "label": pa.array([1])})
    with pytest.raises(InputError, match="no image column; its columns are text, label"):
        open_index(path)


def test_labels_are_integers_with_or_without_names(tmp_path: Path) -> None:
    image = pa.array([b"x"])
    index = open_index(table(tmp_path / "a.parquet", {"image": image, "label": pa.array([3], pa.int32())}))
    assert (index.label_column, index.classes) == ("label", None)
    index = open_index(table(tmp_path / "b.parquet", {"image": image, "label": pa.array(["cat"])}))
    assert (index.label_column, index.classes) == (None, None)
    named = {"fine": {"names": ["a", "b"], "_type": "ClassLabel"}}
    index = open_index(table(tmp_path / "c.parquet", {"image": image, "fine": pa.array([1])}, named))
    assert (index.label_column, index.classes) == ("fine", ("a", "b"))
    index = open_index(table(tmp_path / "d.parquet", {"image": image}))
    assert (index.label_column, index.classes) == (None, None)


def test_damaged_metadata_only_costs_the_names(tmp_path: Path) -> None:
    data = pa.table({"image": [b"x"], "label": [1]}).replace_schema_metadata({"huggingface": "{not json"})
    pq.write_table(data, tmp_path / "a.parquet")
    index = open_index(str(tmp_path / "a.parquet"))
    assert (index.label_column, index.classes) == ("label", None)


def test_ids_are_found(tmp_path: Path) -> None:
    assert open_index(table(tmp_path / "a.parquet", {"image": pa.array([b"x"]), "id": pa.array([7])})).has_id
    assert not open_index(table(tmp_path / "b.parquet", {"image": pa.array([b"x"]), "id": pa.array(["x"])})).has_id


# --- refused ----------------------------------------------------------------------------------------------------------


def refusal(data: str | list[str], limit: int | None = None) -> str:
    with pytest.raises(InputError) as caught:
        open_index(data, limit)
    words = str(caught.value)
    assert "\n" not in words
    return words


def test_what_is_not_there_is_refused(folder: Path) -> None:
    assert "no data at" in refusal(f"{folder}/nowhere")
    assert "jem ingest" in refusal(f"{folder}/nowhere")
    assert "no Parquet files match" in refusal(f"{folder}/train-*.parquet")
    assert "no Parquet files match" in refusal(f"{folder}/nowhere/*.parquet")
    assert "no file" in refusal([str(folder / "part-0.parquet"), str(folder / "part-7.parquet")])
    assert "cannot open" in refusal("nosuchscheme://bucket/set")
    assert "list of shards is empty" in refusal([])


def test_folders_without_shards_are_refused_with_what_to_do(tmp_path: Path) -> None:
    assert "is empty" in refusal(str(tmp_path))
    (tmp_path / "cat.jpg").write_bytes(b"x")
    words = refusal(str(tmp_path))
    assert "has no Parquet files" in words
    assert "jem ingest" in words


def test_a_folder_of_splits_is_refused_and_its_splits_are_named(tmp_path: Path) -> None:
    write(tmp_path / "train" / "a.parquet", 1)
    write(tmp_path / "test" / "a.parquet", 1)
    words = refusal(str(tmp_path))
    assert f"{tmp_path}/test" in words
    assert f"{tmp_path}/train" in words


def test_a_folder_that_mixes_splits_is_refused_and_each_is_offered(tmp_path: Path) -> None:
    write(tmp_path / "train-00000-of-00001.parquet", 2)
    write(tmp_path / "test-00000-of-00001.parquet", 3)
    words = refusal(str(tmp_path))
    assert f"'{tmp_path}/test-*.parquet' or '{tmp_path}/train-*.parquet'" in words
    assert len(open_index(f"{tmp_path}/test-*.parquet")) == 3


def test_no_rows_are_refused(tmp_path: Path) -> None:
    assert "has no rows" in refusal(str(write(tmp_path / "a.parquet", 0)))


@pytest.mark.parametrize("damage", [b"", b"PAR1", b"not parquet at all, but some text"])
def test_a_damaged_shard_is_named(folder: Path, damage: bytes) -> None:
    (folder / "part-1.parquet").write_bytes(damage)
    words = refusal(str(folder))
    assert "part-1.parquet is not a readable Parquet file" in words


def test_a_shard_cut_short_is_named(folder: Path) -> None:
    path = folder / "part-1.parquet"
    path.write_bytes(path.read_bytes()[:-20])
    assert "part-1.parquet" in refusal(str(folder))


def test_shards_of_different_data_sets_are_refused(folder: Path) -> None:
    write(folder / "part-3.parquet", 3)
    words = refusal(str(folder))
    assert "part-3.parquet has no column label" in words


@pytest.mark.parametrize("limit", [0, -3])
def test_a_limit_below_one_is_refused(folder: Path, limit: int) -> None:
    assert "limit" in refusal(str(folder), limit)


# --- cache ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "jem" / "index"


def test_a_second_opening_reads_no_footer(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = open_index(str(folder))
    assert len(list(cache.iterdir())) == 1
    monkeypatch.setattr(pq, "ParquetFile", None)
    second = open_index(str(folder))
    for name in ("uri", "files", "image_column", "label_column", "has_id", "classes"):
        assert getattr(first, name) == getattr(second, name)
    for name in ("file", "row_group", "rows", "start", "bytes"):
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name))
        assert getattr(first, name).dtype == getattr(second, name).dtype


@pytest.mark.usefixtures("cache")
def test_a_changed_shard_is_read_again(folder: Path) -> None:
    assert len(open_index(str(folder))) == 19
    write(folder / "part-1.parquet", 5, label=pa.array(np.zeros(5, np.int64)))
    assert len(open_index(str(folder))) == 21
    (folder / "part-1.parquet").unlink()
    assert len(open_index(str(folder))) == 16


@pytest.mark.parametrize("damage", [b"", b"nonsense", b"PK\x03\x04"])
def test_a_damaged_cache_is_made_anew(folder: Path, cache: Path, damage: bytes) -> None:
    open_index(str(folder))
    (file,) = cache.iterdir()
    file.write_bytes(damage)
    assert len(open_index(str(folder))) == 19
    assert len(file.read_bytes()) > 100


def test_a_cache_that_holds_a_pickle_is_not_loaded(folder: Path, cache: Path) -> None:
    open_index(str(folder))
    (file,) = cache.iterdir()
    with file.open("wb") as out:
        np.savez(out, head=np.array([{"files": []}], dtype=object))
    assert len(open_index(str(folder))) == 19


def test_a_cache_that_cannot_be_written_is_no_error(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "occupied").write_text("a file, not a folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "occupied"))
    assert len(open_index(str(folder))) == 19


def test_cifar_is_read_as_it_is(shared_data: Path) -> None:
    index = open_index(os.path.relpath(shared_data / "cifar10" / "train"))
    assert len(index) == 50_000
    assert index.rows.tolist() == [1000] * 50
    assert index.classes is not None
    assert index.classes[0] == "airplane"
    assert index.classes[9] == "truck"
