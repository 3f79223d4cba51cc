"""Where tracking goes: the MLflow store's URI, and a client for it that is known to answer."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import threading
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import unquote

from jem.credentials import without_credentials
from jem.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from mlflow import MlflowClient

T = TypeVar("T")
DEFAULT = "sqlite:///mlflow.db"
ANSWER_SECONDS = 15.0
"""How long a server may take for its first answer. MLflow itself would go on trying for 4 minutes and more."""
OPEN_SECONDS = 120.0
"""How long a database may take: MLflow makes 50 tables in a new one, which takes a busy machine a while."""
_TALKERS = ("mlflow.store.db.utils", "alembic.runtime.migration", "mlflow.store.model_registry.abstract_store")
_FORBIDDEN = (401, 403)
_KINDS = ("sqlite", "http", "https", "postgresql", "mysql", "mssql", "databricks", "databricks-uc", "uc")


def store_uri(uri: str | None = None) -> str:
    """The tracking URI: the given one, else `MLFLOW_TRACKING_URI` (or what MLflow was told), else `sqlite:///mlflow.db`.

    SQLite paths come back absolute, because Ray's workers change directory.

    Raises:
        InputError: a folder, which MLflow no longer writes to, or a kind of store that it does not know.
    """
    if uri is None:
        import mlflow

        uri = mlflow.get_tracking_uri() if mlflow.is_tracking_uri_set() else DEFAULT  # type: ignore[no-untyped-call]
    if uri.startswith("sqlite:"):
        path = sqlite_file(uri)
        return uri if path is None else f"sqlite:///{path}"
    folder = uri.removeprefix("file://") if uri.startswith("file:") or "://" not in uri else None
    if folder is not None and not uri.startswith(("databricks", "uc")):
        raise InputError(
            f"MLflow cannot track to the folder {folder}: give sqlite:///{folder.rstrip('/')}/mlflow.db, "
            "or the address of a server"
        )
    kind = uri.partition(":")[0].partition("+")[0]
    if kind not in _KINDS:
        raise InputError(f"MLflow knows no tracking store {kind}://: give sqlite:///mlflow.db or a server's address")
    return uri


def connect(uri: str, seconds: float | None = None) -> MlflowClient:
    """A client for the store, which has answered; a new SQLite store is created.

    Call it in the driver first: processes that open a new SQLite store at the same time get in each other's way.

    Raises:
        InputError: the server cannot be reached, refuses, or is none of MLflow's; the SQLite file cannot be written.
    """
    from mlflow import MlflowClient

    shown = without_credentials(uri)
    server = uri.startswith(("http://", "https://"))
    seconds = seconds or (ANSWER_SECONDS if server else OPEN_SECONDS)
    remedy = "start it, or give another with --track.uri (sqlite:///mlflow.db needs no server)"
    try:
        if server:
            within(seconds, lambda: _ask(uri, shown, seconds))
            return MlflowClient(uri, uri)
        return within(seconds, lambda: _open(uri))
    except InputError:
        raise
    except TimeoutError:
        raise InputError(f"MLflow at {shown} did not answer within {seconds:.0f} s: {remedy}") from None
    except Exception as error:
        raise InputError(f"MLflow at {shown} cannot be used ({_short(error)}): {remedy}") from error


def _open(uri: str) -> MlflowClient:
    """A client for a database; SQLite's file and its tables are made."""
    from mlflow import MlflowClient

    path = sqlite_file(uri)
    if path is not None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"cannot make {path.parent} ({error.strerror}): give a writable place in --track.uri"
            ) from error
        if not os.access(path if path.exists() else path.parent, os.W_OK) or path.is_dir():
            raise InputError(f"cannot write {path}: give a writable place in --track.uri (sqlite:///FOLDER/mlflow.db)")
    with quiet():
        client = MlflowClient(uri, uri)
        client.search_experiments(max_results=1)
    return client


def _ask(uri: str, shown: str, seconds: float) -> None:
    """One request, not repeated, with the user's credentials."""
    from mlflow.utils.credentials import get_default_host_creds
    from mlflow.utils.rest_utils import http_request

    response = http_request(  # type: ignore[no-untyped-call]
        get_default_host_creds(uri),  # type: ignore[no-untyped-call]
        "/api/2.0/mlflow/experiments/search",
        "POST",
        json={"max_results": 1},
        max_retries=0,
        timeout=seconds,
        raise_on_status=False,
    )
    if response.status_code in _FORBIDDEN:
        raise InputError(
            f"the MLflow server {shown} refused ({response.status_code}): check MLFLOW_TRACKING_USERNAME and "
            "MLFLOW_TRACKING_PASSWORD or _TOKEN, and that the server's --allowed-hosts has this name"
        )
    if not response.ok or not response.headers.get("Content-Type", "").startswith("application/json"):
        raise InputError(
            f"{shown} does not answer as an MLflow server does (status {response.status_code}): "
            "check the address in --track.uri or MLFLOW_TRACKING_URI"
        )


def sqlite_file(uri: str) -> Path | None:
    """The file behind a SQLite URI; None for other stores."""
    if not uri.startswith("sqlite:///"):
        return None
    return Path.cwd() / unquote(uri.removeprefix("sqlite:///").partition("?")[0])


def within(seconds: float, function: Callable[[], T]) -> T:
    """`function()`, or TimeoutError after `seconds`; what has not ended by then is left to end by itself.

    A thread of its own, because name resolution and file systems know no deadline.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(function())
        except BaseException as error:  # noqa: BLE001  (handed to the caller, below)
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not results:
        raise TimeoutError(f"no end within {seconds:.0f} s")
    return results[0]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without MLflow's reports of each migration of a new store, and of waiting for a model version."""
    loggers = [logging.getLogger(name) for name in _TALKERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _short(error: BaseException) -> str:
    """The innermost reason in one line: MLflow wraps requests, which wraps urllib3, which wraps the socket's."""
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    words = " ".join(str(error).split()) or type(error).__name__
    return without_credentials(re.sub(r"^.*object at 0x[0-9a-f]+>: ", "", words))[:160]
