"""`jem encoders`: what is printed and what is refused."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from jem.config import BackboneConfig, TrackConfig
from jem.encoder import Encoder, EncoderInfo, save_encoder
from jem.models.backbones import build_backbone
from jem.tracking.registry import register_encoder
from jem.tracking.runs import Tracker
from pipelines.command import main

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A store with one encoder."""
    folder = tmp_path_factory.mktemp("encoders")
    track = TrackConfig(uri=f"sqlite:///{folder}/mlflow.db")
    torch.manual_seed(0)
    architecture = BackboneConfig(stem="cifar")
    encoder = Encoder(build_backbone(architecture), architecture, 32, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    info = EncoderInfo(method="vicreg", data="digits", metrics={"knn": 0.875}, config={"seed": 3})
    save_encoder(encoder, folder / "encoder", info)
    register_encoder(folder / "encoder", "digits", Tracker(track).start_run("run", {}), {"note": "kept"}, None, track)
    return str(track.uri)


def test_list_show_promote_and_pull(store: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["encoders", "promote", "models:/digits/1", "champion", "--track.uri", store]) == 0
    assert "models:/digits@champion is version 1 now" in capsys.readouterr().out
    assert main(["encoders", "list", "--track.uri", store]) == 0
    head, row = capsys.readouterr().out.splitlines()
    assert head.split()[:3] == ["encoder", "aliases", "method"]
    assert row.split()[:5] == ["models:/digits/1", "champion", "vicreg", "resnet18", "512"]
    assert row.endswith("knn 0.875")
    assert main(["encoders", "show", "models:/digits@champion", "--track.uri", store]) == 0
    shown = capsys.readouterr().out
    for words in ("models:/digits/1", "champion", "resnet18, cifar stem", "0.875", "kept", '{"seed": 3}'):
        assert words in shown
    out = str(tmp_path / "pulled")
    assert main(["encoders", "pull", "models:/digits@champion", out, "--track.uri", store]) == 0
    assert f"jem.load_encoder({out!r})" in capsys.readouterr().out
    assert main(["encoders", "show", out]) == 0


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["show", "models:/nothing"], "no encoder nothing"),
        (["show", "models:/digits@nobody"], "no alias nobody"),
        (["promote", "models:/digits/9", "champion"], "no version 9"),
        (["pull", "models:/digits@nobody", "out"], "no alias nobody"),
    ],
)
def test_what_is_not_there_ends_with_one_line_and_status_2(
    store: str, words: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["encoders", *words, "--track.uri", store]) == 2
    error = capsys.readouterr().err
    assert reason in error
    assert len(error.splitlines()) == 1


def test_an_unreachable_server_ends_with_one_line_and_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["encoders", "list", "--track.uri", "http://127.0.0.1:1"]) == 2
    error = capsys.readouterr().err
    assert "http://127.0.0.1:1" in error
    assert len(error.splitlines()) == 1
