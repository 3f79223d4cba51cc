"""A data set and a run's folder in an object store that is not Amazon's, as the environment gives it."""

from __future__ import annotations

import json

import pytest
import torch
from pyarrow import fs

from jem.data.destination import Destination
from jem.data.index import open_index
from jem.data.read import read_rows
from jem.data.storage import written
from jem.errors import InputError
from pipelines.folder import RunFolder
from tests.cluster import BUCKET, object_store


@pytest.fixture(scope="module")
def bucket(tmp_path_factory):
    """The URI of an empty bucket, to which this process's environment leads."""
    with object_store(tmp_path_factory.mktemp("s3")) as settings, pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        yield f"s3://{BUCKET}"


def test_a_data_set_reads_as_it_does_from_the_disk(bucket, digits_test):
    filesystem, path = fs.FileSystem.from_uri(f"{bucket}/digits")
    fs.copy_files(str(digits_test), path, destination_filesystem=filesystem)
    local, there = open_index(str(digits_test)), open_index(f"{bucket}/digits")
    assert len(there) == len(local) == 360
    assert there.classes == local.classes
    rows = [0, 199, 200, 359]
    expected, found = (read_rows(index, rows, 32, 10**6) for index in (local, there))
    assert torch.equal(expected.image, found.image)
    assert torch.equal(expected.id, found.id)
    assert len(open_index(f"{bucket}/digits/*.parquet")) == 360


def test_a_finished_data_set_is_not_written_over(bucket):
    filesystem, path = fs.FileSystem.from_uri(f"{bucket}/finished")
    Destination(f"{bucket}/finished").check_free(overwrite=False)
    with written(filesystem, f"{path}/_jem.json") as out:
        out.write(b"{}")
    assert [info.base_name for info in filesystem.get_file_info(fs.FileSelector(path))] == ["_jem.json"]
    with pytest.raises(InputError, match="finished data set: replace it with --overwrite"):
        Destination(f"{bucket}/finished").check_free(overwrite=False)


def test_a_runs_folder_is_written_listed_and_read(bucket):
    folder = RunFolder.at(f"{bucket}/runs", "one")
    assert not folder.exists()
    folder.check_writable()
    assert not folder.exists()
    folder.write("seed: 1\n", {"status": "running"})
    folder.note({"status": "stopped"})
    assert folder.read() == ("seed: 1\n", {"status": "stopped"})
    assert RunFolder.at(f"{bucket}/runs", "two").others() == ["one"]
    filesystem, path = fs.FileSystem.from_uri(f"{bucket}/runs/one/run.json")
    with filesystem.open_input_stream(path) as stream:
        assert json.loads(stream.read()) == {"status": "stopped"}


def test_a_bucket_that_there_is_not_is_named(bucket):
    with pytest.raises(InputError, match=r"s3://nosuch/runs is not writable \(Bucket 'nosuch' not found"):
        RunFolder.at("s3://nosuch/runs", "one").check_writable()
    with pytest.raises(InputError, match="no data at s3://nosuch/digits"):
        open_index("s3://nosuch/digits")


def test_a_store_that_does_not_answer_is_named(monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")  # where nobody listens
    with pytest.raises(InputError, match=r"storage s3://jem/runs cannot be read \(.*Could not connect"):
        RunFolder.at("s3://jem/runs", "one").exists()


@pytest.mark.parametrize("uri", ["s3://jem/runs?endpoint_override=127.0.0.1:9000", "s3://jem/runs/?scheme=http"])
def test_a_folder_to_write_in_has_no_options(uri):
    for call in (Destination, lambda storage: RunFolder.at(storage, "one")):
        with pytest.raises(InputError, match=r"has options after the \?.*AWS_ENDPOINT_URL"):
            call(uri)
