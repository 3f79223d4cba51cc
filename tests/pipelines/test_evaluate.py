"""`jem evaluate`, on digits, with an encoder from a folder."""

from __future__ import annotations

from pathlib import Path

import mlflow
import pyarrow.parquet as pq
import pytest
import torch
from mlflow import MlflowClient

from jem.config import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    BackboneConfig,
    EvaluateConfig,
    EvaluationSettings,
    KNNConfig,
    ProbeConfig,
)
from jem.encoder import Encoder, EncoderInfo, save_encoder
from jem.errors import InputError
from jem.models.backbones import build_backbone
from pipelines.evaluate import EvaluateResult, evaluate, table

SETTINGS = EvaluationSettings(
    knn=KNNConfig(k=10), probe=ProbeConfig(weight_decays=(1e-2,), max_iterations=30), online=None
)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(1)
    architecture = BackboneConfig(stem="stride2")
    made = Encoder(build_backbone(architecture), architecture, 32, IMAGENET_MEAN, IMAGENET_STD).eval()
    folder = tmp_path_factory.mktemp("trained") / "encoder"
    trained_with = {"stream": {"canvas": 32}}
    save_encoder(made, folder, EncoderInfo(method="vicreg", data="digits", config=trained_with))
    return folder


@pytest.mark.ray
def test_an_encoder_is_judged_beside_an_untrained_one(
    ray_cluster: None, encoder: Path, digits_dataset: Path, digits_test: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = EvaluateConfig(
        encoder=str(encoder), data=str(digits_dataset), test=str(digits_test), limit=300, evaluation=SETTINGS
    )
    result = evaluate(config)

    assert 0.3 < result.figures["knn"] <= 1  # untrained convolutions tell digits apart better than the 0.1 of chance
    assert 0.3 < result.figures["linear"] <= 1
    assert set(result.random) == set(result.figures)
    assert result.random != result.figures
    assert result.collapse == 0
    printed = capsys.readouterr().out
    assert "decoded to 32 px" in printed  # what the encoder was trained with, not the default of 256
    assert table(result) in printed
    run = MlflowClient(mlflow.get_tracking_uri()).get_run(result.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.metrics["final/knn"] == pytest.approx(result.figures["knn"])
    assert run.data.metrics["random/linear"] == pytest.approx(result.random["linear"])
    assert run.data.tags["jem.collapse"] == "0"


@pytest.mark.parametrize("missing", ["data", "test"])
def test_a_set_without_labels_is_refused(
    encoder: Path, digits_dataset: Path, digits_test: Path, tmp_path: Path, missing: str
) -> None:
    source = {"data": digits_dataset, "test": digits_test}
    part = next(iter(source[missing].glob("*.parquet")))
    pq.write_table(pq.read_table(part, columns=["image"]), tmp_path / "part-00000.parquet")
    config = EvaluateConfig(
        encoder=str(encoder), **{name: str(path) for name, path in (source | {missing: tmp_path}).items()}
    )
    with pytest.raises(InputError, match="has no labels"):
        evaluate(config)


def test_table_has_what_was_measured() -> None:
    figures = {"rankme": 12.0, "std": 0.5, "spread": 0.8, "correlation": 0.25}
    result = EvaluateResult("models:/x/1", "run", figures | {"knn": 0.5}, figures, 0, "not collapsed: fine")
    lines = table(result).splitlines()
    assert lines[0].split() == ["random", "encoder"]
    assert lines[1].split() == ["kNN", "-", "50.00%"]
    assert not any("linear" in line for line in lines)
    assert lines[-1] == "representation: not collapsed: fine"
