"""Errors that are the user's to mend: one line with the cause and the remedy, no traceback, no credentials."""

from __future__ import annotations

from jem.credentials import without_credentials


class InputError(ValueError):
    """Bad input or configuration. The command prints the message as one line and exits with status 2.

    The message names the cause first and then the remedy: `no data at ./imgs: give a folder of Parquet
    shards, or make one with "jem ingest"`. URIs in it lose their credentials: it ends up in logs.
    """

    def __init__(self, message: str) -> None:
        super().__init__(without_credentials(message))


class RunError(RuntimeError):
    """A job that began and could not finish. The command prints the message as one line and exits with status 1."""

    def __init__(self, message: str) -> None:
        super().__init__(without_credentials(message))


class RetryError(RunError):
    """A part of the cluster failed, not the job's own doing: to begin again may help."""
