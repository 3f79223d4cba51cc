"""The encoder as an MLflow python_function. MLflow copies this file into the registered version and runs it there.

So it stands alone: torch, numpy and mlflow, no jem. It runs `encoder.pt2`, which has no pickle in it, after making sure
of that. Images in: uint8 (0..255) or float (0..1), (N, 3, H, W) or (N, H, W, 3), one image without N, or a list of
images of different sizes. Representations out: float32 (N, D).

Like every model from code, this file runs with the rights of whoever loads the version: `mlflow.pyfunc` is for
registries that are trusted, while `jem.load_encoder` reads numbers and text only.
"""

from __future__ import annotations

import hashlib
import json
import warnings
import zipfile
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import torch
from mlflow.pyfunc.model import PythonModel

CHUNK = 256  # images at a time


class ServedEncoder:
    """Central square, resized with antialias, through the exported program."""

    def load_context(self, context: Any) -> None:
        """Read the program, which lies beside this file; ValueError if it was changed, or holds a pickle."""
        path = Path(__file__).with_name("encoder.pt2")
        manifest = json.loads(path.with_name("encoder.json").read_text())
        if hashlib.sha256(path.read_bytes()).hexdigest() != manifest["program_sha256"]:
            raise ValueError(f"{path} was changed after it was saved: get the encoder again")
        refuse_pickles(path)
        self.size = int(manifest["input_size"])
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.program = torch.export.load(path).module().to(self.device)

    # no type of model_input: MLflow would take it for a schema to enforce
    def predict(self, context, model_input, params=None):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
        """Represent images: float32 (N, D)."""
        batches = model_input if isinstance(model_input, (list, tuple)) else [model_input]
        return np.concatenate([self.represent(first_channels(torch.as_tensor(np.asarray(batch)))) for batch in batches])

    def represent(self, images: torch.Tensor) -> np.ndarray:
        """(N, 3, H, W) to (N, D)."""
        with torch.inference_mode():
            parts = [
                self.program(centre(images[start : start + CHUNK].to(self.device), self.size))
                for start in range(0, max(1, len(images)), CHUNK)
            ]
        return torch.cat(parts).float().cpu().numpy()


def first_channels(images: torch.Tensor) -> torch.Tensor:
    """(N, 3, H, W), from one or many, channels first or last."""
    images = images[None] if images.ndim == 3 else images
    if images.ndim == 4 and images.shape[1] != 3 and images.shape[3] == 3:
        images = images.permute(0, 3, 1, 2)
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images of shape {tuple(images.shape)}: give (N, 3, H, W) or (N, H, W, 3)")
    top = 1 if images.is_floating_point() else 255
    if images.numel() and not (images.min() >= -1e-3 * top and images.max() <= top * 1.001):
        raise ValueError(f"{images.dtype} images must be within 0 and {top}, not normalised")
    return images


def centre(images: torch.Tensor, size: int) -> torch.Tensor:
    """The central square at `size`, float32 in [0, 1]."""
    height, width = images.shape[2:]
    scaled = images.float() / (1 if images.is_floating_point() else 255)
    if height == width == size:
        return scaled
    rows, columns = (weights(pixels, min(height, width), size, images.device) for pixels in (height, width))
    return rows @ scaled @ columns.T


def weights(pixels: int, side: int, size: int, device: torch.device) -> torch.Tensor:
    """Triangle filter, widened where it shrinks: (size, pixels), from the central `side` of `pixels`."""
    start, step = (pixels - side) / 2, side / size
    centres = start + step * (torch.arange(size, device=device, dtype=torch.float64) + 0.5)
    left = torch.arange(pixels, device=device, dtype=torch.float64)
    inside = ((left + 1).clamp(max=start + side) - left.clamp(min=start)).clamp(0, 1)
    taps = (1 - (left + 0.5 - centres[:, None]).abs() / max(step, 1.0)).clamp(min=0) * inside
    return (taps / taps.sum(1, keepdim=True)).float()


def refuse_pickles(path: Path) -> None:
    """ValueError unless the archive is one that torch reads without unpickling anything."""
    with zipfile.ZipFile(path) as archive:
        entries = {info.filename.partition("/")[2] or info.filename: info for info in archive.infolist()}
        raw = all(
            not item["use_pickle"]
            for name, info in entries.items()
            if name.endswith("_config.json")
            for item in json.loads(archive.read(info))["config"].values()
        )
        example = entries.get("data/sample_inputs/model.pt")
    if not raw or "models/model.json" not in entries or (example is not None and example.file_size):
        raise ValueError(f"{path} holds a pickle, which encoders never do: do not use it")


with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # MLflow asks for a schema, which images of any size and type have not
    mlflow.models.set_model(type("Served", (ServedEncoder, PythonModel), {})())
