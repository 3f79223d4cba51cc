"""The encoder, which is what a user keeps: backbone and preprocessing in one module, and its folder on disk.

The folder holds `encoder.safetensors` (the backbone's weights), `encoder.json` (what they are, with their checksum) and
`encoder.pt2` (the same network as a `torch.export` program, for those who do not have jem). None of the three contains
a pickle, and nothing here unpickles.
"""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, ValidationError
from safetensors import SafetensorError
from safetensors import torch as safetensors
from torch import Tensor, nn

from jem import __version__
from jem.augment.views import centre_view
from jem.config import BackboneConfig
from jem.config.networks import LIBRARIES
from jem.credentials import stripped, without_credentials
from jem.errors import InputError
from jem.models.backbones import build_backbone

if TYPE_CHECKING:
    from collections.abc import Sequence

WEIGHTS, MANIFEST, PROGRAM = "encoder.safetensors", "encoder.json", "encoder.pt2"
FORMAT = 1


class EncoderInfo(BaseModel):
    """Where an encoder comes from: what is stored beside its weights and becomes the registered version's tags.

    URIs in `data` and `config` lose their credentials.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: str = Field(description="name of the method, such as vicreg")
    data: Annotated[str, AfterValidator(without_credentials)] = Field(description="the data set that it was trained on")
    metrics: dict[str, float] = Field(default={}, description="such as knn and linear, accuracies in [0, 1]")
    config: Annotated[dict[str, Any], AfterValidator(stripped)] = Field(
        default={}, description="the run's resolved configuration"
    )


class EncoderManifest(BaseModel):
    """`encoder.json`."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    format: int = FORMAT
    jem: str = __version__
    architecture: BackboneConfig
    input_size: Annotated[int, Field(gt=0, le=4096)]
    mean: tuple[float, float, float]
    std: tuple[PositiveFloat, PositiveFloat, PositiveFloat]
    dimensions: PositiveInt
    info: EncoderInfo
    sha256: str = Field(description="of encoder.safetensors")
    program_sha256: str = Field(description="of encoder.pt2")


class Encoder(nn.Module):
    """A backbone with its preprocessing: takes images as they are, gives representations.

    Trainable: it is an ordinary module, and its `state_dict` is the backbone's under `backbone.`.

    Args:
        backbone: what `build_backbone(architecture)` returns, trained or not; it is kept, not copied.
        architecture: the configuration that it was built from.
        input_size: side of the square that the backbone is given, in pixels.
        mean: per channel, of images in [0, 1].
        std: per channel.
    """

    _mean: Tensor
    _std: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        architecture: BackboneConfig,
        input_size: int,
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.architecture = architecture
        self.input_size = input_size
        self.mean, self.std = _three(mean), _three(std)
        self.register_buffer("_mean", torch.tensor(self.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("_std", torch.tensor(self.std).view(1, 3, 1, 1), persistent=False)

    @property
    def dim(self) -> int:
        """D, the length of a representation."""
        return int(self.backbone.dim)  # type: ignore[arg-type]  # Backbone's attribute, seen through nn.Module

    def forward(self, images: Tensor, sizes: Tensor | None = None) -> Tensor:
        """Represent images: central square, resized with antialias to `input_size`, normalised, through the backbone.

        Args:
            images: uint8, or float in [0, 1]; RGB, (N, 3, H, W) or one image (3, H, W), of any height and width.
            sizes: int (N, 2), height and width that the images had if they were squashed, as the stream's canvases
                are; default: they were not.

        Returns:
            (N, D), or (D,) for one image, in the dtype of the weights (or of autocast).

        Raises:
            InputError: another shape or dtype, or values outside [0, 1] (looked at on the CPU only: elsewhere the
                look would have to wait for the device).
        """
        if images.ndim == 3:
            return self(images[None], None if sizes is None else sizes.view(1, 2))[0]  # type: ignore[no-any-return]
        _check(images)
        return self.represent(self._view(images, sizes))

    def represent(self, views: Tensor) -> Tensor:
        """Normalise views, float (N, 3, input_size, input_size) in [0, 1], and represent them: (N, D)."""
        return self.backbone((views - self._mean) / self._std)  # type: ignore[no-any-return]

    def _view(self, images: Tensor, sizes: Tensor | None) -> Tensor:
        count, _, height, width = images.shape
        if sizes is None:
            if height == width == self.input_size:  # nothing to resize
                scale = 1 if images.is_floating_point() else 255
                return images.to(self._mean.dtype) / scale
            sizes = torch.tensor([[height, width]], dtype=torch.int32).expand(count, 2)
        return centre_view(images, sizes, self.input_size).to(self._mean.dtype)


def _check(images: Tensor) -> None:
    if images.ndim != 4 or images.shape[1] != 3:
        raise InputError(f"images of shape {tuple(images.shape)}: give RGB images, (N, 3, H, W) or (3, H, W)")
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise InputError(f"images of type {images.dtype}: give uint8, or float in [0, 1]")
    if images.is_floating_point() and images.device.type == "cpu" and images.numel():
        low, high = (float(x) for x in images.detach().aminmax())
        if not (low >= -1e-3 and high <= 1 + 1e-3):  # an antialiased resize may overshoot by rounding
            raise InputError(
                f"float images with values from {low:.3g} to {high:.3g}: give [0, 1], not normalised, or uint8"
            )


def save_encoder(encoder: Encoder, folder: str | Path, info: EncoderInfo) -> EncoderManifest:
    """Write an encoder's folder, all of it or nothing; an encoder that is already there is replaced.

    Args:
        encoder: on any device, in any mode; it is left as it is. Weights are stored in float32.
        folder: to create; its parents too.
        info: where the encoder comes from.

    Raises:
        InputError: `folder` exists and is not an encoder's, or cannot be written, or the backbone's weights are not
            those of its architecture (such as a backbone still inside `DistributedDataParallel`).
    """
    folder = Path(folder)
    if folder.exists() and not (folder / MANIFEST).is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} exists and is not an encoder's folder: give another one")
    weights = {name: value.detach().cpu().contiguous() for name, value in encoder.backbone.state_dict().items()}
    weights = {name: value.float() if value.is_floating_point() else value for name, value in weights.items()}
    clean = _rebuild(encoder.architecture, weights)  # what will be read back, without hooks, wrappers or SyncBatchNorm
    frozen = Encoder(clean, encoder.architecture, encoder.input_size, encoder.mean, encoder.std).eval()
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}")
    try:
        temporary.mkdir(parents=True)
        data = safetensors.save(weights)
        (temporary / WEIGHTS).write_bytes(data)
        _export(frozen, temporary / PROGRAM)
        manifest = EncoderManifest(
            architecture=encoder.architecture,
            input_size=encoder.input_size,
            mean=encoder.mean,
            std=encoder.std,
            dimensions=encoder.dim,
            info=info,
            sha256=hashlib.sha256(data).hexdigest(),
            program_sha256=hashlib.sha256((temporary / PROGRAM).read_bytes()).hexdigest(),
        )
        text = json.dumps(manifest.model_dump(mode="json"), indent=2)
        (temporary / MANIFEST).write_text(text + "\n")
        if folder.exists():
            shutil.rmtree(folder)
        temporary.rename(folder)
    except OSError as error:
        raise InputError(
            f"cannot write an encoder to {folder}: {error.strerror or error}; give a writable folder"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return manifest


def read_manifest(folder: str | Path) -> EncoderManifest:
    """Read `encoder.json` of a folder.

    Raises:
        InputError: not an encoder's folder, or one that this version does not understand.
    """
    path = Path(folder) / MANIFEST
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise InputError(f"no encoder at {folder}: there is no {MANIFEST}; give the folder that holds it") from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"cannot read {path}: {error}; get the encoder again") from error
    made_by = content.get("jem", "unknown") if isinstance(content, dict) else "unknown"
    try:
        manifest = EncoderManifest.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise InputError(
            f"{path} is not understood: {where}: {first['msg']} (written by jem {made_by}, this is {__version__}); "
            "get the encoder again, or use the jem that wrote it"
        ) from error
    if manifest.format > FORMAT:
        raise InputError(
            f"{path} has format {manifest.format}, known is {FORMAT}: upgrade jem (it was written by {made_by})"
        )
    return manifest


def read_encoder(folder: str | Path) -> Encoder:
    """Read an encoder that `save_encoder` wrote: on the CPU, in evaluation mode, trainable.

    Reads `encoder.json` and `encoder.safetensors`; the exported program is not touched, and nothing is unpickled.

    Raises:
        InputError: a file is missing, the weights do not have the checksum that was written with them, or the
            architecture is unknown or not the weights'.
    """
    manifest = read_manifest(folder)
    path = Path(folder) / WEIGHTS
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}; get the encoder again") from error
    digest = hashlib.sha256(data).hexdigest()
    if digest != manifest.sha256:
        raise InputError(
            f"{path} was changed after it was saved: its checksum is {digest[:12]}…, not {manifest.sha256[:12]}…; "
            "get the encoder again"
        )
    try:
        weights = safetensors.load(data)
    except (SafetensorError, ValueError, KeyError) as error:
        raise InputError(f"{path} is not a safetensors file ({error}); get the encoder again") from error
    _check_shapes(manifest.architecture, weights)
    backbone = _rebuild(manifest.architecture, weights)
    encoder = Encoder(backbone, manifest.architecture, manifest.input_size, manifest.mean, manifest.std).eval()
    if encoder.dim != manifest.dimensions:
        raise InputError(
            f"{folder}: {MANIFEST} says {manifest.dimensions} dimensions, the network has {encoder.dim}; "
            "get the encoder again"
        )
    return encoder


def _check_shapes(architecture: BackboneConfig, weights: dict[str, Tensor]) -> None:
    """Refuse an architecture that is not the weights', before memory is taken for what may be of any size."""
    try:
        with torch.device("meta"):
            named = build_backbone(architecture).state_dict()
    except (RuntimeError, TypeError) as error:  # more elements than torch can count
        if architecture.name.startswith(LIBRARIES):  # one that looks at its values while it is built
            return
        raise InputError(f"{architecture.in_words} is too large to be built; get the encoder again") from error
    for name in [*named, *weights]:
        there, wanted = (tuple(each[name].shape) if name in each else "absent" for each in (weights, named))
        if there != wanted:
            raise InputError(
                f"these are not the weights of {architecture.in_words}: {name} is {there}, not {wanted}; "
                "get the encoder again"
            )


def _rebuild(architecture: BackboneConfig, weights: dict[str, Tensor]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):  # the initial weights are overwritten: leave the caller's generator alone
        backbone = build_backbone(architecture)
    try:
        backbone.load_state_dict(weights)
    except RuntimeError as error:
        network, detail = architecture.in_words, " ".join(str(error).partition(":")[2].split())[:120]
        raise InputError(f"these are not the weights of {network}: {detail}; give the bare backbone") from error
    return backbone


class _Program(nn.Module):
    """What is exported: float views of the input size in, representations out."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, images: Tensor) -> Tensor:
        return self.encoder.represent(images)


def _export(encoder: Encoder, path: Path) -> None:
    """Write the program: float32 (N, 3, S, S) in [0, 1], any N -> (N, D).

    It takes float, not uint8, so that an image of any size can be resized without rounding before it, and the result
    is that of `Encoder`. The example that traced it is left out: it would be the one pickle in the file.
    """
    size = encoder.input_size
    example = torch.zeros(2, 3, size, size)
    batch = torch.export.Dim("batch")
    program = torch.export.export(
        copy.deepcopy(_Program(encoder)), (example,), dynamic_shapes={"images": {0: batch}}, strict=False
    )
    program.example_inputs = None
    torch.export.save(program, path)


def _three(values: Sequence[float]) -> tuple[float, float, float]:
    red, green, blue = (float(x) for x in values)
    return red, green, blue
