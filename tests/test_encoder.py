"""The encoder: the same features everywhere, whole or not at all on disk, and never a pickle."""

from __future__ import annotations

import hashlib
import importlib
import io
import json
import pickle
import subprocess
import sys
import zipfile
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms.v2 import functional as tv

from jem.config import IMAGENET_MEAN, IMAGENET_STD, BackboneConfig
from jem.encoder import MANIFEST, PROGRAM, WEIGHTS, Encoder, EncoderInfo, read_encoder, read_manifest, save_encoder
from jem.errors import InputError
from jem.models.backbones import build_backbone

if TYPE_CHECKING:
    from pathlib import Path

INFO = EncoderInfo(method="vicreg", data="digits", metrics={"knn": 0.5}, config={"seed": 0})
ARCHITECTURE = BackboneConfig(name="resnet18", stem="stride2")
SIZE = 32


def trained_encoder(architecture: BackboneConfig = ARCHITECTURE) -> Encoder:
    """Weights and batch-norm statistics that are not those of a new network."""
    torch.manual_seed(1)
    backbone = build_backbone(architecture)
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
        backbone(torch.randn(8, 3, SIZE, SIZE))
    return Encoder(backbone, architecture, SIZE, IMAGENET_MEAN, IMAGENET_STD).eval()


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return trained_encoder()


@pytest.fixture(scope="module")
def folder(encoder: Encoder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "encoder"
    save_encoder(encoder, path, INFO)
    return path


def uint8_images(count: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(
        0, 256, (count, 3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )


# --- features -----------------------------------------------------------------------------------------------------


@torch.inference_mode()
def test_features_are_those_of_the_centre_square_resized_and_normalised(encoder: Encoder) -> None:
    images = uint8_images(4, 48, 64)  # an even margin: torchvision's integer crop is the same square
    square = tv.resize(tv.center_crop(images.float() / 255, [48, 48]), [SIZE, SIZE], antialias=True)
    expected = encoder.backbone(tv.normalize(square, list(IMAGENET_MEAN), list(IMAGENET_STD)))
    torch.testing.assert_close(encoder(images), expected, rtol=1e-4, atol=1e-5)


@settings(max_examples=10)
@given(count=st.integers(1, 3), height=st.integers(1, 70), width=st.integers(1, 70))
@torch.inference_mode()
def test_images_of_any_size_give_the_same_as_uint8_and_float(
    encoder: Encoder, count: int, height: int, width: int
) -> None:
    images = uint8_images(count, height, width, seed=height)
    features = encoder(images)
    assert features.shape == (count, encoder.dim)
    torch.testing.assert_close(encoder(images / 255), features, rtol=1e-4, atol=1e-5)


@torch.inference_mode()
def test_one_image_gives_the_same_as_in_a_batch(encoder: Encoder) -> None:
    images = uint8_images(3, 40, 30)
    one = encoder(images[1])
    assert one.shape == (encoder.dim,)
    torch.testing.assert_close(one, encoder(images)[1], rtol=1e-4, atol=1e-5)
    sizes = torch.tensor([[50, 60]])
    torch.testing.assert_close(encoder(images[1], sizes[0]), encoder(images[1:2], sizes)[0])


@torch.inference_mode()
def test_a_squashed_canvas_gives_the_features_of_the_photograph(encoder: Encoder) -> None:
    ramp = torch.linspace(0, 1, 90).expand(3, 60, 90)  # linear along the width: squashing loses nothing but at the ends
    canvas = tv.resize(ramp, [64, 64], antialias=True)
    squashed = encoder(canvas[None], torch.tensor([[60, 90]]))
    torch.testing.assert_close(squashed, encoder(ramp[None]), rtol=0.02, atol=0.02)
    assert (encoder(canvas[None]) - encoder(ramp[None])).abs().max() > 0.05  # the sizes are what does it


def test_weights_get_gradients_and_buffers_are_not_in_the_way(encoder: Encoder) -> None:
    tuned = read_encoder_copy(encoder)
    tuned.train()
    tuned(uint8_images(4, SIZE, SIZE)).square().mean().backward()
    assert all(parameter.grad is not None for parameter in tuned.parameters())
    assert all(name.startswith("backbone.") for name in tuned.state_dict())


def read_encoder_copy(encoder: Encoder) -> Encoder:
    backbone = build_backbone(encoder.architecture)
    backbone.load_state_dict(encoder.backbone.state_dict())
    return Encoder(backbone, encoder.architecture, encoder.input_size, encoder.mean, encoder.std)


def test_half_precision_follows_the_module(encoder: Encoder) -> None:
    images = uint8_images(2, 40, 40)
    assert read_encoder_copy(encoder).to(torch.bfloat16).eval()(images).dtype == torch.bfloat16
    assert read_encoder_copy(encoder).double().eval()(images).dtype == torch.float64


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (torch.zeros(2, 1, 8, 8), "give RGB images"),
        (torch.zeros(8, 8), "give RGB images"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.int64), "give uint8"),
        (torch.full((2, 3, 8, 8), 200.0), "give \\[0, 1\\]"),
        (torch.full((2, 3, 8, 8), -1.0), "not normalised"),
        (torch.full((2, 3, 8, 8), float("nan")), "give \\[0, 1\\]"),
    ],
)
def test_images_that_are_none_are_refused(encoder: Encoder, images: torch.Tensor, words: str) -> None:
    with pytest.raises(InputError, match=words):
        encoder(images)


# --- on disk ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stem", ["imagenet", "cifar", "stride2"])
@torch.inference_mode()
def test_what_is_read_back_gives_bit_equal_features(stem: str, tmp_path: Path) -> None:
    architecture = BackboneConfig(stem=stem)  # type: ignore[arg-type]
    encoder = trained_encoder(architecture)
    save_encoder(encoder, tmp_path / "e", INFO)
    back = read_encoder(tmp_path / "e")
    images = uint8_images(3, 33, 50)
    assert torch.equal(back(images), encoder(images))
    assert (back.architecture, back.input_size, back.mean, back.std) == (
        architecture,
        SIZE,
        IMAGENET_MEAN,
        IMAGENET_STD,
    )
    assert not back.training
    assert all(parameter.requires_grad for parameter in back.parameters())


def test_the_manifest_says_what_it_is(encoder: Encoder, folder: Path) -> None:
    manifest = read_manifest(folder)
    assert manifest.info == INFO
    assert manifest.architecture == ARCHITECTURE
    assert manifest.dimensions == encoder.dim == 512
    assert manifest.sha256 == hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
    assert manifest.program_sha256 == hashlib.sha256((folder / PROGRAM).read_bytes()).hexdigest()
    assert sorted(path.name for path in folder.iterdir()) == sorted([WEIGHTS, MANIFEST, PROGRAM])
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]  # nothing temporary is left


@pytest.mark.parametrize("count", [1, 2, 5])
@torch.inference_mode()
def test_the_exported_program_gives_the_same_for_any_batch(encoder: Encoder, folder: Path, count: int) -> None:
    program = torch.export.load(folder / PROGRAM).module()
    views = uint8_images(count, SIZE, SIZE) / 255
    torch.testing.assert_close(program(views), encoder(views), rtol=1e-4, atol=1e-5)


def test_saving_and_reading_leave_encoder_and_generator_alone(tmp_path: Path) -> None:
    encoder = trained_encoder().train()
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    state = torch.get_rng_state()
    save_encoder(encoder, tmp_path / "e", INFO)
    read_encoder(tmp_path / "e")
    assert torch.equal(torch.get_rng_state(), state)
    assert encoder.training
    assert all(torch.equal(before[name], value) for name, value in encoder.state_dict().items())


def test_channels_last_and_half_weights_are_saved_as_float32(encoder: Encoder, tmp_path: Path) -> None:
    half = read_encoder_copy(encoder).to(torch.bfloat16).to(memory_format=torch.channels_last)
    save_encoder(half, tmp_path / "e", INFO)
    back = read_encoder(tmp_path / "e")
    for name, value in back.state_dict().items():
        assert torch.equal(value, half.state_dict()[name].to(value.dtype)), name
    assert back.backbone.state_dict()["conv1.weight"].dtype == torch.float32


def test_saving_again_replaces_and_saving_over_something_else_is_refused(encoder: Encoder, tmp_path: Path) -> None:
    save_encoder(encoder, tmp_path / "e", INFO)
    save_encoder(encoder, tmp_path / "e", INFO.model_copy(update={"method": "byol"}))
    assert read_manifest(tmp_path / "e").info.method == "byol"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(InputError, match="not an encoder's folder"):
        save_encoder(encoder, tmp_path / "mine", INFO)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.tex"]


def test_a_failed_save_leaves_nothing(encoder: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch.export, "save", full)
    with pytest.raises(InputError, match="No space left"):
        save_encoder(encoder, tmp_path / "e", INFO)
    assert list(tmp_path.iterdir()) == []


def test_a_backbone_of_another_architecture_is_not_saved(encoder: Encoder, tmp_path: Path) -> None:
    wrong = Encoder(encoder.backbone, BackboneConfig(name="resnet34"), SIZE, IMAGENET_MEAN, IMAGENET_STD)
    with pytest.raises(InputError, match="not the weights of resnet34"):
        save_encoder(wrong, tmp_path / "e", INFO)
    assert list(tmp_path.iterdir()) == []


# --- damage -------------------------------------------------------------------------------------------------------


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    path = tmp_path / "copied"
    path.mkdir()
    for name in (WEIGHTS, MANIFEST):  # without the program, which reading does not need
        (path / name).write_bytes((folder / name).read_bytes())
    return path


@settings(max_examples=8)
@given(place=st.floats(0, 1, exclude_max=True))
def test_one_changed_byte_anywhere_in_the_weights_is_refused(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, place: float
) -> None:
    path = tmp_path_factory.mktemp("changed")
    data = bytearray((folder / WEIGHTS).read_bytes())
    data[int(place * len(data))] ^= 1
    (path / WEIGHTS).write_bytes(data)
    (path / MANIFEST).write_bytes((folder / MANIFEST).read_bytes())
    with pytest.raises(InputError, match="was changed after it was saved"):
        read_encoder(path)
    (path / WEIGHTS).unlink()


def change(folder: Path, **values: Any) -> None:
    content = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({**content, **values}))


def test_the_untouched_copy_is_read(copied: Path) -> None:
    assert read_encoder(copied).dim == 512


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"architecture": {"name": "vit_huge"}, "jem": "9.0"}, "architecture: .*vit_huge.*written by jem 9.0"),
        ({"architecture": {"name": "resnet34"}}, "not the weights of resnet34"),
        ({"format": 99, "jem": "9.0"}, "upgrade jem"),
        ({"input_size": -3}, "input_size"),
        ({"mean": [0, 1]}, "mean"),
        ({"sha256": 0}, "sha256"),
    ],
)
def test_a_manifest_that_is_not_understood_is_refused(copied: Path, values: dict[str, Any], words: str) -> None:
    change(copied, **values)
    with pytest.raises(InputError, match=words):
        read_encoder(copied)


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"null", b"{", b"\xff\xfe\x00"])
def test_a_broken_manifest_is_refused(copied: Path, content: bytes) -> None:
    (copied / MANIFEST).write_bytes(content)
    with pytest.raises(InputError, match="get the encoder again"):
        read_encoder(copied)


def test_missing_files_are_named(copied: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no encoder at .*nowhere"):
        read_encoder(tmp_path / "nowhere")
    (copied / WEIGHTS).unlink()
    with pytest.raises(InputError, match=WEIGHTS):
        read_encoder(copied)


def test_weights_that_are_not_safetensors_are_refused(copied: Path) -> None:
    """A pickle in place of the weights, with the right checksum: the attack that safetensors is there for."""
    buffer = io.BytesIO()
    torch.save({"conv1.weight": torch.zeros(1)}, buffer)
    (copied / WEIGHTS).write_bytes(buffer.getvalue())
    change(copied, sha256=hashlib.sha256(buffer.getvalue()).hexdigest())
    with pytest.raises(InputError, match="not a safetensors file"):
        read_encoder(copied)


# --- pickle -------------------------------------------------------------------------------------------------------


def forbid_unpickling(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every way to unpickle raise: the standard library's, the C one's, torch's, cloudpickle's and joblib's."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("something was unpickled")

    for module in ("pickle", "_pickle", "cloudpickle", "torch", "torch.serialization", "torch.jit", "joblib"):
        loaded = importlib.import_module(module)
        for name in ("load", "loads", "Unpickler", "_load", "_legacy_load"):
            if hasattr(loaded, name):
                monkeypatch.setattr(loaded, name, refuse)


def test_reading_unpickles_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    payload = pickle.dumps({})
    forbid_unpickling(monkeypatch)
    with pytest.raises(AssertionError, match="unpickled"):  # the trap works
        pickle.loads(payload)
    with pytest.raises(AssertionError, match="unpickled"):
        torch.load(io.BytesIO())
    read_encoder(folder)
    torch.export.load(folder / PROGRAM)


def test_the_files_hold_no_pickle(folder: Path) -> None:
    with zipfile.ZipFile(folder / PROGRAM) as archive:
        for entry in archive.infolist():
            data = archive.read(entry)
            assert not data.startswith((b"\x80\x02", b"\x80\x04", b"PK")), entry.filename
            assert b'"use_pickle": true' not in data, entry.filename
    assert not (folder / WEIGHTS).read_bytes().startswith(b"PK")


# --- imports ------------------------------------------------------------------------------------------------------


def test_a_folder_is_loaded_where_neither_ray_nor_mlflow_is_installed(folder: Path) -> None:
    program = """
import sys
for name in ("ray", "mlflow", "matplotlib", "sklearn"):
    sys.modules[name] = None  # what makes an import fail
import numpy as np, torch, jem
features = jem.load_encoder(sys.argv[1])(torch.zeros(2, 3, 40, 50, dtype=torch.uint8))
print(tuple(features.shape))
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(folder)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "(2, 512)"


def test_features_do_not_depend_on_the_batch_they_are_in(encoder: Encoder) -> None:
    images = uint8_images(6, 36, 36)
    with torch.inference_mode():
        together = encoder(images)
        apart = torch.cat([encoder(images[:2]), encoder(images[2:])])
    np.testing.assert_allclose(together.numpy(), apart.numpy(), rtol=1e-4, atol=1e-5)
