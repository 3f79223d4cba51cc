"""What comes from elsewhere and means harm is refused, with its reason in one line, and nothing of it is run.

Data sets: tars, lists, Parquet. Encoders: their JSON, their weights, other models in the registry. Credentials: not
where others read. And no call in the code that could unpickle.
"""

from __future__ import annotations

import ast
import hashlib
import io
import json
import os
import pickle
import shutil
import socket
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import jem
import pipelines
from jem.config import IMAGENET_MEAN, IMAGENET_STD, BackboneConfig, TrackConfig
from jem.data.fetch import fetch
from jem.data.index import open_index
from jem.data.read import read_rows
from jem.data.shards import ShardSettings, WorkPlan
from jem.data.sources import Source, list_source
from jem.encoder import MANIFEST, WEIGHTS, Encoder, EncoderInfo, save_encoder
from jem.errors import InputError, RunError
from jem.models.backbones import build_backbone
from jem.tracking.registry import load_encoder, pull, show
from jem.tracking.runs import Tracker
from pipelines.command import main

if TYPE_CHECKING:
    from collections.abc import Callable


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


def picture() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (6, 4), (200, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def refusal(call: Callable[..., object], *arguments: object) -> str:
    """The one line of the error that a call ends with."""
    with pytest.raises((InputError, RunError)) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def rejections(source: str | Path) -> dict[str, str]:
    """What a listing finds bad, by its path, and why."""
    _, entries = list_source(str(source))
    pairs = zip(entries["path"].to_pylist(), entries["problem"].to_pylist(), strict=True)
    return {path: problem.partition(" (")[0] for path, problem in pairs if problem}


# --- tars -------------------------------------------------------------------------------------------------------------


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "", data: bytes | None = None) -> bytes:
    """A member of a tar: header and content."""
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    if data is None:
        data = picture() if kind == tarfile.REGTYPE else b""
    info.size = len(data)
    return info.tobuf(tarfile.GNU_FORMAT) + data + bytes(-len(data) % tarfile.BLOCKSIZE)


def header(name: str, kind: bytes, size: int) -> bytes:
    """A member that says that it is of this size."""
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, size
    return info.tobuf(tarfile.GNU_FORMAT)


LONG = ("././@LongLink", tarfile.GNUTYPE_LONGNAME)
END = bytes(2 * tarfile.BLOCKSIZE)


def test_members_of_a_tar_lead_nowhere_else(tmp_path: Path) -> None:
    secret = tmp_path / "secret.png"
    secret.write_bytes(picture())
    members = {
        "../up.png": member("../up.png"),
        "a/../../up.png": member("a/../../up.png"),
        "abs.png": member("/abs.png"),
        "soft.png": member("soft.png", tarfile.SYMTYPE, str(secret)),
        "hard.png": member("hard.png", tarfile.LNKTYPE, str(secret)),
        "char.png": member("char.png", tarfile.CHRTYPE),
        "block.png": member("block.png", tarfile.BLKTYPE),
        "pipe.png": member("pipe.png", tarfile.FIFOTYPE),
        "good.png": member("good.png"),
    }
    (tmp_path / "bad.tar").write_bytes(b"".join(members.values()) + END)
    reasons = ["name leaves the tar"] * 3 + ["a link in a tar"] * 2 + ["not a regular file"] * 3
    assert rejections(tmp_path / "bad.tar") == dict(zip((f"bad.tar/{name}" for name in members), reasons, strict=False))


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(header(*LONG, 2**42), id="a name of terabytes"),
        pytest.param(member(*LONG, data=b"x.png\0") * 1200, id="names upon names"),
        pytest.param(header("back.txt", tarfile.REGTYPE, -tarfile.BLOCKSIZE), id="a size below zero"),
    ],
)
def test_a_tar_cannot_take_the_memory_or_the_stack_or_run_in_circles(tmp_path: Path, damage: bytes) -> None:
    (tmp_path / "bad.tar").write_bytes(member("good.png") + damage + member("after.png") + END)
    (reason,) = rejections(tmp_path / "bad.tar").values()
    assert reason.startswith("damaged tar: ")


# --- lists ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("opened", ["", "file://", "local://"])
def test_a_list_leads_nowhere_but_into_its_folder(tmp_path: Path, opened: str) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for file in (tmp_path / "secret.png", folder / "a.png"):
        file.write_bytes(picture())
    outside = [
        "../secret.png",
        "sub/../../secret.png",
        f"{tmp_path}/secret.png",
        f"file://{tmp_path}/secret.png",
        f"local://{tmp_path}/secret.png",
        "s3://bucket/secret.png",
        "https://host/secret.png",
    ]
    names = ["a.png", *outside]
    (folder / "list.csv").write_text("path\n" + "\n".join(names) + "\n")
    (folder / "list.jsonl").write_text("\n".join(json.dumps({"path": name}) for name in names))
    for file in ("list.csv", "list.jsonl"):
        assert rejections(f"{opened}{folder}/{file}") == dict.fromkeys(outside, "path leaves the list's folder")


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.ray
def test_a_list_of_what_lies_outside_makes_no_data_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "secret.png").write_bytes(picture())
    (tmp_path / "in/list.csv").write_text("path\n../secret.png\n")
    assert main(["ingest", str(tmp_path / "in/list.csv"), str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "1 of 1 images are bad (1 path leaves the list's folder (put the list into a folder that holds all" in line


def test_a_line_of_a_list_that_nests_too_deep_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"path": "a.png"}\n' + "[" * 100_000)
    assert "line 2 is not JSON" in refusal(list_source, str(tmp_path / "a.jsonl"))


# --- Parquet ----------------------------------------------------------------------------------------------------------

ONE_CELL = """
import sys
import numpy as np, pyarrow as pa, pyarrow.parquet as pq
size = 10**9
ends = pa.py_buffer(np.array([0, size], np.int32))
cell = pa.Array.from_buffers(pa.binary(), 1, [None, ends, pa.py_buffer(bytes(size))])
image = pa.StructArray.from_arrays([cell, pa.array(["0.png"])], ["bytes", "path"])
settings = {"compression": "zstd", "use_dictionary": False, "write_statistics": False}
pq.write_table(pa.table({"image": image}), sys.argv[1], **settings)
"""

PEAK = """
import resource, sys
from pipelines.command import main
status = main(sys.argv[1:])
print(status, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


def test_a_gigabyte_in_one_cell_is_refused_by_the_footer(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    subprocess.run([sys.executable, "-c", ONE_CELL, folder / "a.parquet"], timeout=120, check=True)
    assert (folder / "a.parquet").stat().st_size < 100_000  # 31 kB that would become 1 GB
    views = ["--stream.canvas", "32", "--augment.views", '[{"count": 2, "size": 32}]']
    for argv in (["pretrain", "--data", folder, *views], ["ingest", folder, tmp_path / "out"]):
        command = [sys.executable, "-c", PEAK, *map(str, argv)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        (line,) = done.stderr.splitlines()
        assert f"row group 0 of {folder}/a.parquet holds 1,000 MB of images, more than 512 MB" in line
        status, peak = map(int, done.stdout.split())
        assert (status, (tmp_path / "out").exists()) == (2, False)
        assert peak < 1500, "MB: 950 are torch, Ray and MLflow; the cell would be 1000 and more"


def test_the_limit_of_a_row_group_is_the_users_to_set(tmp_path: Path) -> None:
    cells = pa.array([{"bytes": bytes(100_000), "path": "0.png"}] * 10)
    pq.write_table(pa.table({"image": cells}), tmp_path / "a.parquet", row_group_size=5, use_dictionary=False)
    assert len(open_index(str(tmp_path), row_group_limit=600_000)) == 10
    line = refusal(lambda: open_index(str(tmp_path), row_group_limit=400_000))
    assert "row group 1 of" in line
    assert "--max_row_group_mb" in line


def a_set(folder: Path, evil: str, shard: int, trap: Path) -> Path:
    """Two shards in the layout of data sets; in one of them a column is of the type that Ray Data has for objects."""
    from ray.data._internal.object_extensions.arrow import ArrowPythonObjectType

    storage = pa.array([pickle.dumps(Trap(trap))] * 3, pa.large_binary())
    objects = pa.ExtensionArray.from_storage(ArrowPythonObjectType(), storage)
    folder.mkdir(exist_ok=True)
    for number in range(2):
        columns = {"bytes": pa.array([picture()] * 3), "path": pa.array(["a.png"] * 3), "label": pa.array([0, 1, 2])}
        columns["id"] = pa.array(range(3 * number, 3 * number + 3))
        if number == shard:
            columns[evil] = objects
        cells = [columns.pop("bytes"), columns.pop("path")]
        columns.setdefault("image", pa.StructArray.from_arrays(cells, ["bytes", "path"]))
        pq.write_table(pa.table(columns), folder / f"{number}.parquet")
    return folder


@pytest.mark.parametrize("shard", [0, 1])
@pytest.mark.parametrize("evil", ["image", "bytes", "path", "label", "id"])
def test_no_column_of_a_data_set_is_unpickled(tmp_path: Path, evil: str, shard: int) -> None:
    """Arrow makes the objects of a registered type when a value is looked at; Ray's type unpickles."""
    trap = tmp_path / "sprung"
    folder = str(a_set(tmp_path / "set", evil, shard, trap))
    name = {"bytes": "image", "path": "image.path"}.get(evil, evil)
    if shard == 0 and evil in {"label", "id"}:  # it is then not taken for one, and left alone
        source, entries = list_source(folder)
        assert [image.data for image in fetch(source, entries, np.random.default_rng(0))] == [picture()] * 6
    elif shard == 0 and name == "image":
        assert "has no image column" in refusal(list_source, folder)
    else:
        assert f"column {name} is of type" in refusal(list_source, folder)
    assert not trap.exists()
    trap.mkdir()
    with pytest.raises(FileExistsError):  # so it would have gone off
        pq.read_table(f"{folder}/{shard}.parquet").to_pylist()


@pytest.mark.parametrize("evil", ["image", "bytes", "path", "label", "id"])
def test_nor_is_one_of_a_shard_that_was_put_there_since(tmp_path: Path, evil: str) -> None:
    trap = tmp_path / "sprung"
    folder = str(a_set(tmp_path / "set", evil, 2, trap))
    index, (source, entries) = open_index(folder), list_source(folder)
    a_set(tmp_path / "set", evil, 1, trap)
    reads = [lambda: list(fetch(source, entries, np.random.default_rng(0))), lambda: read_rows(index, [3], 8, 100)]
    for read, left_alone in zip(reads, ("id", "path"), strict=True):
        if evil == left_alone:
            read()
        else:
            assert "cannot read" in refusal(read)
    assert not trap.exists()


@pytest.mark.parametrize("said", ['{"info": {"features": [1]}}', '{"info": {"features": {"label": 1}}}', "[" * 100_000])
def test_metadata_of_any_shape_only_costs_the_names(tmp_path: Path, said: str) -> None:
    cells = pa.array([{"bytes": picture(), "path": "a.png"}])
    table = pa.table({"image": cells, "label": [0]}).replace_schema_metadata({"huggingface": said})
    pq.write_table(table, tmp_path / "a.parquet")
    assert open_index(str(tmp_path)).classes is None


# --- encoders ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def encoder_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoders") / "good"
    architecture = BackboneConfig(stem="stride2")
    encoder = Encoder(build_backbone(architecture), architecture, 32, IMAGENET_MEAN, IMAGENET_STD)
    save_encoder(encoder, folder, EncoderInfo(method="vicreg", data="digits"))
    return folder


@pytest.fixture
def folder(encoder_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(encoder_folder, tmp_path / "encoder"))


def rewrite(folder: Path, **values: Any) -> None:
    """Change `encoder.json`; "architecture" is merged."""
    content = json.loads((folder / MANIFEST).read_text())
    architecture = {**content["architecture"], **values.pop("architecture", {})}
    (folder / MANIFEST).write_text(json.dumps({**content, **values, "architecture": architecture}))


PLAIN = {"stem": "imagenet"}
"""Of networks that have no other stem."""


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"architecture": {"name": "builtins:eval"}}, "'builtins:eval' is not a backbone"),
        ({"architecture": {"name": "os.system"}}, "'os.system' is not a backbone"),
        ({"architecture": {"name": "../../resnet18"}}, "is not a backbone"),
        ({"architecture": {"class": "os.system"}}, "architecture.class: Extra inputs are not permitted"),
        ({"architecture": {"name": "torchvision:__class__", **PLAIN}}, "torchvision has no classifier '__class__'"),
        ({"architecture": {"name": "torchvision:get_model", **PLAIN}}, "torchvision has no classifier 'get_model'"),
        ({"architecture": {"name": "timm:hf-hub:someone/something", **PLAIN}}, "timm has no classifier"),
        ({"architecture": {"name": "timm:local-dir:/tmp", **PLAIN}}, "timm has no classifier"),
        ({"architecture": {"name": "timm:resnet18.x/../../y", **PLAIN}}, "timm has no classifier"),
        (
            {"architecture": {"name": "torchvision:resnet50", **PLAIN}},
            "these are not the weights of torchvision:resnet50",
        ),
        ({"architecture": {"width": 500}}, "these are not the weights of resnet18 x500, stride2 stem"),
        ({"architecture": {"width": 10**30}}, "too large to be built"),
        ({"architecture": {"name": "vit_tiny", "patch": 10**6, **PLAIN}}, "vit_tiny, patch 1000000"),
        ({"input_size": 10**9}, "input_size: Input should be less than or equal to 4096"),
        ({"dimensions": 10**9}, "says 1000000000 dimensions, the network has 512"),
        ({"mean": ["__import__('os')", 0, 0]}, "mean.0: Input should be a valid number"),
        ({"sha256": "0" * 64}, "was changed after it was saved"),
    ],
)
def test_an_encoder_that_asks_for_something_else_is_refused(folder: Path, values: dict[str, Any], reason: str) -> None:
    rewrite(folder, **values)
    assert reason in refusal(load_encoder, str(folder))


def test_an_encoder_json_that_nests_too_deep_is_refused(folder: Path) -> None:
    (folder / MANIFEST).write_text("[" * 100_000)
    assert "cannot read" in refusal(load_encoder, str(folder))


def test_pickled_weights_are_refused_under_any_name(folder: Path, tmp_path: Path) -> None:
    trap = tmp_path / "sprung"
    torch.save(Trap(trap), folder / WEIGHTS)
    rewrite(folder, sha256=hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest())
    assert "is not a safetensors file" in refusal(load_encoder, str(folder))
    (folder / WEIGHTS).rename(folder / "encoder.pth")
    assert f"cannot read {folder / WEIGHTS}" in refusal(load_encoder, str(folder))
    assert not trap.exists()


def test_a_registered_model_that_is_a_pickle_is_refused_with_what_it_holds(folder: Path, tmp_path: Path) -> None:
    track, trap = TrackConfig(uri=f"sqlite:///{tmp_path}/mlflow.db"), tmp_path / "sprung"
    tracker = Tracker(track)
    run_id = tracker.start_run("another's", {})
    place = Path(str(tracker.client.get_run(run_id).info.artifact_uri))

    def register(name: str, model: Path) -> str:
        tracker.client.log_artifacts(run_id, str(model), name)
        tracker.client.create_registered_model(name)
        tracker.client.create_model_version(name, str(place / name), run_id)
        return f"models:/{name}/1"

    model = tmp_path / "model"
    model.mkdir()
    (model / "python_model.pkl").write_bytes(pickle.dumps(Trap(trap)))
    torch.save(Trap(trap), model / "model.pth")
    (model / "MLmodel").write_text(
        "flavors:\n  python_function:\n    loader_module: mlflow.pyfunc.model\n    python_model: python_model.pkl\n"
    )
    uri = register("pickle", model)
    (folder / WEIGHTS).unlink()
    torch.save(Trap(trap), folder / "encoder.pth")
    half = register("half", folder)
    for call in (load_encoder, show, lambda uri, track: pull(uri, tmp_path / "pulled", track)):
        line = refusal(call, uri, track)
        assert f"cannot get {uri}: it has no encoder.json (MLmodel, model.pth, python_model.pkl)" in line
        assert "pickle" in line
    for call in (load_encoder, lambda uri, track: pull(uri, tmp_path / "pulled", track)):
        assert "it has no encoder.safetensors (encoder.json, encoder.pt2, encoder.pth)" in refusal(call, half, track)
    assert not trap.exists()
    assert not (tmp_path / "pulled").exists()


# --- credentials ------------------------------------------------------------------------------------------------------

SECRET = "Xk7/s3cr3t+Q"


@pytest.mark.parametrize("debug", [[], ["--debug"]])
@pytest.mark.parametrize(
    "argv",
    [
        ["ingest", f"nosuch://user:{SECRET}@host/images", "out"],
        ["ingest", f"s3://KEY:{SECRET}@bucket/images", "out"],
        ["ingest", "images", f"nosuch://host/out?token={SECRET}"],
        ["preview", f"https://user:{SECRET}@127.0.0.1:PORT/a.parquet", "out.png"],
        ["pretrain", "--data", f"http://127.0.0.1:PORT/a.parquet?X-Amz-Signature={SECRET}"],
        ["pretrain", "--data", "DIGITS", "--storage", f"nosuch://user:{SECRET}@host/runs"],
        ["pretrain", "--data", "DIGITS", "--seed", f"s3://{'k' * 45}:{SECRET}@bucket"],
        ["pretrain", "--data", "DIGITS", "--storag", f"s3://user:{SECRET}@bucket"],
        ["encoders", "list", "--track.uri", f"http://user:{SECRET}@127.0.0.1:PORT"],
        ["encoders", "list", "--track.uri", f"postgresql://user:{SECRET}@127.0.0.1:PORT/mlflow"],
        ["encoders", "list", "--track.uri", f"nosuch://user:{SECRET}@host"],
        ["encoders", "show", f"nosuch://user:{SECRET}@host/encoder"],
        ["embed", "--encoder", f"https://127.0.0.1:PORT/e?sig={SECRET}", "--data", "DIGITS", "--out", "out"],
    ],
    ids=lambda argv: " ".join(argv[:3])[:40],
)
def test_no_error_shows_a_credential(
    argv: list[str], debug: list[str], digits_dataset: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as free:  # bound, so that no one else takes it, but not listening
        free.bind(("127.0.0.1", 0))
        known = {"PORT": str(free.getsockname()[1]), "DIGITS": str(digits_dataset)}
        for name, value in known.items():
            argv = [word.replace(name, value) for word in argv]
        assert main([*argv, *debug]) in {1, 2}
    shown = "".join(capfd.readouterr())
    assert ("Traceback" in shown) == bool(debug)
    for part in (SECRET, SECRET[:6], SECRET[-6:]):
        assert part not in shown


def test_the_plan_of_an_ingest_is_stored_without_a_credential() -> None:
    source = Source("flat", f"s3://KEY:{SECRET}@bucket/images?region=eu")
    plan = WorkPlan(source, "digest", ShardSettings(0, None, 1, 1, 1, 1), (0,), 1)
    assert WorkPlan.from_json(plan.to_json()) == replace(
        plan, source=replace(source, uri="s3://bucket/images?region=eu")
    )


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_no_credential_is_written_or_printed_by_a_whole_run(
    digits_dataset: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Every URI carries one; then all that the jobs printed and wrote is searched for it, Ray's logs too."""
    import ray

    secret = "Xk7s3cr3tQ"
    query = f"?access_token={secret}"
    data, out = f"file://{tmp_path}/set{query}", tmp_path / "embeddings"
    shutil.copytree(digits_dataset, tmp_path / "source")
    store = ["--track.uri", f"sqlite:///{tmp_path}/mlflow.db{query}"]
    small = ["--stream.canvas", "32", "--augment.views", '[{"count": 2, "size": 32}]', "--backbone.stem", "stride2"]
    small += ["--method.expander", "[32, 32]", "--train.batch_size", "64", "--train.epochs", "1", "--limit", "128"]
    jobs = [
        ["ingest", f"file://{tmp_path}/source{query}", f"{tmp_path}/set"],
        ["pretrain", "--data", data, "--storage", f"file://{tmp_path}/runs", "--name", "one", *small, *store],
        ["encoders", "show", "models:/vicreg-resnet18/1", *store],
        ["embed", "--encoder", "models:/vicreg-resnet18/1", "--data", data, "--out", str(out), "--limit", "64", *store],
    ]
    for argv in jobs:
        assert main(argv) == 0, capfd.readouterr().err
    shown = "".join(capfd.readouterr())
    assert f"file://{tmp_path}/set" in shown
    assert secret not in shown
    logs = Path(ray._private.worker._global_node.get_logs_dir_path())
    assert list(logs.glob("worker-*"))
    files = [file for folder in (tmp_path, logs) for file in folder.rglob("*") if file.is_file()]
    assert {"config.yaml", "run.json", "mlflow.db", MANIFEST, "_jem.json"} <= {file.name for file in files}
    assert [str(file) for file in files if secret.encode() in file.read_bytes()] == []


# --- the code ---------------------------------------------------------------------------------------------------------

UNPICKLING = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "jsonpickle", "pandas"}
FORBIDDEN = {
    "eval": "runs code",
    "exec": "runs code",
    "__import__": "runs code",
    "yaml.load": "makes objects",
    "yaml.unsafe_load": "makes objects",
    "yaml.full_load": "makes objects",
    "torch.export.load": "unpickles",
    "torch.jit.load": "unpickles",
    "torch.hub.load": "runs code",
    "torch.package.PackageImporter": "unpickles",
    "mlflow.pyfunc.load_model": "runs code",
    "mlflow.pytorch.load_model": "unpickles",
    "shutil.unpack_archive": "leaves its folder",
}
"""Never called; what ends in `.extract` or `.extractall` neither."""
SAFE = {"torch.load": ("weights_only", True), "np.load": ("allow_pickle", False), "numpy.load": ("allow_pickle", False)}
"""Called with this argument alone."""
CHECKED = {
    ("jem/tracking/served_encoder.py", "torch.export.load"),  # after `refuse_pickles`
    ("pipelines/pillow_simd.py", "archive.extractall"),  # of the wheel that pip built
}


def unsafe(tree: ast.AST, file: str) -> list[str]:
    """The imports and calls of a file that can run or unpickle what they read."""
    found = []
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        found += [f"{file}:{node.lineno} imports {name}" for name in names if UNPICKLING & set(name.split("."))]
        found += [f"{file}:{node.lineno} imports {name}" for name in names if name in FORBIDDEN or name in SAFE]
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        given = {each.arg: getattr(each.value, "value", None) for each in node.keywords}
        wanted = SAFE.get(name)
        bad = name in FORBIDDEN or name.endswith((".extract", ".extractall"))
        bad |= wanted is not None and given.get(wanted[0]) is not wanted[1]
        bad |= given.get("shell") is True
        if bad and (file, name) not in CHECKED:
            found.append(f"{file}:{node.lineno} calls {name}")
    return found


def test_no_code_of_ours_can_unpickle_or_run_what_it_reads() -> None:
    found = []
    for package in (jem, pipelines):
        root = Path(str(package.__file__)).parent
        for path in sorted(root.rglob("*.py")):
            file = path.relative_to(root.parent).as_posix()
            found += unsafe(ast.parse(path.read_text()), file)
    assert found == []


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from ray import cloudpickle",
        "import pandas as pd",
        "from torch import load\nload('x')",
        "torch.load('x')",
        "torch.load('x', weights_only=False)",
        "torch.load('x', weights_only=flag)",
        "np.load('x')",
        "np.load('x', allow_pickle=True)",
        "yaml.load(text, Loader=yaml.Loader)",
        "eval(text)",
        "tar.extractall('here')",
        "torch.export.load('x')",
        "mlflow.pyfunc.load_model(uri)",
        "subprocess.run(text, shell=True)",
    ],
)
def test_what_could_is_found(code: str) -> None:
    assert len(unsafe(ast.parse(code), "a.py")) == 1


@pytest.mark.parametrize(
    "code",
    ["torch.load(path, map_location='cpu', weights_only=True)", "np.load(x, allow_pickle=False)", "yaml.safe_load(x)"],
)
def test_what_cannot_is_not(code: str) -> None:
    assert unsafe(ast.parse(code), "a.py") == []
