"""Errors that are the user's to mend: one line with the cause and the remedy, no traceback."""

from __future__ import annotations


class InputError(ValueError):
    """Bad input or configuration. The command prints the message as one line and exits with status 2.

    The message names the cause first and then the remedy: `no data at ./imgs: give a folder of Parquet
    shards, or make one with "jem ingest"`.
    """


class RunError(RuntimeError):
    """A job that began and could not finish. The command prints the message as one line and exits with status 1."""


class RetryError(RunError):
    """A part of the cluster failed, not the job's own doing: to begin again may help."""
