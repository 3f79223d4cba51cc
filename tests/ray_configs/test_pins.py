"""One set of versions everywhere, images that stay what they are, and no secret in any file."""

from __future__ import annotations

import re
import sys

import pytest
from packaging.requirements import Requirement

from tests.ray_configs.files import (
    FOLDER,
    KUBERNETES,
    LAUNCHER,
    PODS_WITH_RAY,
    ROOT,
    cluster_spec,
    constraints,
    images,
    text,
)

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

WITH_IMAGES = ("Dockerfile", *LAUNCHER, *KUBERNETES)
FILES = sorted(path.relative_to(FOLDER).as_posix() for path in FOLDER.rglob("*") if path.is_file())
OURS = ("registry.example.com/jem:", "registry.example.com/jem-mlflow:")
FINGERPRINTS = re.compile(
    r"AKIA[0-9A-Z]{16}|-----BEGIN|gh[pousr]_[A-Za-z0-9]{30}|AIza[A-Za-z0-9_-]{35}|xox[abp]-|eyJ[A-Za-z0-9_-]{20}"
    r"|\b[0-9a-f]{32,}\b|[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}"
)
NAMED = re.compile(
    r"[\w-]*(password|passwd|secret|token|api_?key|access_key)[\w-]*[\"']?\s*[:=]\s*(\S+)", re.IGNORECASE
)
LOGIN_IN_ADDRESS = re.compile(r"[a-z][a-z0-9+]*://[^\s/@:]+:[^\s/@]+@")
NO_SECRET = re.compile(
    r"[\"']?(\$\(|~?/|\.\.\.|(token|true|false)\b)"  # a command, a path, an ellipsis, the mode of that name, a switch
)


def project() -> dict[str, object]:
    """[project] of pyproject.toml."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_all_files_are_looked_at() -> None:
    assert set(WITH_IMAGES) | {"README.md", "constraints.txt", "runtime_env.yaml"} == set(FILES)


@pytest.mark.parametrize("name", WITH_IMAGES)
def test_images_have_a_version(name: str) -> None:
    if name not in {"local.yaml", "kuberay/storage.yaml"}:
        assert images(name)
    for image in images(name):
        tag = image.rpartition(":")[2]
        assert re.match(r"\d+\.\d+(\.\d+)?(-[\w.-]+)?$", tag), image


@pytest.mark.parametrize("name", FILES)
def test_nothing_is_the_latest(name: str) -> None:
    assert not re.search(r":latest\b|/latest/|\bnightly\b", text(name))


def test_the_images_versions_are_jems_and_those_of_the_constraints() -> None:
    pins, version = constraints(), project()["version"]
    for name in WITH_IMAGES:
        for image in images(name):
            if image.startswith(OURS):
                assert image in {f"{OURS[0]}{version}", f"{OURS[1]}{pins['mlflow']}"}, name
    ray, python = images("Dockerfile")
    assert ray.startswith(f"rayproject/ray:{pins['ray']}-py312-")
    assert python.startswith("python:3.12.")
    assert re.findall(r"--tag (\S+)", text("Dockerfile")) == [f"{OURS[0]}{version}", f"{OURS[1]}{pins['mlflow']}"]
    assert set(re.findall(r"registry\.example\.com/\S+:[\d.]+\b", text("README.md"))) == {
        f"{OURS[0]}{version}",
        f"{OURS[1]}{pins['mlflow']}",
    }
    assert {str(cluster_spec(name)["rayVersion"]) for name in PODS_WITH_RAY} == {pins["ray"]}
    assert set(re.findall(r"\bRay (\d+\.\d+\.\d+)", text("README.md"))) == {pins["ray"]}


def test_the_constraints_are_within_what_jem_asks_for() -> None:
    pins = constraints()
    asked = [Requirement(line) for line in project()["dependencies"]]
    assert len(asked) > 10
    for requirement in asked:
        assert requirement.specifier.contains(pins[requirement.name.lower()]), requirement


def test_every_package_that_the_images_install_has_its_version_in_the_constraints() -> None:
    commands = re.findall(r"pip install ((?:.|\\\n)*?)(?:\n\n|\n(?=[A-Z])|&&)", text("Dockerfile"))
    assert len(commands) == 3
    for command in commands:
        words = command.replace("\\\n", " ").replace('"', "").split()
        assert words[:3] == ["--no-cache-dir", "--constraint", "/tmp/constraints.txt"]
        packages = [word for word in words[3:] if not word.startswith("/")]
        missing = [name for name in packages if Requirement(name).name not in constraints()]
        assert not missing


def test_the_images_are_made_of_files_that_there_are_and_do_not_run_as_root() -> None:
    copied = [words.split() for words in re.findall(r"^COPY (.+)$", text("Dockerfile"), re.MULTILINE)]
    sources = [word for words in copied for word in words[:-1] if not word.startswith("--")]
    assert {"pyproject.toml", "jem", "pipelines", "ray_configs/constraints.txt"} <= set(sources)
    assert [source for source in sources if not (ROOT / source).exists()] == []
    stages = re.split(r"^FROM ", text("Dockerfile"), flags=re.MULTILINE)[1:]
    assert [re.search(r" AS (\w+)", stage)[1] for stage in stages] == ["jem", "mlflow"]
    for stage in stages:
        assert re.findall(r"^USER (\S+)$", stage, re.MULTILINE)[-1] == "1000"


def test_the_wheels_files_are_in_the_image() -> None:
    """setuptools reads them while it builds: a file that COPY forgets fails there, or is missing in silence."""
    table = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    packages = {pattern.rstrip("*") for pattern in table["tool"]["setuptools"]["packages"]["find"]["include"]}
    beside = {table["project"]["readme"], *table["project"]["license-files"]}
    assert all(
        re.search(rf"^COPY .*\b{re.escape(name)}\b", text("Dockerfile"), re.MULTILINE) for name in packages | beside
    )


@pytest.mark.parametrize("name", FILES)
def test_there_is_no_secret(name: str) -> None:
    assert secrets_in(text(name)) == []


def secrets_in(content: str) -> list[str]:
    """Lines that look as if they held one."""
    found = []
    for line in content.splitlines():
        values = [value for _, value in NAMED.findall(line) if not NO_SECRET.match(value)]
        # a name of a secret or of a key in it, in Kubernetes' flow style, is none
        values = [value for value in values if not re.match(r"[\"']?[{`*]|secretKeyRef", value)]
        if values or FINGERPRINTS.search(line) or LOGIN_IN_ADDRESS.search(line):
            found.append(line.strip())
    return found


@pytest.mark.parametrize(
    "line",
    [
        "RAY_AUTH_TOKEN: d41d8cd98f00b204e9800998ecf8427e",
        "password: hunter2",
        "- --env MLFLOW_TRACKING_PASSWORD=hunter2",
        "--backend-store-uri=postgresql://mlflow:hunter2@db/mlflow",
        "AWS_SECRET_ACCESS_KEY=wJalrXUtnFEMI",
        "{name: X, value: AKIAABCDEFGHIJKLMNOP}",
    ],
)
def test_a_secret_would_be_found(line: str) -> None:
    assert secrets_in(line) == [line]
