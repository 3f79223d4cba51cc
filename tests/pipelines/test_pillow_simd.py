"""Pillow-SIMD takes Pillow's place only where no image file is lost by it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import PIL
import pytest

from pipelines import pillow_simd
from pipelines.pillow_simd import Note, lost, probe, read_note, set_up

PILLOW = {"version": "13.0.0", "able": ["png", "webp", "PNG", "WEBP"], "features": ["zlib", "webp", "xcb", "raqm"]}


def test_a_format_that_cannot_be_read_is_lost():
    simd = {"version": "12.0.post0", "able": ["png", "PNG"], "features": ["zlib"]}
    assert lost(PILLOW, simd) == ["webp", "WEBP"]


def test_windows_and_typesetting_are_no_loss():
    assert lost(PILLOW, {**PILLOW, "version": "12.0.post0", "features": ["zlib", "webp"]}) == []


def test_probe_finds_what_this_pillow_decodes(tmp_path: Path):
    found = probe(tmp_path, "make")
    assert found["version"] == PIL.__version__
    assert {"jpeg", "jpeg-cmyk", "png-16bit", "gif", "bmp", "tiff"} <= set(found["able"])
    (tmp_path / "jpeg.jpg").write_bytes(b"no image")
    assert "jpeg" not in probe(tmp_path)["able"]


def test_pillow_stays_when_the_build_fails_and_the_note_says_why(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    def fails(_folder: Path, _constraint: str | None) -> Path:
        text = "building\nThe headers or library files could not be found for jpeg, a required dependency\n  at line 3"
        raise subprocess.CalledProcessError(1, ["pip"], output="", stderr=text)

    monkeypatch.setattr(pillow_simd, "build", fails)
    monkeypatch.setattr(pillow_simd, "probe", lambda *_args, **_named: PILLOW)
    monkeypatch.setattr(pillow_simd, "install", lambda _wheel: pytest.fail("installed"))
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["pillow_simd"])
    assert pillow_simd.main() == 0, "the set-up goes on with Pillow"
    note = read_note()
    assert note is not None
    assert note.active == "Pillow 13.0.0"
    assert "could not be found for jpeg" in note.reason
    assert note.reason in capsys.readouterr().out


def test_an_installed_pillow_simd_is_left_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(pillow_simd, "probe", lambda *_args, **_named: {**PILLOW, "version": "12.1.post0"})
    monkeypatch.setattr(pillow_simd, "build", lambda *_args: pytest.fail("built again"))
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    assert set_up(None).active == "Pillow-SIMD 12.1.post0"


def test_without_a_note_nothing_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    assert read_note() is None
    (tmp_path / "pillow-simd.json").write_text("{broken")
    assert read_note() is None
    assert Note("Pillow", "reason").lost == []
