"""Cached images: the stream's batches, without decoding again; and what does not fit is refused."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from jem.config import PretrainConfig, StreamConfig
from jem.data.cache import cached_batches, check_cache, fill
from jem.data.index import Index, open_index
from jem.data.plan import Plan, Position
from jem.data.read import local_batches
from jem.errors import InputError, RunError

STREAM = StreamConfig(canvas=16, cache=1.0)


def picture(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8 + number % 5, 8), (number % 256, number // 256, 77)).save(buffer, "PNG")
    return buffer.getvalue()


def write(folder: Path, count: int, broken: int | None = None) -> Index:
    images = [{"bytes": picture(number) if number != broken else b"text", "path": ""} for number in range(count)]
    table = pa.table({"image": images, "label": np.arange(count) % 10, "id": np.arange(count) + 1000})
    pq.write_table(table, folder / "a.parquet", row_group_size=30)
    return open_index(str(folder))


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_batches_are_those_of_the_stream_from_any_position_on(tmp_path: Path) -> None:
    index = write(tmp_path, 250)
    cache = fill(index, STREAM)
    (tmp_path / "a.parquet").unlink()  # nothing is read again
    plan = Plan(index.rows, seed=3, batch_size=20, world=2, remainder="carry")
    for rank, start in ((0, Position(0, 0)), (1, Position(1, 5))):
        found = list(cached_batches(index, plan, STREAM, rank, start, 3, cache=cache))
        write(tmp_path, 250)
        wanted = list(local_batches(index, plan, STREAM, rank, start, 3))
        assert len(found) == len(wanted) > 0
        for batch, same in zip(found, wanted, strict=True):
            for name in ("id", "label", "size", "image"):
                assert torch.equal(getattr(batch, name), getattr(same, name))
            assert batch.image.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_an_image_that_cannot_be_decoded_is_named_in_one_line(tmp_path: Path) -> None:
    index = write(tmp_path, 50, broken=37)
    with pytest.raises(RunError, match=r"row 7 of row group 1 of .*a\.parquet") as caught:
        fill(index, STREAM)
    assert "\n" not in str(caught.value)


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_without_a_free_cpu_it_ends_with_a_reason(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="one decode task asks for 400 CPUs"):
        fill(write(tmp_path, 30), StreamConfig(canvas=16, cache=1.0, decode_cpus=400), deadline=1)


def test_what_is_larger_than_the_limit_or_the_store_is_refused(tmp_path: Path) -> None:
    index = write(tmp_path, 250)  # 250 x 16 x 16 x 3 = 192,000 bytes
    check_cache(index, StreamConfig(canvas=16, cache=0.000192), [1e9])
    with pytest.raises(InputError, match=r"take 0\.000192 GB decoded, more than stream\.cache 0\.000191"):
        check_cache(index, StreamConfig(canvas=16, cache=0.000191), [1e9])
    with pytest.raises(InputError, match=r"more than 60% of the smallest node's object store of 0\.0003 GB"):
        check_cache(index, StreamConfig(canvas=16, cache=1), [1e9, 3e5])


def test_a_pool_of_augmentation_actors_has_no_use_for_it() -> None:
    with pytest.raises(ValueError, match=r"stream\.cache is read by the train workers"):
        PretrainConfig(data="x", stream=StreamConfig(cache=1), augment={"placement": "pool"})  # type: ignore[arg-type]
