"""`jem doctor` says what is broken and what to do about it, and ends with a status that a script can use."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jem.config import ClusterConfig, DoctorConfig, TrackConfig
from pipelines import doctor as doctors
from pipelines.doctor import Check, DoctorResult, doctor
from pipelines.pillow_simd import Note


def check(result: DoctorResult, name: str) -> Check:
    return next(check for check in result.checks if check.name == name)


@pytest.fixture
def examine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., DoctorResult]:
    """Run the doctor without starting Ray, on a storage and a tracking store of the test's own."""
    monkeypatch.setattr(doctors, "_ray", lambda _config: iter([Check("Ray", "ok", "not asked")]))

    def examine(**settings: Any) -> DoctorResult:
        own = {"storage": str(tmp_path / "runs"), "track": TrackConfig(uri=f"sqlite:///{tmp_path / 'mlflow.db'}")}
        return doctor(DoctorConfig.model_validate({**own, **settings}))

    return examine


def test_a_sound_installation_is_well(examine: Callable[..., DoctorResult], tmp_path: Path):
    result = examine()
    assert result.exit_status == 0, result
    assert {"jem", "CPU", "formats", "simplejpeg", "memory", "disk", "storage", "MLflow", "Ray"} <= {
        check.name for check in result.checks
    }
    assert {"Pillow", "Pillow-SIMD"} & {check.name for check in result.checks}
    assert not list(tmp_path.iterdir()), "looking leaves nothing behind"


def test_storage_that_cannot_be_written_is_a_problem(examine: Callable[..., DoctorResult], tmp_path: Path):
    (tmp_path / "file").write_text("")
    result = examine(storage=str(tmp_path / "file"))
    assert check(result, "storage").state == "problem"
    assert result.exit_status == 1


def test_an_mlflow_server_that_does_not_answer_is_a_problem(examine: Callable[..., DoctorResult]):
    result = examine(track=TrackConfig(uri="http://127.0.0.1:9"))
    assert check(result, "MLflow").state == "problem"
    assert "127.0.0.1:9" in check(result, "MLflow").says
    assert check(result, "MLflow").remedy


def test_a_missing_or_old_package_is_a_problem(
    examine: Callable[..., DoctorResult], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    wanted = ["numpy>=1", "no-such-thing>=1", "pydantic>=999", "hypothesis>=999; extra == 'dev'"]
    monkeypatch.setattr(importlib.metadata, "requires", lambda _name: wanted)
    assert examine().exit_status == 1
    said = capsys.readouterr().out
    assert "no-such-thing is missing; pydantic" in said
    assert "is not >=999" in said
    assert "hypothesis" not in said
    assert "make setup" in said


def test_a_lost_format_is_named_with_its_remedy(examine: Callable[..., DoctorResult], monkeypatch: pytest.MonkeyPatch):
    able = {"version": "12.0.post0", "able": ["jpeg", "png", "gif", "bmp", "tiff", "tiff-lzw", "avif"], "features": []}
    monkeypatch.setattr(doctors, "probe", lambda *_args, **_named: able)
    monkeypatch.setattr(doctors, "read_note", lambda: Note("Pillow-SIMD 12.0.post0", "built here"))
    result = examine()
    assert check(result, "Pillow-SIMD").says == "12.0.post0; built here"
    assert check(result, "formats").state == "note"
    assert "webp, jpeg2000" in check(result, "formats").says
    assert "pillow" in check(result, "formats").remedy
    able["able"] = ["png"]
    assert check(examine(), "formats").state == "problem"


def test_why_pillow_stayed_is_said(examine: Callable[..., DoctorResult], monkeypatch: pytest.MonkeyPatch):
    note = Note("Pillow 13.0.0", "Pillow-SIMD as built here lacks some of Pillow's formats", ["webp"])
    monkeypatch.setattr(doctors, "read_note", lambda: note)
    able = {"version": "13.0.0", "able": list(doctors.FORMATS), "features": []}
    monkeypatch.setattr(doctors, "probe", lambda *_args, **_named: able)
    assert "lacks some of Pillow's formats (webp)" in check(examine(), "Pillow").says


def test_a_check_that_breaks_does_not_stop_the_others(
    examine: Callable[..., DoctorResult], monkeypatch: pytest.MonkeyPatch
):
    def broken(_config: DoctorConfig) -> None:
        raise OSError("no such device")

    monkeypatch.setattr(doctors, "_machine", broken)
    result = examine()
    assert any(check.says == "OSError: no such device" for check in result.checks)
    assert check(result, "Ray").state == "ok"
    assert result.exit_status == 1


def test_a_ray_that_does_not_answer_in_time_is_given_up(tmp_path: Path):
    (found,) = doctors._ray(DoctorConfig(storage=str(tmp_path), deadline=0.01))
    assert found.state == "problem"
    assert "did not run a task within 0 s" in found.says
    assert found.remedy


@pytest.mark.slow
def test_a_ray_address_where_nothing_listens_is_a_problem(tmp_path: Path):
    (found,) = doctors._ray(DoctorConfig(storage=str(tmp_path), cluster=ClusterConfig(address="127.0.0.1:9")))
    assert found.state == "problem"
    assert "127.0.0.1:9" in found.says


@pytest.mark.ray
@pytest.mark.slow
def test_a_ray_of_its_own_runs_a_task(tmp_path: Path):
    (found,) = doctors._ray(DoctorConfig(storage=str(tmp_path), deadline=200))
    assert found.state == "ok", found
    assert "ran a task: 1 node(s)" in found.says
