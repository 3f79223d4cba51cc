"""Credentials are taken out of URIs, alone and in sentences, and nothing else is."""

from __future__ import annotations

import pytest

from jem.credentials import stripped, without_credentials
from jem.errors import InputError, RunError


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("s3://key:secret@bucket/a", "s3://bucket/a"),
        ("s3://KEY:a/b+c@bucket/a", "s3://bucket/a"),  # as it is pasted, with the slash that many keys have
        ("http://u:p(a'b@h/x", "http://h/x"),
        ("http://u:p@ss@h/x", "http://h/x"),
        ("http://u:1234@h/x", "http://h/x"),
        ("http://token@[::1]:5000/x", "http://[::1]:5000/x"),
        ("https://host/a?sig=x&page=2", "https://host/a?page=2"),
        ("https://host/a?X-Amz-Credential=x&X-Amz-Signature=y", "https://host/a"),
        ("https://host/a?a=1&token=x&b=2&api_key=3", "https://host/a?a=1&b=2"),
        ("s3://b/x?endpoint_override=http://u:p@h:1&region=eu", "s3://b/x?endpoint_override=http://h:1&region=eu"),
        ("abfss://container@account/a?sig=x", "abfss://container@account/a"),
        ("postgresql+psycopg2://u:p@db:5432/mlflow", "postgresql+psycopg2://db:5432/mlflow"),
        ("postgresql://db/mlflow?user=a&password=x", "postgresql://db/mlflow?user=a"),
        (
            "no answer from 'http://u:p@host/a?token=x', try http://v:q@b.",
            "no answer from 'http://host/a', try http://b.",
        ),
        ("s3://u:p@bucket/my data?sig=x", "s3://bucket/my data"),
        *[
            (plain, plain)
            for plain in (
                "s3://bucket/a",
                "gs://bucket/2@x.png",
                "models:/vicreg@champion",
                "runs/data@home",
                "http://host:5000/a/x@y",
                "http://host:5000 and user@host",
                "http://[::1]:5000/x",
                "http://[broken",
                "https://host/?monkey=1&keyboard=2",
                "a: b, c@d?token=e",
                "",
            )
        ],
    ],
)
def test_credentials_are_removed_from_uris_and_nothing_else_is(text: str, clean: str) -> None:
    assert without_credentials(text) == clean
    assert without_credentials(f"see {text} for more") == f"see {clean} for more"


def test_they_are_removed_wherever_they_are_nested() -> None:
    content = {"data": "s3://k:s@b/a", "more": [{"uri": "http://u:p@h"}, 3, None], "pair": ("s3://k:s@b", 1.5)}
    clean = {"data": "s3://b/a", "more": [{"uri": "http://h"}, 3, None], "pair": ["s3://b", 1.5]}
    assert stripped(content) == clean


@pytest.mark.parametrize("kind", [InputError, RunError])
def test_no_error_quotes_them(kind: type[Exception]) -> None:
    assert str(kind("cannot open s3://key:secret@bucket/a: check it")) == "cannot open s3://bucket/a: check it"
