"""The registry: encoders as MLflow model versions, and how they are found, loaded and promoted.

A version's files are those of `jem.encoder.save_encoder` with MLflow's own beside them, so the same version serves
`load_encoder` (safetensors; trainable) and `mlflow.pyfunc.load_model` (the exported program; without jem). A plain
folder is loaded without mlflow being installed. Nothing is unpickled on the way.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from jem.encoder import MANIFEST, PROGRAM, WEIGHTS, Encoder, EncoderManifest, read_encoder, read_manifest
from jem.errors import InputError
from jem.tracking.lookup import client_for, explained, fetched, pages, resolve, versions_of
from jem.tracking.store import quiet

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

    from jem.config import TrackConfig

_REQUIRES = ["mlflow", "torch", "numpy"]
_METRIC = "metric."


@dataclass(frozen=True)
class EncoderVersion:
    """One registered encoder."""

    name: str
    version: int
    aliases: tuple[str, ...]
    run_id: str
    created: float
    """Seconds since 1970."""
    tags: dict[str, str] = field(repr=False)

    @property
    def uri(self) -> str:
        """What `load_encoder` takes."""
        return f"models:/{self.name}/{self.version}"

    @property
    def metrics(self) -> dict[str, float]:
        """Such as knn and linear."""
        return {key.removeprefix(_METRIC): float(v) for key, v in self.tags.items() if key.startswith(_METRIC)}


def register_encoder(
    folder: str | Path,
    name: str,
    run_id: str,
    tags: Mapping[str, object] | None = None,
    alias: str | None = None,
    track: TrackConfig | None = None,
) -> int:
    """Register an encoder's folder as the next version of `name` and return the version.

    The files go to the run's artifacts, under `encoder`. Doing it again (a job that was restarted after registering)
    finds the version that is there.

    Args:
        folder: what `save_encoder` wrote.
        name: of the registered model.
        run_id: the run that made it.
        tags: of the version, beside its method, data, metrics, configuration and checksum.
        alias: given to the new version, such as champion; the version that had it loses it.
        track: where the store is.

    Raises:
        InputError: no encoder in `folder`, no such run, a name or alias that MLflow does not take.
        RunError: the store failed on the way.
    """
    read_encoder(folder)  # a broken one is not registered
    manifest = read_manifest(folder)
    client = client_for(track)
    with explained(client.tracking_uri, f"cannot register {name}"):
        run = client.get_run(run_id)
        _create_model(client, name)
        earlier = [v for v in versions_of(client, name) if v.run_id == run_id]
        version = next((v for v in earlier if v.tags.get("sha256") == manifest.sha256), None)
        if version is None:
            path = "encoder" if not earlier else f"encoder-{len(earlier) + 1}"
            with tempfile.TemporaryDirectory() as temporary:
                _write_model(Path(folder), Path(temporary) / "model")
                client.log_artifacts(run_id, str(Path(temporary) / "model"), path)
            described = {**_tags(manifest), **{key: str(value) for key, value in (tags or {}).items()}}
            with quiet():
                version = client.create_model_version(name, f"{run.info.artifact_uri}/{path}", run_id, tags=described)
        if alias is not None:
            client.set_registered_model_alias(name, alias, str(version.version))
    return int(version.version)


def load_encoder(uri: str, track: TrackConfig | None = None) -> Encoder:
    """Load a pretrained encoder: on the CPU, in evaluation mode, trainable.

    Args:
        uri: `models:/NAME@ALIAS`, `models:/NAME/VERSION`, `models:/NAME` (the latest), `runs:/ID/encoder`, or a folder.
        track: where the store is; default: MLFLOW_TRACKING_URI, or sqlite:///mlflow.db.

    Raises:
        InputError: there is no such encoder (the message names those that there are), or it was changed after it
            was saved.
    """
    with fetched(uri, track, (MANIFEST, WEIGHTS)) as folder:
        return read_encoder(folder)


def list_encoders(track: TrackConfig | None = None) -> list[EncoderVersion]:
    """All registered encoders, by name, the newest version first."""
    client = client_for(track)
    with explained(client.tracking_uri, "cannot list the encoders"):
        aliases = {model.name: model.aliases for model in pages(client.search_registered_models)}
        versions = [version for version in pages(client.search_model_versions) if _ours(version)]
    found = [_describe(version, aliases.get(version.name, {})) for version in versions]
    return sorted(found, key=lambda encoder: (encoder.name, -encoder.version))


def show(uri: str, track: TrackConfig | None = None) -> tuple[EncoderManifest, EncoderVersion | None]:
    """An encoder's manifest, and its entry in the registry if `uri` is a registered version.

    Raises:
        InputError: there is no such encoder.
    """
    with fetched(uri, track, (MANIFEST,)) as folder:
        manifest = read_manifest(folder)
    if not uri.startswith("models:/"):
        return manifest, None
    client = client_for(track)
    with explained(client.tracking_uri, f"cannot look up {uri}"):
        version = resolve(client, uri)
        return manifest, _describe(version, client.get_registered_model(version.name).aliases)


def promote(uri: str, alias: str, track: TrackConfig | None = None) -> EncoderVersion:
    """Give `alias` to the registered version at `uri`; the version that had it loses it.

    Raises:
        InputError: there is no such version, or MLflow does not take the alias.
    """
    client = client_for(track)
    with explained(client.tracking_uri, f"cannot promote {uri} to {alias}"):
        found = resolve(client, uri)
        client.set_registered_model_alias(found.name, alias, str(found.version))
        return _describe(found, client.get_registered_model(found.name).aliases)


def pull(uri: str, dest: str | Path, track: TrackConfig | None = None, *, overwrite: bool = False) -> EncoderManifest:
    """Copy an encoder's files (weights, description, exported program) to the folder `dest`, all or nothing.

    Raises:
        InputError: there is no such encoder, it was changed after it was saved, or `dest` exists (and `overwrite` is
            not set, or it is no encoder's folder).
    """
    dest = Path(dest)
    if dest.exists() and not (overwrite and (dest / MANIFEST).is_file()):
        remedy = "add --overwrite to replace it, or give another" if (dest / MANIFEST).is_file() else "give another"
        raise InputError(f"{dest} exists: {remedy}")
    with fetched(uri, track, (MANIFEST, WEIGHTS, PROGRAM)) as folder:
        read_encoder(folder)
        temporary = Path(tempfile.mkdtemp(prefix=f".{dest.name}.", dir=_made(dest.parent)))
        try:
            for name in (MANIFEST, WEIGHTS, PROGRAM):
                shutil.copyfile(folder / name, temporary / name)
            temporary.chmod(0o755)
            if dest.exists():
                shutil.rmtree(dest)
            temporary.rename(dest)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return read_manifest(dest)


def _describe(version: ModelVersion, aliases: Mapping[str, str]) -> EncoderVersion:
    return EncoderVersion(
        name=version.name,
        version=int(version.version),
        aliases=tuple(sorted(alias for alias, number in aliases.items() if int(number) == int(version.version))),
        run_id=version.run_id or "",
        created=version.creation_timestamp / 1000,
        tags=dict(version.tags),
    )


def _ours(version: ModelVersion) -> bool:
    return "jem" in version.tags and "sha256" in version.tags


def _tags(manifest: EncoderManifest) -> dict[str, str]:
    info = manifest.info
    return {
        "jem": manifest.jem,
        "method": info.method,
        "data": info.data,
        "backbone": manifest.architecture.name,
        "dimensions": str(manifest.dimensions),
        "input_size": str(manifest.input_size),
        "sha256": manifest.sha256,
        "config": json.dumps(info.config),
        **{f"{_METRIC}{key}": f"{value:.6g}" for key, value in info.metrics.items()},
    }


def _write_model(folder: Path, model: Path) -> None:
    """An MLflow model made from code, beside the encoder's own files."""
    import mlflow.pyfunc

    script = Path(__file__).with_name("served_encoder.py")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it asks for a schema, which images of any size and type have not
        mlflow.pyfunc.save_model(str(model), python_model=str(script), pip_requirements=_REQUIRES)
    for name in (MANIFEST, WEIGHTS, PROGRAM):
        shutil.copyfile(folder / name, model / name)


def _create_model(client: MlflowClient, name: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _made(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make {folder} ({error.strerror}): give a writable place") from error
    if not os.access(folder, os.W_OK):
        raise InputError(f"cannot write to {folder}: give a writable place")
    return folder
