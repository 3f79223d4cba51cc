"""Finding an encoder by its URI, and fetching its files: the registry, a run's artifacts, or a folder."""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from jem.credentials import without_credentials
from jem.encoder import MANIFEST
from jem.errors import InputError, RunError
from jem.tracking.store import connect, sqlite_file, store_uri

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

    from jem.config import TrackConfig

_MODELS = re.compile(r"models:/+(?P<name>[^/@]+)(?:@(?P<alias>[^/@]+)|/(?P<version>[^/@]+))?/?")
_RUNS = re.compile(r"runs:/+(?P<run>[^/]+)/(?P<path>.+?)/?")
_IMPOSSIBLE = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")


def client_for(track: TrackConfig | None) -> MlflowClient:
    """A client for the configured store, which exists and has answered."""
    uri = store_uri(track.uri if track else None)
    file = sqlite_file(uri)
    if file is not None and not file.exists():
        raise InputError(f"nothing is registered in {uri}, which does not exist: give the store with --track.uri")
    return connect(uri)


@contextlib.contextmanager
def fetched(uri: str, track: TrackConfig | None, files: tuple[str, ...]) -> Iterator[Path]:
    """A folder that has `files` of the encoder at `uri`; a temporary one if it was not a folder to begin with."""
    if not uri.startswith(("models:", "runs:")) and "://" not in uri.removeprefix("file://"):
        folder = Path(uri.removeprefix("file://")).expanduser()
        if not folder.exists() and re.fullmatch(r"[\w.-]+", uri):
            raise InputError(f"no encoder at {uri}: give a folder that is there, or models:/{uri} for a registered one")
        yield folder
        return
    import mlflow.artifacts

    tracking_uri, source = _place(uri, track)
    with tempfile.TemporaryDirectory(prefix="jem-encoder-") as temporary:
        with explained(source, f"cannot get {uri}"), _without_bars():
            if tracking_uri is not None:
                _check_held(uri, source, tracking_uri, files)
            for file in files:
                mlflow.artifacts.download_artifacts(
                    artifact_uri=f"{source}/{file}", dst_path=temporary, tracking_uri=tracking_uri
                )
        yield Path(temporary)


def _place(uri: str, track: TrackConfig | None) -> tuple[str | None, str]:
    """The tracking store, and the address of the encoder's folder among its artifacts or elsewhere."""
    if not uri.startswith(("models:", "runs:")):
        return None, uri.rstrip("/")
    client = client_for(track)
    with explained(client.tracking_uri, f"cannot look up {uri}"):
        match = _RUNS.fullmatch(uri)
        if match is None:
            version = resolve(client, uri)
            source = client.get_model_version_download_uri(version.name, str(version.version))
        else:
            source = _artifacts(client, match["run"], match["path"])
    return client.tracking_uri, source.rstrip("/")


def _check_held(uri: str, source: str, tracking_uri: str, files: tuple[str, ...]) -> None:
    """InputError that says what there is, if it is not an encoder: of another model no file is looked into."""
    import mlflow.artifacts

    held = mlflow.artifacts.list_artifacts(artifact_uri=source, tracking_uri=tracking_uri)
    names = [item.path.rpartition("/")[2] for item in held]
    for file in files:
        if file not in names:
            raise InputError(
                f"cannot get {uri}: it has no {file} ({_names(names)}), and jem reads nothing else, least of all a "
                "pickle; give an encoder that jem registered"
            )


def _artifacts(client: MlflowClient, run_id: str, path: str) -> str:
    """The address of a folder of a run; InputError that says what there is."""
    from mlflow.exceptions import MlflowException

    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        _missing(error, f"no run {run_id} in {_shown(client)}: give another, or another --track.uri")
    if not any(item.path == f"{path}/{MANIFEST}" for item in client.list_artifacts(run_id, path)):
        folders = [item.path for item in client.list_artifacts(run_id) if item.is_dir]
        raise InputError(f"run {run_id} has no encoder in {path}: give another of its folders ({_names(folders)})")
    return f"{run.info.artifact_uri}/{path}"


def resolve(client: MlflowClient, uri: str) -> ModelVersion:
    """The registered version that a `models:/` URI names; InputError that says what there is."""
    from mlflow.exceptions import MlflowException

    match = _MODELS.fullmatch(uri)
    if match is None:
        raise InputError(f"{uri} is not understood: give models:/NAME@ALIAS, models:/NAME/VERSION or runs:/ID/encoder")
    name, alias, number = match["name"], match["alias"], match["version"]
    try:
        model = client.get_registered_model(name)
    except MlflowException as error:
        there = sorted(model.name for model in pages(client.search_registered_models))
        _missing(error, f"no encoder {name} in {_shown(client)}: give one of those registered ({_names(there)})")
    if alias is not None:
        if alias not in model.aliases:
            raise InputError(f"{name} has no alias {alias}: give one of its aliases ({_names(sorted(model.aliases))})")
        return client.get_model_version(name, str(model.aliases[alias]))
    versions = {int(version.version): version for version in versions_of(client, name)}
    if number is None or number == "latest":
        number = str(max(versions, default=0))
    if not number.isdecimal() or int(number) not in versions:
        raise InputError(f"{name} has no version {number}: give one of its versions ({_names(sorted(versions))})")
    return versions[int(number)]


def versions_of(client: MlflowClient, name: str) -> list[ModelVersion]:
    """All versions of a registered model."""
    quote = '"' if "'" in name else "'"
    return list(pages(client.search_model_versions, filter_string=f"name={quote}{name}{quote}"))


def pages(search: Callable[..., Any], **arguments: str) -> Iterator[Any]:
    """Everything that one of MLflow's paged searches finds."""
    token = None
    while True:
        page = search(page_token=token, **arguments)
        yield from page
        token = page.token
        if not token:
            return


def _names(names: Iterable[object], most: int = 10) -> str:
    listed = [str(name) for name in names]
    return (
        ", ".join(listed[:most]) + (f" and {len(listed) - most} more" if len(listed) > most else "") or "there are none"
    )


def _shown(client: MlflowClient) -> str:
    return str(client.tracking_uri)


def _missing(error: Exception, message: str) -> NoReturn:
    """InputError with `message` if MLflow says that there is no such thing, else the error itself."""
    if getattr(error, "error_code", None) in _IMPOSSIBLE:
        raise InputError(message) from error
    raise error


@contextlib.contextmanager
def explained(where: str, what: str) -> Iterator[None]:
    """MLflow's errors in one line: InputError if it was asked for something impossible, else RunError."""
    try:
        yield
    except (InputError, RunError):
        raise
    except Exception as error:  # MLflow's own, the system's, or those of whatever holds the artifacts
        reason = without_credentials(" ".join(str(error).split()))[:200] or type(error).__name__
        message = f"{what} ({where}): {reason}"
        if getattr(error, "error_code", None) in _IMPOSSIBLE or isinstance(error, FileNotFoundError):
            raise InputError(f"{message}; give another name, or another store with --track.uri") from error
        raise RunError(f"{message}; see that the tracking store and its artifacts can be reached") from error


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    """MLflow draws a progress bar for each file otherwise."""
    name = "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR"
    before = os.environ.get(name)
    os.environ[name] = before or "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
