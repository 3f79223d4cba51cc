"""The files of ray_configs/ and what several tests read out of them."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "ray_configs"
LAUNCHER = ("local.yaml", "cluster-aws.yaml", "cluster-gcp.yaml")
KUBERNETES = (
    "kuberay/raycluster.yaml",
    "kuberay/pretrain.yaml",
    "kuberay/tune.yaml",
    "kuberay/storage.yaml",
    "mlflow.yaml",
)
PODS_WITH_RAY = KUBERNETES[:3]


def text(name: str) -> str:
    """A file as it is."""
    return (FOLDER / name).read_text(encoding="utf-8")


def documents(name: str) -> list[dict[str, Any]]:
    """The YAML documents of a file."""
    return list(yaml.safe_load_all(text(name)))


def cluster_spec(name: str) -> dict[str, Any]:
    """The RayCluster's spec in a file of kuberay/, its own or that of its RayJob."""
    spec: dict[str, Any] = documents(name)[0]["spec"]
    return spec.get("rayClusterSpec", spec)


def pods(name: str) -> list[dict[str, Any]]:
    """The pod specs in a file."""
    return [pod for document in documents(name) for pod in _pods(document)]


def _pods(value: Any) -> list[dict[str, Any]]:
    if isinstance(value, list):
        return [pod for item in value for pod in _pods(item)]
    if not isinstance(value, dict):
        return []
    own = [value] if "containers" in value else []
    return own + [pod for item in value.values() for pod in _pods(item)]


def images(name: str) -> list[str]:
    """The container images that a file names."""
    if name == "Dockerfile":
        return re.findall(r"^FROM (\S+)", text(name), re.MULTILINE)
    if name in LAUNCHER:
        docker = documents(name)[0].get("docker", {})
        return [docker[key] for key in ("image", "head_image", "worker_image") if key in docker]
    return [container["image"] for pod in pods(name) for container in pod["containers"]]


@functools.cache
def constraints() -> dict[str, str]:
    """Versions in constraints.txt for the images' Python 3.12; markers there are about 3.11 and 3.12 only."""
    from packaging.requirements import Requirement

    lines = (line for line in text("constraints.txt").splitlines() if line and not line.startswith("#"))
    pins = (Requirement(line) for line in lines)
    here = {"python_version": "3.12", "python_full_version": "3.12.12"}
    return {
        pin.name.lower(): str(pin.specifier).removeprefix("==")
        for pin in pins
        if pin.marker is None or pin.marker.evaluate(here)
    }
