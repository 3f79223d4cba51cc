from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from pyarrow import fs as pafs

import jem.data.destination
import jem.data.ingest
import jem.data.shards
from jem.config import IngestConfig
from jem.data.decode import decode
from jem.data.index import open_index
from jem.data.ingest import ingest
from jem.errors import InputError, RunError

SMALL = {"shard_mb": 0.0025, "row_group_mb": 0.0011}
"""About ten pictures of some 260 bytes in a shard, four in a row group."""


class Count:
    """Stands for the progress bar."""

    def __init__(self, _description: str, total: int, done: int = 0) -> None:
        self.total, self.done = total, done
        Count.last = self

    def update(self, count: int, **_info: object) -> None:
        self.done += count

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None


@pytest.fixture
def serial(monkeypatch):
    """The tasks one after the other in this process, in place of Ray Data."""

    def each(function, rows, _prepared):
        for row in rows:
            yield json.loads(json.dumps(function(row)))

    monkeypatch.setattr(jem.data.ingest, "_each", each)


def picture(shade: int, size: tuple[int, int] = (9, 7), kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    noise = np.random.default_rng(shade).integers(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(noise).save(buffer, kind)
    return buffer.getvalue()


def make(root: Path, count: int, bad: tuple[int, ...] = (), classes: int = 3) -> Path:
    """Class folders with so many pictures, some of them text."""
    for number in range(count):
        file = root / f"class-{number % classes}" / f"{number:03d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"no image at all" if number in bad else picture(number))
    return root


def configured(source: Path, dest: Path, **settings) -> IngestConfig:
    return IngestConfig(source=str(source), dest=str(dest), **{**SMALL, **settings})


def rows(dest: Path) -> list[dict]:
    """All rows in storage order, as a reader finds them who knows nothing of ingest."""
    files = sorted(dest.glob("part-*.parquet"))
    return [row for file in files for row in pq.read_table(file).to_pylist()]


def content(dest: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(dest.iterdir())}


def check_whole(dest: Path, images: dict[str, bytes]) -> list[dict]:
    """A finished data set with just these images, dense ids in storage order, and nothing left over."""
    found = rows(dest)
    assert {row["image"]["path"]: row["image"]["bytes"] for row in found} == images
    assert len(found) == len(images)
    assert [row["id"] for row in found] == list(range(len(images)))
    parts = [f"part-{number:05d}.parquet" for number in range(len(list(dest.glob("part-*"))))]
    assert sorted(file.name for file in dest.iterdir()) == ["_jem.json", "_rejected.parquet", *parts]
    return found


def pictures(count: int, bad: tuple[int, ...] = (), classes: int = 3) -> dict[str, bytes]:
    return {f"class-{n % classes}/{n:03d}.png": picture(n) for n in range(count) if n not in bad}


# --- the data set -----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("serial")
def test_the_data_set_is_in_the_hugging_face_layout_with_sizes_and_dense_ids(tmp_path):
    result = ingest(configured(make(tmp_path / "in", 60), tmp_path / "out"), Count)
    found = check_whole(tmp_path / "out", pictures(60))
    assert (result.images, result.rejected, result.classes) == (60, 0, ("class-0", "class-1", "class-2"))
    assert result.shards > 3
    assert Count.last.done == Count.last.total == 60
    schema = pq.read_schema(tmp_path / "out/part-00000.parquet")
    assert schema.field("image").type == pa.struct({"bytes": pa.binary(), "path": pa.string()})
    assert [schema.field(name).type for name in ("label", "id", "height", "width")] == [
        pa.int64(),
        pa.int64(),
        pa.int32(),
        pa.int32(),
    ]
    features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
    assert features["label"] == {"names": ["class-0", "class-1", "class-2"], "_type": "ClassLabel"}
    assert list(features) == schema.names
    for row in found:
        assert (row["height"], row["width"]) == (7, 9)
        assert row["image"]["path"].startswith(f"class-{row['label']}/")
    index = open_index(str(tmp_path / "out"))
    assert (len(index), index.classes, index.has_id) == (60, result.classes, True)
    assert json.loads((tmp_path / "out/_jem.json").read_text())["images"] == 60


@pytest.mark.usefixtures("serial")
def test_row_groups_are_limited_by_bytes_and_by_rows_and_shards_by_bytes(tmp_path):
    source = make(tmp_path / "in", 80)
    for name, settings, most in (("bytes", {}, 4), ("rows", {"row_group_mb": 1, "row_group_rows": 3}, 3)):
        ingest(configured(source, tmp_path / name, **settings), Count)
        files = [pq.ParquetFile(file) for file in sorted((tmp_path / name).glob("part-*"))]
        groups = [file.metadata.row_group(group).num_rows for file in files for group in range(file.num_row_groups)]
        assert max(groups) == most
        sizes = [sum(len(cell["bytes"]) for cell in file.read()["image"].to_pylist()) for file in files]
        assert all(2000 < size < 3000 for size in sizes[:-1])


@pytest.mark.usefixtures("serial")
def test_the_order_is_mixed_and_depends_on_the_seed_alone(tmp_path):
    source = make(tmp_path / "in", 60)
    orders = []
    for name, settings in (("a", {}), ("b", {}), ("c", {"seed": 1}), ("d", {"shard_mb": 1.0})):
        ingest(configured(source, tmp_path / name, **settings), Count)
        orders.append([row["image"]["path"] for row in rows(tmp_path / name)])
    assert content(tmp_path / "a") == content(tmp_path / "b")
    assert orders[0] == orders[3]
    assert orders[0] != orders[2]
    assert sorted(orders[0]) != orders[0]
    first = [path.split("/")[0] for path in orders[0][:12]]
    assert len(set(first)) == 3


@pytest.mark.usefixtures("serial")
def test_bad_images_are_quarantined_and_ids_stay_dense(tmp_path):
    bad = (0, 7, 8, 9, 31, 59)
    source = make(tmp_path / "in", 60, bad)
    (source / "class-1/gone.jpg").symlink_to("nowhere")
    (source / "notes.txt").write_text("x")
    result = ingest(configured(source, tmp_path / "out"), Count)
    check_whole(tmp_path / "out", pictures(60, bad))
    assert (result.images, result.rejected) == (54, 7)
    assert result.reasons == {"not an image": 6, "link to nothing": 1}
    assert result.ignored == {".txt": 1}
    table = pq.read_table(tmp_path / "out/_rejected.parquet").to_pylist()
    assert [row["path"] for row in table] == sorted(["class-1/gone.jpg", *(f"class-{n % 3}/{n:03d}.png" for n in bad)])
    assert {row["bytes"] for row in table} == {0, 15}
    assert result.examples[0] == ("class-0/000.png", table[0]["reason"])
    assert "b'no image at all'" in table[0]["reason"]


@pytest.mark.usefixtures("serial")
def test_a_shard_of_bad_images_only_leaves_no_hole(tmp_path):
    source = make(tmp_path / "in", 12, (3,))
    ingest(configured(source, tmp_path / "out", shard_mb=0.00001, max_rejected=1.0), Count)
    check_whole(tmp_path / "out", pictures(12, (3,)))
    assert len(list((tmp_path / "out").glob("part-*"))) == 11


@pytest.mark.usefixtures("serial")
def test_unlabelled_sources_have_no_label_column(tmp_path):
    for number in range(5):
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / f"in/{number}.png").write_bytes(picture(number))
    assert ingest(configured(tmp_path / "in", tmp_path / "out"), Count).kind == "flat"
    assert pq.read_schema(tmp_path / "out/part-00000.parquet").names == ["image", "id", "height", "width"]


@pytest.mark.usefixtures("serial")
def test_large_images_are_shrunk_once_and_small_ones_kept_byte_for_byte(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/large.jpg").write_bytes(picture(0, (300, 200), "JPEG"))
    (tmp_path / "in/small.png").write_bytes(picture(1, (50, 40)))
    ingest(configured(tmp_path / "in", tmp_path / "out", short_side=50), Count)
    found = {row["image"]["path"]: row for row in rows(tmp_path / "out")}
    assert found["small.png"]["image"]["bytes"] == picture(1, (50, 40))
    large = found["large.jpg"]
    assert (large["height"], large["width"]) == (50, 75)
    assert decode(large["image"]["bytes"], 10**6).shape == (50, 75, 3)


@pytest.mark.usefixtures("serial")
def test_parquet_sources_keep_every_row_and_label(tmp_path):
    first = make(tmp_path / "in", 50)
    ingest(configured(first, tmp_path / "once"), Count)
    result = ingest(configured(tmp_path / "once", tmp_path / "twice", seed=3), Count)
    assert result.kind == "parquet"
    found = check_whole(tmp_path / "twice", pictures(50))
    assert all(row["image"]["path"].startswith(f"class-{row['label']}/") for row in found)
    assert [row["image"]["path"] for row in found] != [row["image"]["path"] for row in rows(tmp_path / "once")]


@pytest.mark.usefixtures("serial")
def test_uris_are_read_and_written(tmp_path):
    make(tmp_path / "in", 30, (4,))
    config = IngestConfig(source=f"local://{tmp_path}/in", dest=f"local://{tmp_path}/out", **SMALL)
    ingest(config, Count)
    check_whole(tmp_path / "out", pictures(30, (4,)))
    with pytest.raises(InputError, match="finished data set"):
        ingest(config, Count)
    ingest(config.model_copy(update={"overwrite": True, "seed": 2}), Count)
    check_whole(tmp_path / "out", pictures(30, (4,)))


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("serial")
def test_too_many_bad_images_stop_it_with_nothing_finished(tmp_path):
    source = make(tmp_path / "in", 40, tuple(range(10)))
    with pytest.raises(InputError, match=r"\d+ of 40 images are bad \(\d+ not an image\), more than max_rejected 0.1"):
        ingest(configured(source, tmp_path / "out", max_rejected=0.1), Count)
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["_unfinished"]
    with pytest.raises(InputError, match="is not finished: repeat"):
        open_index(str(tmp_path / "out"))
    ingest(configured(source, tmp_path / "out", max_rejected=0.25), Count)
    check_whole(tmp_path / "out", pictures(40, tuple(range(10))))


@pytest.mark.usefixtures("serial")
def test_a_source_of_bad_images_only_makes_no_data_set(tmp_path):
    source = make(tmp_path / "in", 5, tuple(range(5)))
    with pytest.raises(InputError, match=r"5 of 5 images are bad .*mend the source$"):
        ingest(configured(source, tmp_path / "out", max_rejected=1.0), Count)


@pytest.mark.usefixtures("serial")
def test_a_finished_data_set_is_replaced_only_when_told_so(tmp_path):
    ingest(configured(make(tmp_path / "in", 40), tmp_path / "out"), Count)
    before = content(tmp_path / "out")
    other = make(tmp_path / "other", 9)
    with pytest.raises(InputError, match="finished data set: replace it with --overwrite"):
        ingest(configured(other, tmp_path / "out"), Count)
    assert content(tmp_path / "out") == before
    ingest(configured(other, tmp_path / "out", overwrite=True), Count)
    check_whole(tmp_path / "out", pictures(9))


@pytest.mark.usefixtures("serial")
@pytest.mark.parametrize(
    ("dest", "message"),
    [
        ("in", "lies in SOURCE"),
        ("in/out", "lies in SOURCE"),
        ("full", r"holds other files \(mine.txt\): choose an empty or a new folder"),
        ("parts", "holds other files"),
        ("file", "is a file: give a folder"),
        ("file/out", "cannot"),
    ],
)
def test_destinations_that_are_not_free_are_left_as_they_are(tmp_path, dest, message):
    make(tmp_path / "in", 3)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine.txt").write_text("mine")
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts/part-00000.parquet").write_text("another program's")
    (tmp_path / "file").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    for overwrite in (False, True):
        with pytest.raises(InputError, match=message):
            ingest(configured(tmp_path / "in", tmp_path / dest, overwrite=overwrite), Count)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.usefixtures("serial")
def test_a_source_that_is_not_there_writes_nothing(tmp_path):
    with pytest.raises(InputError, match="no source at"):
        ingest(configured(tmp_path / "none", tmp_path / "out"), Count)
    assert list(tmp_path.iterdir()) == []


# --- interruption -----------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Stands for the end of the process."""


class Storage:
    """A local file system whose user dies at its `last` change of a file or folder, before or after it."""

    CHANGES = ("move", "delete_file", "delete_dir", "create_dir", "open_output_stream")

    def __init__(self, last: int, *, after: bool) -> None:
        self._inner, self._last, self._after = pafs.LocalFileSystem(), last, after
        self.changes = 0

    def __getattr__(self, name: str):
        method = getattr(self._inner, name)
        if name not in self.CHANGES:
            return method

        def change(*args, **options):
            self.changes += 1
            if self.changes > self._last:
                raise Killed
            if self.changes == self._last and not self._after:
                raise Killed
            done = method(*args, **options)
            if self.changes == self._last:
                raise Killed
            return done

        return change


def interrupted(monkeypatch, config: IngestConfig, last: int, *, after: bool) -> int:
    """Ingest until the `last` change; return how many there were."""
    storage = Storage(last, after=after)

    def resolve(uri: str):
        return storage, str(Path(uri).absolute())

    with monkeypatch.context() as patch:
        patch.setattr(jem.data.destination, "resolve", resolve)
        patch.setattr(jem.data.shards, "resolve", resolve)
        patch.setattr(jem.data.destination, "THREADS", 1)
        with contextlib.suppress(Killed):
            ingest(config, Count)
    return storage.changes


@pytest.mark.usefixtures("serial")
@pytest.mark.parametrize("replaces", [False, True])
def test_killed_at_any_change_it_goes_on_to_the_same_data_set(tmp_path, monkeypatch, replaces):
    source = make(tmp_path / "in", 24, (5, 6))
    old = make(tmp_path / "old", 30)
    ingest(configured(source, tmp_path / "whole"), Count)
    whole = content(tmp_path / "whole")

    def dest(name: str) -> Path:
        if replaces:
            ingest(configured(old, tmp_path / name), Count)
        return tmp_path / name

    changes = interrupted(monkeypatch, configured(source, dest("count"), overwrite=replaces), 10**6, after=False)
    assert content(tmp_path / "count") == whole
    assert changes > 20
    for last in range(1, changes + 1):
        for after in (False, True):
            folder = dest(f"{last}-{after}")
            config = configured(source, folder, overwrite=replaces)
            interrupted(monkeypatch, config, last, after=after)
            if (folder / "_jem.json").exists():  # still the old one, or already the new one: then it is whole
                expected = json.loads((folder / "_jem.json").read_text())["images"]
                assert [row["id"] for row in rows(folder)] == list(range(expected))
                config = config.model_copy(update={"overwrite": True})
            result = ingest(config, Count)
            assert result.images == 22
            assert content(folder) == whole


@pytest.mark.usefixtures("serial")
def test_finished_shards_are_not_read_again(tmp_path, monkeypatch):
    source = make(tmp_path / "in", 40, (2,))
    config = configured(source, tmp_path / "out")
    interrupted(monkeypatch, config, 15, after=True)
    finished = {file: file.stat().st_mtime_ns for file in (tmp_path / "out/_unfinished").glob("shard-*.json")}
    assert 2 <= len(finished) < 5
    written = []
    monkeypatch.setattr(
        jem.data.ingest,
        "write_shard",
        lambda work, number, source: written.append(number) or jem.data.shards.write_shard(work, number, source),
    )
    result = ingest(config, Count)
    assert result.continued
    assert min(written) == len(finished)
    check_whole(tmp_path / "out", pictures(40, (2,)))


@pytest.mark.usefixtures("serial")
@pytest.mark.parametrize(
    ("settings", "changed"),
    [({"seed": 1}, "seed"), ({"short_side": 5}, "short_side"), ({"shard_mb": 0.1}, "shard_mb"), (None, "source")],
)
def test_an_interrupted_ingest_goes_on_only_as_it_was(tmp_path, monkeypatch, settings, changed):
    source = make(tmp_path / "in", 40)
    interrupted(monkeypatch, configured(source, tmp_path / "out"), 12, after=True)
    if settings is None:
        (source / "class-0/000.png").write_bytes(picture(1000, (8, 8)))
    before = content(tmp_path / "out/_unfinished")
    with pytest.raises(InputError, match=f"unfinished ingest with another {changed}.*--overwrite"):
        ingest(configured(source, tmp_path / "out", **(settings or {})), Count)
    assert content(tmp_path / "out/_unfinished") == before
    result = ingest(configured(source, tmp_path / "out", overwrite=True, **(settings or {})), Count)
    assert (result.images, result.continued) == (40, False)


@pytest.mark.usefixtures("serial")
def test_a_full_disk_is_one_line_and_can_be_gone_on_from(tmp_path, monkeypatch):
    config = configured(make(tmp_path / "in", 20), tmp_path / "out")

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(jem.data.shards._ShardWriter, "_flush", full)
        with pytest.raises(RunError, match=r"No space left on device.*repeat the command"):
            ingest(config, Count)
    assert list((tmp_path / "out/_unfinished").glob("*.tmp")) == []
    ingest(config, Count)
    check_whole(tmp_path / "out", pictures(20))


# --- on Ray -----------------------------------------------------------------------------------------------------------


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_on_ray_it_makes_the_same_data_set_and_leaves_its_settings_alone(tmp_path, monkeypatch):
    import ray.data

    source = make(tmp_path / "in", 60, (0, 7, 31))
    bars = ray.data.DataContext.get_current().enable_progress_bars
    result = ingest(configured(source, tmp_path / "ray"), Count)
    assert ray.data.DataContext.get_current().enable_progress_bars == bars
    check_whole(tmp_path / "ray", pictures(60, (0, 7, 31)))
    assert result.reasons == {"not an image": 3}
    assert Count.last.done == 60
    monkeypatch.setattr(jem.data.ingest, "_each", lambda function, some, _: map(function, some))
    ingest(configured(source, tmp_path / "serial"), Count)
    assert content(tmp_path / "ray") == content(tmp_path / "serial")


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_a_failing_task_is_one_line(tmp_path):
    source = make(tmp_path / "in", 20)
    ingest(configured(source, tmp_path / "once"), Count)
    config = configured(tmp_path / "once", tmp_path / "twice")
    prepared = jem.data.ingest.prepare(config)
    part = next((tmp_path / "once").glob("part-*"))
    part.write_bytes(part.read_bytes()[:-100])
    with pytest.raises(
        RunError, match=r"^ingest stopped: cannot read row group \d of .*part-0000\d.*: mend or remove that file$"
    ):
        jem.data.ingest.run(prepared, Count)


KILLED = """
import os, signal, sys
import ray
import jem.data.ingest
from jem.config import IngestConfig
from jem.progress import Progress

ray.init("local", num_cpus=2, include_dashboard=False, object_store_memory=100 * 2**20, log_to_driver=False)
each = jem.data.ingest._each

def until_three(*args):
    for count, result in enumerate(each(*args), 1):
        yield result
        if count == 3:
            os.kill(os.getpid(), signal.SIGKILL)

jem.data.ingest._each = until_three
jem.data.ingest.ingest(IngestConfig.model_validate_json(sys.argv[1]), Progress)
"""


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_killed_with_its_ray_it_goes_on(tmp_path):
    source = make(tmp_path / "in", 120, (3, 50))
    config = configured(source, tmp_path / "out")
    environment = {**os.environ, "RAY_ADDRESS": "local"}
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, config.model_dump_json()], env=environment, timeout=240, check=False
    )
    assert killed.returncode == -signal.SIGKILL
    unfinished = tmp_path / "out/_unfinished"
    assert len(list(unfinished.glob("shard-*.json"))) >= 3
    result = ingest(config, Count)
    assert result.continued
    check_whole(tmp_path / "out", pictures(120, (3, 50)))


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_the_photographs_come_in_whole(shared_data, tmp_path):
    result = ingest(IngestConfig(source=str(shared_data / "photos"), dest=str(tmp_path / "out"), shard_mb=16), Count)
    assert (result.images, result.rejected, result.kind, result.shards) == (400, 0, "flat", 3)
    found = rows(tmp_path / "out")
    assert [row["id"] for row in found] == list(range(400))
    for row in found[::50]:
        file = shared_data / "photos" / row["image"]["path"]
        assert row["image"]["bytes"] == file.read_bytes()
        assert (row["width"], row["height"]) == Image.open(file).size
