"""`ray job submit --runtime-env` takes the file, and it sends what a job needs."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from tests.ray_configs.files import ROOT, documents

LIMIT = 100 * 2**20
"""Ray's, of what a job may send."""


def test_ray_accepts_every_key() -> None:
    from ray.runtime_env import RuntimeEnv, RuntimeEnvConfig

    values = documents("runtime_env.yaml")[0]
    assert set(values) <= RuntimeEnv.known_fields  # unknown ones are passed over in silence
    assert set(values["config"]) <= RuntimeEnvConfig.known_fields
    RuntimeEnv(**{key: value for key, value in values.items() if key != "working_dir"})


def test_it_installs_nothing() -> None:
    assert not {"pip", "uv", "conda", "container", "image_uri"} & set(documents("runtime_env.yaml")[0])


def test_it_sends_the_code_and_the_recipes_and_leaves_out_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray._private.ray_constants import get_runtime_env_default_excludes
    from ray._private.runtime_env.packaging import _zip_files

    values = documents("runtime_env.yaml")[0]
    monkeypatch.chdir(ROOT)
    package = tmp_path / "package.zip"
    excludes = get_runtime_env_default_excludes() + values["excludes"]
    _zip_files(values["working_dir"], excludes, str(package), include_gitignore=True)
    with zipfile.ZipFile(package) as sent:
        names = set(sent.namelist())
    assert {"jem/__init__.py", "pipelines/pretrain.py", "jem/recipes/vicreg-cifar10.yaml"} <= names
    assert not [name for name in names if name.startswith(("tests/", "benchmarks/", ".venv/", ".git/"))]
    assert package.stat().st_size < LIMIT / 10
