"""The registry: what is registered is found by name, version, alias and run; served without jem; never unpickled."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

import jem
from jem.config import IMAGENET_MEAN, IMAGENET_STD, BackboneConfig, TrackConfig
from jem.encoder import MANIFEST, PROGRAM, WEIGHTS, Encoder, EncoderInfo, read_encoder, save_encoder
from jem.errors import InputError, RunError
from jem.models.backbones import build_backbone
from jem.tracking import registry
from jem.tracking.registry import list_encoders, load_encoder, promote, pull, register_encoder, show
from jem.tracking.runs import Tracker

SIZE = 32


@dataclass
class World:
    """A store with two versions of `digits`, the first of which is the champion."""

    track: TrackConfig
    tracker: Tracker
    folders: list[Path]
    runs: list[str]

    def features(self, version: int, images: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            return read_encoder(self.folders[version - 1])(images)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("registry")
    track = TrackConfig(uri=f"sqlite:///{root}/mlflow.db")
    tracker = Tracker(track)
    world = World(track, tracker, [], [])
    for number in range(2):
        torch.manual_seed(number)
        architecture = BackboneConfig(stem="stride2")
        backbone = build_backbone(architecture)
        backbone(torch.randn(8, 3, SIZE, SIZE))
        encoder = Encoder(backbone, architecture, SIZE, IMAGENET_MEAN, IMAGENET_STD)
        info = EncoderInfo(
            method="vicreg",
            data="s3://key:secret@bucket/digits",
            metrics={"knn": 0.5 + number / 10},
            config={"seed": number},
        )
        world.folders.append(root / f"encoder-{number}")
        save_encoder(encoder, world.folders[-1], info)
        world.runs.append(tracker.start_run(f"run {number}", {"seed": number}))
        alias = "champion" if number == 0 else None
        version = register_encoder(world.folders[-1], "digits", world.runs[-1], {"note": "a b"}, alias, track)
        assert version == number + 1
    return world


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randint(0, 256, (4, 3, 45, 37), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


# --- loading ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("uri", "version"),
    [
        ("models:/digits@champion", 1),
        ("models:/digits/1", 1),
        ("models:/digits/2", 2),
        ("models:/digits", 2),
        ("models:/digits/latest", 2),
        ("runs:/{run}/encoder", 2),
        ("{folder}", 2),
        ("file://{folder}", 2),
    ],
)
def test_every_uri_loads_its_version_bit_for_bit(world: World, images: torch.Tensor, uri: str, version: int) -> None:
    encoder = load_encoder(uri.format(run=world.runs[1], folder=world.folders[1]), world.track)
    with torch.inference_mode():
        assert torch.equal(encoder(images), world.features(version, images))
    assert all(parameter.requires_grad for parameter in encoder.parameters())


def test_the_package_function_takes_the_store_from_the_environment(
    world: World, images: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", str(world.track.uri))
    with torch.inference_mode():
        assert torch.equal(jem.load_encoder("models:/digits@champion")(images), world.features(1, images))


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("models:/digts", r"no encoder digts .*\(digits"),
        ("models:/digits@chmpion", r"no alias chmpion: .*\(.*champion"),
        ("models:/digits/9", r"no version 9: .*\(1, 2"),
        ("models:/digits/x", r"no version x: .*\(1, 2"),
        ("models:digits", "not understood"),
        ("runs:/0000/encoder", "no run 0000"),
        ("runs:/{run}/model", r"no encoder in model: .*\(encoder"),
        ("runs:/{run}", "not understood"),
        ("digits", "models:/digits"),
        ("./digits", "no encoder at"),
    ],
)
def test_an_unknown_encoder_is_refused_with_what_there_is(world: World, uri: str, words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        load_encoder(uri.format(run=world.runs[0]), world.track)
    assert "\n" not in str(caught.value)


def test_looking_in_a_store_that_is_not_there_makes_none(tmp_path: Path) -> None:
    nowhere = TrackConfig(uri=f"sqlite:///{tmp_path}/mlflow.db")
    with pytest.raises(InputError, match="does not exist"):
        load_encoder("models:/digits", nowhere)
    with pytest.raises(InputError, match="does not exist"):
        list_encoders(nowhere)
    assert list(tmp_path.iterdir()) == []


def test_an_object_store_without_its_client_is_an_error_in_one_line() -> None:
    with pytest.raises((RunError, InputError), match="cannot get nosuchstore://host/encoder") as caught:
        load_encoder("nosuchstore://user:secret@host/encoder")
    assert "secret" not in str(caught.value)


def artifacts(world: World, run: int) -> Path:
    return Path(str(world.tracker.client.get_run(world.runs[run]).info.artifact_uri))


def test_a_changed_byte_in_the_registered_weights_is_refused(world: World, tmp_path: Path) -> None:
    run_id = world.tracker.start_run("to be damaged", {})
    register_encoder(world.folders[0], "damaged", run_id, track=world.track)
    weights = Path(str(world.tracker.client.get_run(run_id).info.artifact_uri)) / "encoder" / WEIGHTS
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(InputError, match="was changed"):
        load_encoder("models:/damaged", world.track)
    with pytest.raises(InputError, match="was changed"):
        pull("models:/damaged", tmp_path / "out", world.track)
    assert list(tmp_path.iterdir()) == []
    weights.unlink()
    with pytest.raises(InputError, match="cannot get models:/damaged"):
        load_encoder("models:/damaged", world.track)


# --- registering --------------------------------------------------------------------------------------------------


def test_a_version_is_tagged_with_where_it_comes_from(world: World) -> None:
    tags = world.tracker.client.get_model_version("digits", "1").tags
    assert tags["method"] == "vicreg"
    assert tags["data"] == "s3://bucket/digits"
    assert float(tags["metric.knn"]) == 0.5
    assert json.loads(tags["config"]) == {"seed": 0}
    assert tags["note"] == "a b"
    assert tags["sha256"] == show("models:/digits/1", world.track)[0].sha256


def test_registering_again_finds_the_same_version(world: World) -> None:
    assert register_encoder(world.folders[0], "digits", world.runs[0], track=world.track) == 1
    assert [encoder.version for encoder in list_encoders(world.track) if encoder.name == "digits"] == [2, 1]


def test_another_encoder_of_the_same_run_leaves_the_first_as_it_was(world: World, images: torch.Tensor) -> None:
    run_id = world.tracker.start_run("two of them", {})
    assert register_encoder(world.folders[0], "both", run_id, track=world.track) == 1
    assert register_encoder(world.folders[1], "both", run_id, track=world.track) == 2
    with torch.inference_mode():
        for version in (1, 2):
            loaded = load_encoder(f"models:/both/{version}", world.track)
            assert torch.equal(loaded(images), world.features(version, images))


@pytest.mark.parametrize("name", ["a/b", "", "a:b"])
def test_a_name_that_mlflow_does_not_take_is_refused(world: World, name: str) -> None:
    with pytest.raises(InputError, match="cannot register"):
        register_encoder(world.folders[0], name, world.runs[0], track=world.track)


def test_a_broken_folder_and_an_unknown_run_are_refused(world: World, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no encoder at"):
        register_encoder(tmp_path, "digits", world.runs[0], track=world.track)
    with pytest.raises(InputError, match="cannot register"):
        register_encoder(world.folders[0], "digits", "0000", track=world.track)


# --- listing, promoting, pulling ----------------------------------------------------------------------------------


def test_the_list_shows_versions_aliases_and_metrics(world: World) -> None:
    world.tracker.client.create_registered_model("someone else's")
    world.tracker.client.create_model_version("someone else's", "/nowhere")
    with pytest.raises(InputError, match=r"no version 7: give one of its versions \(1"):
        load_encoder("models:/someone else's/7", world.track)
    listed = [encoder for encoder in list_encoders(world.track) if encoder.name == "digits"]
    assert [(encoder.version, encoder.aliases) for encoder in listed] == [(2, ()), (1, ("champion",))]
    assert listed[0].metrics == {"knn": 0.6}
    assert listed[0].uri == "models:/digits/2"
    assert listed[0].run_id == world.runs[1]
    assert all(encoder.name != "someone else's" for encoder in list_encoders(world.track))


def test_promoting_moves_the_alias(world: World) -> None:
    assert promote("models:/digits/1", "trial", world.track).aliases == ("champion", "trial")
    assert promote("models:/digits/2", "trial", world.track).aliases == ("trial",)
    assert show("models:/digits@trial", world.track)[1].version == 2  # type: ignore[union-attr]
    with pytest.raises(InputError, match="no version 9"):
        promote("models:/digits/9", "trial", world.track)
    with pytest.raises(InputError, match="cannot promote"):
        promote("models:/digits/1", "not an alias!", world.track)


def test_showing_a_folder_needs_no_store(world: World) -> None:
    manifest, version = show(str(world.folders[0]), TrackConfig(uri="http://127.0.0.1:1"))
    assert manifest.info.method == "vicreg"
    assert version is None


def test_pulling_copies_the_encoder_and_overwrites_only_encoders(
    world: World, images: torch.Tensor, tmp_path: Path
) -> None:
    out = tmp_path / "deep" / "champion"
    pull("models:/digits@champion", out, world.track)
    assert sorted(path.name for path in out.iterdir()) == sorted([WEIGHTS, MANIFEST, PROGRAM])
    assert [path.name for path in out.parent.iterdir()] == ["champion"]
    with torch.inference_mode():
        assert torch.equal(load_encoder(str(out))(images), world.features(1, images))
    with pytest.raises(InputError, match="--overwrite"):
        pull("models:/digits/2", out, world.track)
    pull("models:/digits/2", out, world.track, overwrite=True)
    with torch.inference_mode():
        assert torch.equal(load_encoder(str(out))(images), world.features(2, images))
    (tmp_path / "mine").mkdir()
    with pytest.raises(InputError, match="exists"):
        pull("models:/digits/2", tmp_path / "mine", world.track, overwrite=True)


# --- without jem --------------------------------------------------------------------------------------------------


SERVE = """
import sys
for name in ("jem", "pipelines", "ray", "safetensors", "torchvision"):
    sys.modules[name] = None  # what makes an import fail
import numpy as np
import mlflow
model = mlflow.pyfunc.load_model("models:/digits@champion")

def refuse(*_, **__):
    raise AssertionError("something was unpickled")

images = np.load(sys.argv[1])
results = [
    model.predict(images),
    model.predict(images.astype(np.float32) / 255),
    model.predict(images.transpose(0, 2, 3, 1)),
    model.predict(list(images)),
    model.predict(images.tolist()),
    np.concatenate([model.predict(image) for image in images]),
]
np.save(sys.argv[2], np.stack(results))
"""


def test_mlflow_serves_the_version_where_jem_is_not_installed(
    world: World, images: torch.Tensor, tmp_path: Path
) -> None:
    np.save(tmp_path / "images.npy", images.numpy())
    environment = {
        **os.environ,
        "MLFLOW_TRACKING_URI": str(world.track.uri),
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
        "PYTHONPATH": "",
    }
    command = [sys.executable, "-c", SERVE, str(tmp_path / "images.npy"), str(tmp_path / "features.npy")]
    done = subprocess.run(
        command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr, done.stderr
    expected = world.features(1, images).numpy()
    for features in np.load(tmp_path / "features.npy"):
        np.testing.assert_allclose(features, expected, rtol=1e-4, atol=1e-5)


def forbid_unpickling(monkeypatch: pytest.MonkeyPatch) -> None:
    import _pickle
    import pickle

    import cloudpickle

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("something was unpickled")

    for module in (pickle, _pickle, cloudpickle, torch, torch.serialization):
        for name in ("load", "loads", "Unpickler"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, refuse)


def test_no_way_to_an_encoder_unpickles(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import mlflow.pyfunc

    monkeypatch.setenv("MLFLOW_TRACKING_URI", str(world.track.uri))
    forbid_unpickling(monkeypatch)
    with pytest.raises(AssertionError, match="unpickled"):  # the trap works
        torch.load(tmp_path)
    load_encoder("models:/digits@champion", world.track)
    pull("models:/digits@champion", tmp_path / "pulled", world.track)
    show("models:/digits@champion", world.track)
    model = mlflow.pyfunc.load_model("models:/digits@champion")
    assert model.predict(np.zeros((1, 3, 40, 40), np.uint8)).shape == (1, 512)


def rewritten(source: Path, target: Path, edit: dict[str, bytes]) -> None:
    """Copy a zip archive, with the entries that end so replaced."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for entry in old.infolist():
            data = old.read(entry)
            for ending, content in edit.items():
                if entry.filename.endswith(ending):
                    data = content
            new.writestr(entry.filename, data)


def test_a_served_program_with_a_pickle_or_a_changed_byte_is_refused(world: World, tmp_path: Path) -> None:
    """What an attacker who can write the artifacts would do: put a pickle in, and the new checksum in the manifest."""
    import hashlib

    import mlflow.pyfunc

    registry._write_model(world.folders[0], tmp_path / "model")
    program, manifest = tmp_path / "model" / PROGRAM, tmp_path / "model" / MANIFEST
    original = program.read_bytes()

    program.write_bytes(original[:-1] + bytes([original[-1] ^ 1]))
    with pytest.raises(Exception, match="was changed after it was saved"):
        mlflow.pyfunc.load_model(str(tmp_path / "model"))

    pickled = json.dumps(
        {"config": {"x": {"path_name": "opaque_obj_0", "is_param": False, "use_pickle": True}}}
    ).encode()
    program.write_bytes(original)
    for edit in (
        {"sample_inputs/model.pt": b"\x80\x04."},
        {"constants_config.json": pickled},
        {"models/model.json": b""},
    ):
        ending = next(iter(edit))
        if ending == "models/model.json":  # torch's older format, whose weights are pickles
            with zipfile.ZipFile(program, "w") as archive:
                archive.writestr("version", "1")
        else:
            rewritten(world.folders[0] / PROGRAM, program, edit)
        content = json.loads(manifest.read_text())
        content["program_sha256"] = hashlib.sha256(program.read_bytes()).hexdigest()
        manifest.write_text(json.dumps(content))
        with pytest.raises(Exception, match="holds a pickle"):
            mlflow.pyfunc.load_model(str(tmp_path / "model"))
