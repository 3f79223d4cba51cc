"""Reading without Ray: the right image under each id, in the plan's order, and errors that name the image."""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from jem.batch import Batch
from jem.config import StreamConfig
from jem.data.decode import decode_canvas
from jem.data.index import Index, open_index
from jem.data.plan import Plan, Position
from jem.data.read import Rows, _cells, as_batch, local_batches, read_rows, read_window, why_lost
from jem.errors import RunError

LIMIT = 10**6


def colours(number: int) -> tuple[int, int, int]:
    """A colour of each number's own."""
    return number % 256, number // 256, 77


def picture(number: int, width: int = 8, height: int = 8) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), colours(number)).save(buffer, "PNG")
    return buffer.getvalue()


def write(path: Path, numbers: list[int], group: int, **columns: pa.Array) -> None:
    images = [{"bytes": picture(number), "path": f"{number}.png"} for number in numbers]
    pq.write_table(pa.table({"image": images, **columns}), path, row_group_size=group)


@pytest.fixture
def numbered(tmp_path: Path) -> Index:
    """300 images, each of a colour that tells its position, in three shards; no ids."""
    for shard in range(3):
        numbers = list(range(shard * 100, shard * 100 + 100))
        write(tmp_path / f"{shard}.parquet", numbers, 30, label=pa.array(np.array(numbers) % 10))
    return open_index(str(tmp_path))


def told(image: torch.Tensor) -> torch.Tensor:
    """The numbers that the colours of (N, 3, S, S) tell."""
    return image[:, 0, 0, 0].long() + 256 * image[:, 1, 0, 0].long()


def test_each_image_comes_under_its_id_with_its_label(numbered: Index) -> None:
    plan = Plan(numbered.rows, seed=0, batch_size=20, world=2)
    seen = []
    for rank in range(2):
        for batch in local_batches(numbered, plan, StreamConfig(canvas=8), rank, Position(0, 0), 1):
            torch.testing.assert_close(told(batch.image), batch.id)
            torch.testing.assert_close(batch.label, batch.id % 10)
            assert (batch.image[:, 2] == 77).all()
            seen += batch.id.tolist()
    assert sorted(seen) == list(range(300))


def test_a_batch_has_the_types_and_shapes_of_the_contract(numbered: Index) -> None:
    plan = Plan(numbered.rows, seed=0, batch_size=16, world=1)
    batch = next(local_batches(numbered, plan, StreamConfig(canvas=24), 0, Position(0, 0), 1))
    assert batch.image.shape == (16, 3, 24, 24)
    assert batch.image.dtype == torch.uint8
    assert batch.image.is_contiguous(memory_format=torch.channels_last)
    assert (batch.size.shape, batch.size.dtype) == ((16, 2), torch.int32)
    assert (batch.id.shape, batch.id.dtype) == ((16,), torch.int64)
    assert (batch.label.shape, batch.label.dtype) == ((16,), torch.int64)
    assert len(batch) == 16


def test_stopping_and_starting_again_gives_the_same_batches(numbered: Index) -> None:
    plan = Plan(numbered.rows, seed=0, batch_size=32, world=2, remainder="carry")
    stream = StreamConfig(canvas=8)
    whole = list(local_batches(numbered, plan, stream, 1, Position(0, 0), 3))
    for number in (0, 1, 7, 9, 10, 27):
        rest = list(local_batches(numbered, plan, stream, 1, plan.position(number), 3))
        assert len(rest) == len(whole) - number
        for batch, expected in zip(rest, whole[number:], strict=True):
            assert torch.equal(batch.id, expected.id)
            assert torch.equal(batch.image, expected.image)


def test_consumed_images_are_not_decoded(numbered: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded = []
    real = decode_canvas

    def count(data: bytes, *args: object, **kwargs: object) -> object:
        decoded.append(data)
        return real(data, *args, **kwargs)

    monkeypatch.setattr("jem.data.read.decode_canvas", count)
    plan = Plan(numbered.rows, seed=0, batch_size=10, world=1)
    assert plan.window_steps() == 3
    assert len(list(local_batches(numbered, plan, StreamConfig(canvas=8), 0, Position(0, 25), 1))) == 5
    assert len(decoded) == 50


def test_ids_of_the_data_set_are_kept(tmp_path: Path) -> None:
    ids = np.random.default_rng(0).permutation(50) + 1000
    write(tmp_path / "a.parquet", list(range(50)), 20, id=pa.array(ids))
    batch = read_rows(open_index(str(tmp_path)), np.arange(50), 8, LIMIT)
    assert batch.id.tolist() == ids.tolist()
    assert told(batch.image).tolist() == list(range(50))
    assert (batch.label == -1).all()


def test_missing_labels_are_minus_one(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", [0, 1, 2], 2, label=pa.array([4, None, 6], pa.int16()))
    assert read_rows(open_index(str(tmp_path)), [2, 1, 0], 8, LIMIT).label.tolist() == [6, -1, 4]


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary()])
def test_images_in_a_plain_column_are_read(tmp_path: Path, kind: pa.DataType) -> None:
    data = pa.array([picture(number) for number in range(5)], kind)
    pq.write_table(pa.table({"jpg": data, "text": ["a"] * 5}), tmp_path / "a.parquet", row_group_size=2)
    assert told(read_rows(open_index(str(tmp_path)), [4, 0, 3], 8, LIMIT).image).tolist() == [4, 0, 3]


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary()])
def test_the_bytes_of_a_column_are_had_where_they_are(kind: pa.DataType) -> None:
    values = pa.array([b"one", None, b"", b"three" * 50, b"\xff\xd8"], kind)
    column = pa.chunked_array([values, values[1:4], values[:0], values[1:2], pa.array([], kind)])
    cells = _cells(column)
    assert cells == [value or b"" for value in column.to_pylist()]
    assert cells[4][:2] == b"\xff\xd8"
    where = values.buffers()[2].address
    assert where <= np.frombuffer(cells[3], np.uint8).__array_interface__["data"][0] < where + len(b"one") + 250


def test_a_few_rows_do_not_keep_their_row_group_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jem.data.read.SMALL_BYTES", 0)  # as for photographs
    write(tmp_path / "a.parquet", list(range(8)), group=8)
    index = open_index(str(tmp_path))
    few, _, _ = Rows(index, np.zeros(6, np.int64), np.array([5, 5, 5, 5, 2, 2])).encoded()
    assert [type(value) for value in few] == [bytes] * 6
    every, _, _ = Rows(index, np.zeros(8, np.int64), np.arange(8)).encoded()
    assert [type(value) for value in every] == [memoryview] * 8
    assert [every[5], every[2]] == [few[0], few[4]]


@pytest.mark.parametrize("small", [0, 2**14])
def test_a_row_without_an_image_is_an_empty_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: int) -> None:
    monkeypatch.setattr("jem.data.read.SMALL_BYTES", small)
    pq.write_table(pa.table({"image": pa.array([picture(0), None, b""])}), tmp_path / "a.parquet")
    index = open_index(str(tmp_path))
    assert told(read_rows(index, [0], 8, LIMIT).image).tolist() == [0]
    for missing in (1, 2):
        with pytest.raises(RunError, match="empty file"):
            read_rows(index, [0, missing], 8, LIMIT)


def test_rows_come_in_the_order_asked_for_and_as_often(numbered: Index) -> None:
    wanted = [299, 0, 150, 0, 31]
    batch = read_rows(numbered, wanted, 8, LIMIT)
    assert batch.id.tolist() == wanted
    assert told(batch.image).tolist() == wanted
    assert len(read_rows(numbered, [], 8, LIMIT)) == 0
    for outside in (-1, 300):
        with pytest.raises(IndexError, match=r"0 \.\.\. 299"):
            read_rows(numbered, [outside], 8, LIMIT)


def test_a_limit_leaves_the_other_rows_out(numbered: Index) -> None:
    index = open_index(numbered.uri, limit=115)
    plan = Plan(index.rows, seed=0, batch_size=5, world=1)
    ids = [number for b in local_batches(index, plan, StreamConfig(canvas=8), 0, Position(0, 0), 1) for number in b.id]
    assert sorted(map(int, ids)) == list(range(115))


def test_a_shard_listed_twice_gives_its_images_twice_under_ids_of_their_own(numbered: Index) -> None:
    index = open_index([numbered.files[1], numbered.files[0], numbered.files[1]])
    plan = Plan(index.rows, seed=0, batch_size=10, world=2)
    ids, numbers = [], []
    for rank in range(2):
        for batch in local_batches(index, plan, StreamConfig(canvas=8), rank, Position(0, 0), 1):
            ids += batch.id.tolist()
            numbers += told(batch.image).tolist()
    assert sorted(ids) == list(range(300))
    assert sorted(numbers) == sorted([*range(100), *range(100, 200), *range(100, 200)])


def test_size_is_that_of_the_image_before_it_was_squashed(tmp_path: Path) -> None:
    images = [{"bytes": picture(1, width=30, height=20), "path": ""}, {"bytes": picture(2, 7, 40), "path": ""}]
    pq.write_table(pa.table({"image": images}), tmp_path / "a.parquet")
    batch = read_rows(open_index(str(tmp_path)), [0, 1], 16, LIMIT)
    assert batch.size.tolist() == [[20, 30], [40, 7]]
    assert batch.image.shape == (2, 3, 16, 16)


@pytest.mark.parametrize(("data", "reason"), [(b"text", ""), (b"", "empty"), (None, "empty")])
def test_an_image_that_cannot_be_decoded_is_named_with_the_remedy(
    tmp_path: Path, data: bytes | None, reason: str
) -> None:
    images = [{"bytes": picture(number), "path": ""} for number in range(9)]
    images[7]["bytes"] = data
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    pq.write_table(pa.table({"image": pa.array(images, kind)}), tmp_path / "a.parquet", row_group_size=5)
    index = open_index(str(tmp_path))
    assert read_rows(index, [6, 8], 8, LIMIT).id.tolist() == [6, 8]
    with pytest.raises(RunError) as caught:
        read_rows(index, range(9), 8, LIMIT)
    words = str(caught.value)
    assert f"row 2 of row group 1 of {tmp_path / 'a.parquet'}" in words
    assert reason in words
    assert "jem ingest" in words
    assert "\n" not in words


def test_the_pixel_limit_holds(numbered: Index) -> None:
    with pytest.raises(RunError, match="pixel"):
        read_rows(numbered, [0], 8, pixel_limit=63)


def test_a_shard_that_went_away_is_named(numbered: Index) -> None:
    Path(numbered.files[2]).unlink()
    with pytest.raises(RunError, match=r"cannot read .*2\.parquet"):
        read_rows(numbered, [0, 250], 8, LIMIT)


def test_a_shard_that_was_replaced_by_a_shorter_one_is_named(numbered: Index) -> None:
    write(Path(numbered.files[2]), [1, 2, 3], 30, label=pa.array([1, 2, 3]))
    for row in (210, 299):
        with pytest.raises(RunError, match=r"cannot read .*2\.parquet"):
            read_rows(numbered, [0, row], 8, LIMIT)


def truncate(path: str) -> None:
    whole = Path(path).read_bytes()
    Path(path).write_bytes(whole[: len(whole) // 2])


@pytest.mark.parametrize("harm", [truncate, lambda path: Path(path).unlink()], ids=["truncated", "gone"])
@pytest.mark.parametrize("world", [1, 2])
def test_others_stand_in_for_a_lost_shard_and_all_else_is_as_it_was(
    numbered: Index, harm: Callable[[str], None], world: int
) -> None:
    plan = Plan(numbered.rows, seed=0, batch_size=20, world=world, parts=2)
    stream = StreamConfig(canvas=8)

    def seen(counted: Callable[[np.ndarray], None] | None) -> list[Batch]:
        return [
            batch
            for rank in range(world)
            for batch in local_batches(numbered, plan, stream, rank, Position(0, 0), 1, counted)
        ]

    lost: list[int] = []
    whole = seen(lambda positions: lost.extend(positions.tolist()))
    assert lost == []
    harm(numbered.files[1])
    found = seen(lambda positions: lost.extend(positions.tolist()))
    assert sorted(lost) == list(range(100, 200)), "each once"
    again: list[int] = []
    for batch, same in zip(found, seen(lambda positions: again.extend(positions.tolist())), strict=True):
        assert torch.equal(batch.id, same.id)
        assert torch.equal(batch.image, same.image)
    assert again == lost
    ids, were = torch.cat([batch.id for batch in found]), torch.cat([batch.id for batch in whole])
    kept = (were < 100) | (were >= 200)
    assert torch.equal(ids[kept], were[kept])
    assert ((ids < 100) | (ids >= 200)).all()
    assert len(ids[~kept].unique()) > 50, "many, not one again and again"
    for batch in found:
        torch.testing.assert_close(told(batch.image), batch.id)
        torch.testing.assert_close(batch.label, batch.id % 10)
    with pytest.raises(RunError, match=r"cannot read .*1\.parquet"):
        seen(None)
    assert "1.parquet" in why_lost(numbered, 150, 8, LIMIT)


def test_what_stands_in_for_a_lost_image_depends_on_nothing_else(numbered: Index) -> None:
    truncate(numbered.files[1])
    stands_in = {}
    for wanted in ([150, 3, 151], [299, 151], [150]):
        batch = read_rows(numbered, wanted, 8, LIMIT, replace=True)
        for position, number in zip(wanted, batch.id.tolist(), strict=True):
            assert stands_in.setdefault(position, number) == number
    assert stands_in[3] == 3
    assert stands_in[150] != stands_in[151]


def test_another_stands_in_for_one_image_that_cannot_be_decoded(tmp_path: Path) -> None:
    images = [{"bytes": picture(number), "path": ""} for number in range(9)]
    images[7]["bytes"] = b"text"
    pq.write_table(pa.table({"image": images}), tmp_path / "a.parquet", row_group_size=9)
    index = open_index(str(tmp_path))
    arrays = Rows(index, np.zeros(9, int), np.arange(9), replace=True).decode(0, 9, 8, LIMIT)
    assert arrays["lost"].tolist() == [-1] * 7 + [7, -1]
    assert arrays["id"].tolist() == [0, 1, 2, 3, 4, 5, 6, 8, 8]
    with pytest.raises(RunError, match="row 7 of row group 0"):
        read_rows(index, [7], 8, LIMIT)


def test_where_nothing_can_stand_in_it_ends_with_a_reason(numbered: Index) -> None:
    for file in numbered.files:
        truncate(file)
    with pytest.raises(RunError, match=r"cannot read .*0\.parquet, nor 16 others"):
        read_rows(numbered, [0], 8, LIMIT, replace=True)


@pytest.mark.parametrize(("together", "counts"), [(1, [1, 1]), (2, [2]), (9, [2])])
def test_a_window_is_decoded_so_many_batches_at_a_time(numbered: Index, together: int, counts: list[int]) -> None:
    plan = Plan(numbered.rows, seed=0, batch_size=10, world=1)
    window = next(plan.windows(0, Position(0, 1), 1))
    made = list(read_window(numbered, plan, window, 8, LIMIT, together))
    assert [arrays["image"].shape for arrays in made] == [(count, 10, 8, 8, 3) for count in counts]
    wanted = [
        batch.id.tolist() for batch in local_batches(numbered, plan, StreamConfig(canvas=8), 0, Position(0, 1), 1)
    ]
    assert [ids for arrays in made for ids in arrays["id"].tolist()] == wanted[:2]


@pytest.mark.filterwarnings("error")
def test_arrays_become_tensors_without_a_copy() -> None:
    arrays = {
        "image": np.zeros((2, 4, 4, 3), np.uint8),
        "size": np.zeros((2, 2), np.int32),
        "id": np.arange(2),
        "label": np.arange(2),
    }
    batch = as_batch(arrays)
    arrays["image"][1, 2, 3, 0] = 9
    assert batch.image[1, 0, 2, 3] == 9
    arrays["image"].setflags(write=False)  # as in Ray's object store
    assert as_batch(arrays).image[1, 0, 2, 3] == 9
    assert as_batch(arrays).image.data_ptr() == arrays["image"].ctypes.data


def test_index_and_order_are_had_without_torch_and_ray() -> None:
    heavy = "[name for name in ('torch', 'ray', 'mlflow') if name in sys.modules]"
    code = f"import sys, jem.data.plan, jem.data.index; print({heavy})"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert found.stdout.strip() == "[]"


def test_cifar_is_decoded_as_pillow_decodes_it(shared_data: Path) -> None:
    index = open_index(str(shared_data / "cifar10" / "test"))
    batch = read_rows(index, [5000, 17], 32, LIMIT)
    table = pq.read_table(index.files[0])
    for row, image, label in zip([5000, 17], batch.image, batch.label, strict=True):
        stored = table.slice(row, 1).to_pylist()[0]
        expected = np.asarray(Image.open(io.BytesIO(stored["image"]["bytes"])).convert("RGB"))
        difference = np.abs(image.permute(1, 2, 0).numpy().astype(int) - expected)
        assert difference.max() <= 2
        assert label == stored["label"]
