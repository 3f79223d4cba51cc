"""What is wrong with a configuration: the dotted path of the setting, the cause, the nearest valid name."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from jem.credentials import without_credentials

Layer = dict[str, Any]
"""Nested settings, as YAML holds them."""


def models_of(annotation: Any) -> list[type[BaseModel]]:
    """The models that a field may hold: the section, or the members of a union; those inside tuples too."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in models_of(part)]


def paths_of(schema: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every setting's dotted path."""
    for name, field in schema.model_fields.items():
        yield f"{prefix}{name}"
        for model in models_of(field.annotation):
            yield from paths_of(model, f"{prefix}{name}.")


def unknown(schema: type[BaseModel], path: str, *, option: bool = False, models: Sequence[type[BaseModel]] = ()) -> str:
    """Say that there is no setting `path` (in `models`, if they are known), and which one may be meant."""
    dashes = "--" if option else ""
    section, _, name = path.rpartition(".")
    every = list(dict.fromkeys(paths_of(schema)))
    siblings = [field for model in models for field in model.model_fields]
    siblings = siblings or [known.rpartition(".")[2] for known in every if known.rpartition(".")[0] == section]
    if path in every:  # it is one of another member of the union
        kind = " or ".join(str(model.model_fields["name"].default) for model in models if "name" in model.model_fields)
        return f"{path} is no setting of {section} {kind}: that has {', '.join(siblings)}"
    near = [f"{section}.{match}" if section else match for match in difflib.get_close_matches(name, siblings, n=1)]
    near = near or difflib.get_close_matches(path, every, n=1, cutoff=0.75)
    near = near or [known for known in every if known.rpartition(".")[2] == name][:1]
    near = near or difflib.get_close_matches(path, every, n=1)
    if near:
        hint = f"did you mean {dashes}{near[0]}?"
    elif siblings:
        hint = f"{section or 'this job'} has {', '.join(dict.fromkeys(siblings))}"
    else:
        hint = "--help lists all"
    return f"unknown setting {dashes}{path}: {hint}"


def complaints(
    schema: type[BaseModel], error: ValidationError, layers: Sequence[tuple[str, Layer]], positional: Sequence[str]
) -> list[str]:
    """One line per wrong setting, with the file it comes from (`layers`: where each came from, and its settings).

    Left out is what follows from another error: that a list is too short because its element was refused, or that
    the second member of a union does not fit either.
    """
    lines: dict[str, str] = {}
    for detail in error.errors(include_url=False):
        path, models = _place(schema, detail["loc"])
        if path not in lines:
            origin = next((origin for origin, layer in reversed(layers) if _holds(layer, path)), "")
            lines[path] = origin + _line(schema, detail, path, models, positional)
    return [line for path, line in lines.items() if not any(other.startswith(f"{path}.") for other in lines if path)]


def _holds(layer: Layer, path: str) -> bool:
    value: Any = layer
    for part in path.split("."):
        if isinstance(value, Mapping) and part in value:
            value = value[part]
        elif isinstance(value, list | tuple) and part.isdigit() and int(part) < len(value):
            value = value[int(part)]
        else:
            return False
    return True


def _line(
    schema: type[BaseModel],
    error: ErrorDetails,
    path: str,
    models: Sequence[type[BaseModel]],
    positional: Sequence[str],
) -> str:
    kind, message = error["type"], error["msg"].removeprefix("Value error, ")
    if kind == "extra_forbidden":
        return unknown(schema, path, models=models)
    if kind == "missing":
        field = schema.model_fields.get(path)
        what = f" ({field.description})" if field is not None and field.description else ""
        return f"{path} is missing: give {path.upper() if path in positional else f'--{path} VALUE'}{what}"
    if kind == "union_tag_invalid":
        context = error["ctx"]
        members = [member.strip(" '") for member in str(context["expected_tags"]).split(",")]
        near = difflib.get_close_matches(str(context["tag"]), members, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]}?" if near else f"choose from {', '.join(members)}"
        return f"{path}.name cannot be {context['tag']!r}: {hint}"
    if not path:
        return message
    composite = isinstance(error["input"], dict | BaseModel)
    given = without_credentials(repr(error["input"]))  # before it is cut
    shown = "" if composite or kind == "value_error" else f" {given:.60}"
    return f"{path}{shown}: {message[:1].lower()}{message[1:]}"


def _place(schema: type[BaseModel], loc: Sequence[int | str]) -> tuple[str, list[type[BaseModel]]]:
    """The dotted path of an error's location, and the models that hold its last part.

    pydantic adds a union's member to the location (its tag, or its type's name): those parts are no keys.
    """
    path: list[str] = []
    holders: list[type[BaseModel]] = [schema]
    models: list[type[BaseModel]] = [schema]  # what the value at `path` may be
    for position, part in enumerate(loc):
        tagged = [
            model for model in models if "name" in model.model_fields and model.model_fields["name"].default == part
        ]
        if len(models) > 1 and tagged:
            models = tagged
            continue
        last = position == len(loc) - 1
        if isinstance(part, int):
            path.append(str(part))
            continue
        fields = [model.model_fields[part] for model in models if part in model.model_fields]
        if not fields and not last:
            continue
        if not fields and ("[" in part or part in {"bool", "int", "float", "str", "none"}):
            continue
        path.append(part)
        holders, models = models, [model for field in fields for model in models_of(field.annotation)]
    return ".".join(path), holders
