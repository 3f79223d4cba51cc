"""Credentials in URIs: what is shown, logged or stored goes through here first."""

from __future__ import annotations

import re
from typing import Any

_USER = re.compile(
    r"(?P<scheme>[a-zA-Z][\w+.-]*)://"
    # user:password@ or user@; a password pasted as it is may hold a slash, and host:5000/path/x@y is none
    r"(?P<user>[^\s/?#@:]*:(?!\d+[/?#])[^\s@]*@(?:[^\s/?#@]*@)*|[^\s/?#@]+@)"
)
_CONTAINERS = ("abfs", "wasb")
"""Schemes in which what stands before the @ is a container, not a user."""
_SECRET = re.compile(
    r"(?P<before>[?&])(?:[\w.~%-]*(?:token|secret|passw|signature|credential|api-?key)[\w.~%-]*"
    r"|(?:[\w.~%-]*[-_.])?(?:sig|key|pwd|auth))=[^\s&#'\"<>]*(?P<after>&?)",
    re.IGNORECASE,
)


def without_credentials(text: str) -> str:
    """`text`, a URI or a sentence with URIs in it, without their users, passwords and signing parameters."""
    if "://" not in text:
        return text
    text = _USER.sub(_host, text)
    before = None
    while before != text:  # each goes with one of the & beside it, which the next one needs too
        before, text = text, _SECRET.sub(_rest, text)
    return text


def stripped(value: Any) -> Any:
    """The same JSON value with credentials removed from the URIs in it."""
    if isinstance(value, str):
        return without_credentials(value)
    if isinstance(value, dict):
        return {key: stripped(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [stripped(item) for item in value]
    return value


def _host(found: re.Match[str]) -> str:
    return found[0] if found["scheme"].lower().startswith(_CONTAINERS) else f"{found['scheme']}://"


def _rest(found: re.Match[str]) -> str:
    return found["before"] if found["after"] else ""
