"""`jem embed`: the features of the loaded encoder, by id, in Parquet."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from jem.config import BackboneConfig, EmbedConfig, StreamConfig
from jem.data.index import open_index
from jem.data.read import read_rows
from jem.encoder import Encoder, EncoderInfo, read_encoder, save_encoder
from jem.errors import InputError
from jem.models.backbones import build_backbone
from pipelines.embed import embed

STREAM = StreamConfig(canvas=32)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    architecture = BackboneConfig(stem="stride2")
    folder = tmp_path_factory.mktemp("encoder") / "encoder"
    backbone = build_backbone(architecture).eval()
    encoder = Encoder(backbone, architecture, 32, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    save_encoder(encoder, folder, EncoderInfo(method="vicreg", data="digits"))
    return folder


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_embeddings_are_the_encoders_features_by_id(encoder: Path, digits_dataset: Path, tmp_path: Path) -> None:
    out = tmp_path / "embeddings"
    config = EmbedConfig(encoder=str(encoder), data=str(digits_dataset), out=str(out), limit=450, stream=STREAM)
    result = embed(config)
    assert (result.images, result.dimensions) == (450, 512)
    table = pq.read_table(out)
    assert table.schema.field("embedding").type == pa.list_(pa.float32(), 512)
    assert table.column("id").to_pylist() == list(range(450))
    batch = read_rows(open_index(str(digits_dataset)), np.arange(450), 32, STREAM.pixel_limit)
    assert table.column("label").to_pylist() == batch.label.tolist()
    with torch.inference_mode():
        expected = read_encoder(encoder)(batch.image, batch.size).numpy()
    found = np.stack(table.column("embedding").to_numpy())
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)
    about = json.loads((out / "_jem.json").read_text())
    assert about["encoder"] == str(encoder)
    assert about["classes"] == [str(digit) for digit in range(10)]
    with pytest.raises(InputError, match="--overwrite"):
        embed(config)


def test_bad_input_is_refused_before_ray_starts_and_nothing_is_written(
    encoder: Path, digits_dataset: Path, tmp_path: Path
) -> None:
    good = {"encoder": str(encoder), "data": str(digits_dataset), "out": str(tmp_path / "out"), "stream": STREAM}
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "x").write_text("")
    bad = {"encoder": str(tmp_path / "none"), "data": str(tmp_path / "none"), "out": str(tmp_path / "taken")}
    for key, value in bad.items():
        with pytest.raises(InputError):
            embed(EmbedConfig(**{**good, key: value}))  # type: ignore[arg-type]
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]
