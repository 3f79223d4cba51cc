"""`jem demo`: the main job, offline, on the handwritten digits that ship with scikit-learn."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image
from sklearn.datasets import load_digits

import jem
from jem.config import DemoConfig, EmbedConfig, IngestConfig, PretrainConfig
from jem.errors import InputError
from pipelines.cluster import connect
from pipelines.command import main_for
from pipelines.embed import embed
from pipelines.ingest import ingest
from pipelines.pretrain import PretrainResult, pretrain
from pipelines.settings import load_config

RECIPE = "vicreg-digits"
TEST_SHARE = 0.2
SIDE = 32


@dataclass(frozen=True)
class DemoResult:
    """What the demo made."""

    vicreg: PretrainResult
    supervised: PretrainResult
    embeddings: str
    """Folder of Parquet files."""
    seconds: float


def demo(config: DemoConfig) -> DemoResult:
    """Ingest, pretrain, evaluate, register, pull back and embed.

    Raises:
        InputError: `config.out` holds something else than a demo.
    """
    began = time.monotonic()
    out = Path(config.out).resolve()
    _clear(out)
    settings = load_config(
        PretrainConfig, ["--recipe", RECIPE, "--data", str(out / "digits-train"), "--test", str(out / "digits-test")]
    )
    with connect(settings.cluster):
        _title("1 of 5: ingest: 1,797 pictures of handwritten digits in class folders become Parquet shards")
        _write_pictures(out / "pictures", config.seed)
        for part in ("train", "test"):
            ingest(IngestConfig(source=str(out / "pictures" / part), dest=str(out / f"digits-{part}")))

        _title(
            f"2 of 5: pretrain without labels: VICReg on {config.workers} Ray Train workers, then judge and register"
        )
        vicreg = pretrain(_settings(config, settings, "vicreg"))

        _title("3 of 5: for comparison, the same network trained with labels, for half as many epochs")
        supervised = pretrain(_settings(config, settings, "supervised"))

        _title("4 of 5: pull the encoder back from the registry")
        encoder = jem.load_encoder(vicreg.encoder)
        picture = next((out / "pictures" / "test").rglob("*.png"))
        pixels = torch.from_numpy(np.array(Image.open(picture).convert("RGB"))).permute(2, 0, 1)
        with torch.no_grad():
            feature = encoder(pixels)
        print(f"jem.load_encoder({vicreg.encoder!r})({picture.name}) -> {tuple(feature.shape)} {feature.dtype}")

        _title("5 of 5: embed the test set")
        embeddings = str(out / "embeddings")
        embed(
            EmbedConfig(
                encoder=vicreg.encoder,
                data=str(out / "digits-test"),
                out=embeddings,
                track=config.track,
            )
        )
        first = pq.read_table(embeddings).slice(0, 1).to_pylist()[0]
        shown = ", ".join(f"{value:.3f}" for value in first["embedding"][:4])
        print(f"first row: id {first['id']}, label {first['label']}, embedding [{shown}, ...]")

    seconds = time.monotonic() - began
    _print(vicreg, supervised, embeddings, seconds, config)
    return DemoResult(vicreg, supervised, embeddings, seconds)


def _settings(config: DemoConfig, recipe: PretrainConfig, method: str) -> PretrainConfig:
    """The recipe with the demo's epochs, workers and names; the supervised one differs in method and epochs only."""
    values = recipe.model_dump()
    values |= {"storage": str(Path(config.out).resolve() / "runs"), "seed": config.seed, "name": method}
    values["train"]["epochs"] = config.epochs
    values["cluster"]["workers"] = config.workers
    values["track"] = config.track.model_dump()
    if method == "supervised":
        values["method"] = {"name": "supervised"}
        values["train"]["epochs"] = max(1, config.epochs // 2)
        values["evaluation"]["random_baseline"] = False
        values["track"] |= {"register_as": f"{config.track.register_as}-supervised", "alias": None}
    return PretrainConfig.model_validate(values)


def _clear(out: Path) -> None:
    """Take away what an earlier demo left; anything else in the folder is not ours to take."""
    ours = {"pictures", "digits-train", "digits-test", "runs", "embeddings"}
    if out.is_dir():
        others = sorted(path.name for path in out.iterdir() if path.name not in ours)
        if others:
            raise InputError(f"{out} holds {others[0]}, which is not of a demo: give another folder with --out")
        shutil.rmtree(out)
    elif out.exists():
        raise InputError(f"{out} is a file: give a folder with --out")


def _write_pictures(folder: Path, seed: int) -> None:
    """Digits as PNG files of 32 x 32 pixels, in one folder per class, four fifths for training."""
    digits = load_digits()
    order = np.random.default_rng(seed).permutation(len(digits.target))
    test = set(order[: int(TEST_SHARE * len(order))].tolist())
    for number, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        place = folder / ("test" if number in test else "train") / str(label)
        place.mkdir(parents=True, exist_ok=True)
        grey = Image.fromarray((pixels * 255 / 16).astype(np.uint8))
        grey.resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(place / f"{number:04d}.png")


def _title(text: str) -> None:
    print(f"\n=== {text}", flush=True)


def _print(
    vicreg: PretrainResult, supervised: PretrainResult, embeddings: str, seconds: float, config: DemoConfig
) -> None:
    print(f"\n{'encoder':<24}{'kNN':>8}{'linear':>8}")
    rows = (("random", vicreg.random), ("VICReg, no labels", vicreg.pretrained), ("supervised", supervised.pretrained))
    for name, figures in rows:
        print(f"{name:<24}{figures['knn']:>8.1%}{figures['linear']:>8.1%}")
    alias = f"models:/{config.track.register_as}@{config.track.alias}"
    print(f"\nregistered: {vicreg.encoder} = {alias} ({vicreg.verdict}); {seconds / 60:.1f} minutes")
    print("where to look next:")
    print("  mlflow ui --backend-store-uri sqlite:///mlflow.db     curves, pictures of the views, projection")
    print("  jem encoders list                                     what is registered")
    print(f"  jem encoders pull {alias} my-encoder    its files")
    print(f"  {embeddings}: Parquet with id, embedding, label")
    print("  jem ingest MY_PICTURES my-data && jem pretrain --recipe vicreg-small --data my-data")


if __name__ == "__main__":
    raise SystemExit(main_for("demo"))
