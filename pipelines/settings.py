"""From recipe, file and command line to one validated configuration.

pydantic-settings reads the command line and the YAML; this file layers what they gave (defaults < recipe < file <
command line), and says what was wrong in the user's words.
"""

from __future__ import annotations

import argparse
import difflib
import shutil
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, cast, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError, create_model
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined
from pydantic_settings import (
    BaseSettings,
    CliImplicitFlag,
    CliPositionalArg,
    CliSettingsSource,
    SettingsError,
    YamlConfigSettingsSource,
)

from jem.config import METHODS, Section, TuneConfig
from jem.errors import InputError
from pipelines.complaints import Layer, complaints, models_of, paths_of, unknown

C = TypeVar("C", bound=Section)
RECIPES = resources.files("jem") / "recipes"


def load_config(schema: type[C], argv: Sequence[str], *, prog: str = "jem", positional: Sequence[str] = ()) -> C:
    """Read `[POSITIONAL ...] [--recipe NAME] [--config FILE] [--field.name VALUE ...]` into a configuration.

    Args:
        schema: the job's model of `jem.config`.
        argv: arguments without the program's name.
        prog: what help calls the program.
        positional: fields of `schema` that are given by position instead of by option.

    Raises:
        InputError: an unknown recipe, file, option or key, or a value that the schema refuses; one line each.
        SystemExit: status 0, after `--help`.
    """
    line = read_command_line(schema, argv, prog=prog, positional=positional)
    layers = [("", defaults_of(schema))]
    if (recipe := line.pop("recipe", None)) is not None:
        layers.append((f"recipe {recipe}: ", _for_job(schema, read_recipe(recipe))))
    if (file := line.pop("config", None)) is not None:
        layers.append((f"{file}: ", _for_job(schema, read_yaml(Path(file)))))
    layers.append(("", line))
    merged: Layer = {}
    for _, layer in layers:
        merged = merge(schema, merged, layer)
    try:
        return schema.model_validate(merged)
    except ValidationError as error:
        raise InputError("\n".join(complaints(schema, error, layers, positional))) from error


def dump_config(config: BaseModel) -> str:
    """All settings of `config` as YAML; given as `--config FILE` it starts the same job again."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)


# --- layers -------------------------------------------------------------------------------------------------------


def recipe_names() -> list[str]:
    """Names of the recipes that ship with jem."""
    return sorted(entry.name.removesuffix(".yaml") for entry in RECIPES.iterdir() if entry.name.endswith(".yaml"))


def recipe_text(name: str) -> str:
    """The YAML of a recipe.

    Raises:
        InputError: there is no recipe of this name.
    """
    names = recipe_names()
    if name not in names:
        near = difflib.get_close_matches(name, names, n=3, cutoff=0.4) or names
        own = f" (a file of your own is given as --config {name})" if name.endswith((".yaml", ".yml")) else ""
        raise InputError(f"unknown recipe {name!r}: did you mean {' or '.join(near)}?{own}")
    return (RECIPES / f"{name}.yaml").read_text(encoding="utf-8")


def read_recipe(name: str) -> Layer:
    """The settings of a recipe."""
    return cast("Layer", yaml.safe_load(recipe_text(name)) or {})


def read_yaml(path: Path) -> Layer:
    """The settings in a YAML file.

    Raises:
        InputError: no such file, no YAML, or not a mapping of settings.
    """
    if not path.is_file():
        raise InputError(f"no configuration file at {path}: give the path of a YAML file, or use --recipe NAME")
    try:
        values = YamlConfigSettingsSource(BaseSettings, yaml_file=path).yaml_data
    except yaml.YAMLError as error:
        raise InputError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path}: {error}") from error
    except (TypeError, ValueError, AttributeError):
        values = None  # a list or a single value where the mapping should be
    if not isinstance(values, dict):
        raise InputError(f"{path} does not hold settings: write `section:` with `name: value` lines below it")
    return values


def defaults_of(schema: type[BaseModel]) -> Layer:
    """The lowest layer: each field's default, sections written out."""
    return {
        name: field.default.model_dump() if isinstance(field.default, BaseModel) else field.default
        for name, field in schema.model_fields.items()
        if field.default is not PydanticUndefined
    }


def merge(schema: type[BaseModel] | None, below: Mapping[str, Any], above: Mapping[str, Any]) -> Layer:
    """Lay `above` over `below`: sections are merged key by key, everything else is replaced.

    Where `above` chooses another member of a union (another method, another optimizer), what `below` set for the
    former one is left out: it would be unknown to the new one.
    """
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        if not (isinstance(old, Mapping) and isinstance(value, Mapping)):
            merged[key] = value
            continue
        field = schema.model_fields.get(key) if schema is not None else None
        tag = field.discriminator if field is not None else None
        if isinstance(tag, str) and value.get(tag, old.get(tag)) != old.get(tag):
            merged[key] = dict(value)
        else:
            models = models_of(field.annotation) if field is not None else []
            merged[key] = merge(models[0] if len(models) == 1 else None, old, value)
    return merged


def _for_job(schema: type[BaseModel], layer: Layer) -> Layer:
    """What concerns the job: `jem preview` reads the views out of a recipe for `jem pretrain`."""
    others = TuneConfig.model_fields.keys() - schema.model_fields.keys()
    return {key: value for key, value in layer.items() if key not in others}


# --- command line -------------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} ({self.prog} --help lists the options)")


def chosen_method(schema: type[BaseModel], argv: Sequence[str]) -> str | None:
    """Name of the method that `argv` chooses, by itself, a file or a recipe; None if the job has no method."""
    if "method" not in schema.model_fields:
        return None
    parser = _Parser(add_help=False, allow_abbrev=False)
    for option in ("--method.name", "--config", "--recipe"):
        parser.add_argument(option, dest=option)
    given = vars(parser.parse_known_args(list(argv))[0])
    names: list[str | None] = [given["--method.name"]]
    if given["--config"] is not None:
        names.append(_method_in(read_yaml(Path(given["--config"]))))
    if given["--recipe"] is not None:
        names.append(_method_in(read_recipe(given["--recipe"])))
    names.append(schema.model_fields["method"].default.name)
    return next(name for name in names if name)


def _method_in(layer: Layer) -> str | None:
    method = layer.get("method")
    return str(method["name"]) if isinstance(method, dict) and "name" in method else None


def narrowed(schema: type[BaseModel], method: str | None) -> type[BaseModel]:
    """The schema with the settings of one method only: a setting may mean another thing, of another type, elsewhere."""
    if method not in METHODS:
        return schema
    fields: dict[str, Any] = {"method": (METHODS[method], FieldInfo(default=METHODS[method](name=method)))}
    narrow = create_model(schema.__name__, __base__=schema, **fields)
    narrow.__doc__ = schema.__doc__
    return narrow


def show_help(schema: type[BaseModel], method: str | None, prog: str, positional: Sequence[str]) -> NoReturn:
    """Print a job's settings; of the methods' those of `method`."""
    if method is not None:
        schema.__doc__ = (
            f"{schema.__doc__}\n\nThe method's settings are those of {method}; --method.name NAME --help, or\n"
            "--recipe NAME --help, shows another's; `jem methods` lists them."
        )
    _parser(schema, prog, positional)[0].print_help()
    raise SystemExit(0)


def read_command_line(schema: type[BaseModel], argv: Sequence[str], *, prog: str, positional: Sequence[str]) -> Layer:
    """What the command line gave, as nested settings, with `recipe` and `config` among them."""
    method = chosen_method(schema, argv)
    every, schema = schema, narrowed(schema, method)
    if "-h" in argv or "--help" in argv:
        show_help(schema, method, prog, positional)
    parser, source = _parser(schema, prog, positional)
    given, rest = parser.parse_known_args(list(argv))
    for word in rest:
        if word.startswith("-"):
            path = word.lstrip("-").partition("=")[0]
            other = path.startswith("method.") and path in paths_of(every)
            raise InputError(
                unknown(every, path, option=not other, models=[METHODS[method]] if other and method else [])
            )
    if rest:
        raise InputError(
            f"unexpected argument {rest[0]!r}: an option's value follows its name, {prog} --help lists them"
        )
    values = vars(given)
    outside = {name: values.pop(name) for name in ("recipe", "config")}
    values.pop("debug")
    try:
        settings = source(parsed_args=values)()
    except SettingsError as error:
        raise InputError(f"{error}: write lists as JSON, such as '[1, 2]'") from error
    settings = _unwrapped(schema, settings)
    return {**settings, **{name: value for name, value in outside.items() if value is not None}}


def _unwrapped(schema: type[BaseModel], layer: Layer) -> Layer:
    """Undo that pydantic-settings makes a list of `--method.branches separate`, or of a null, that could be one."""
    words: Layer = {}
    for name, value in layer.items():
        annotation = schema.model_fields[name].annotation if name in schema.model_fields else None
        words[name] = value
        if isinstance(value, dict):
            for model in models_of(annotation):
                words[name] = _unwrapped(model, words[name])
        elif value == [None] and type(None) in get_args(annotation):
            words[name] = None
        elif isinstance(value, list) and len(value) == 1 and isinstance(value[0], str):
            one_of_words = any(get_origin(part) is Literal for part in get_args(annotation))
            one_of_words = one_of_words and get_origin(annotation) is not tuple  # a list of such words stays one
            words[name] = value[0] if one_of_words else value
    return words


def _parser(
    schema: type[BaseModel], prog: str, positional: Sequence[str]
) -> tuple[argparse.ArgumentParser, CliSettingsSource[Any]]:
    places = " ".join(name.upper() for name in positional)
    parser = _Parser(
        prog=prog,
        usage=f"{prog} {places + ' ' if places else ''}[--recipe NAME] [--config FILE] [--name.of.setting VALUE ...]",
        description=schema.__doc__,
        epilog="Order: defaults < recipe < file < command line. `null` is no value; lists and sections are JSON.",
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(
            prog, max_help_position=34, width=min(shutil.get_terminal_size().columns, 120)
        ),
        allow_abbrev=False,
        add_help=False,
    )
    general = parser.add_argument_group("general")
    general.add_argument("--recipe", metavar="NAME", help="start from a recipe (`jem recipes` lists them)")
    general.add_argument("--config", metavar="FILE", help="start from a YAML file, laid over the recipe")
    general.add_argument("--debug", action="store_true", help="show the traceback of an error")
    general.add_argument("-h", "--help", action="help", help="show this and exit")
    by_position, flag = cast("Any", CliPositionalArg), cast("Any", CliImplicitFlag)
    fields: dict[str, Any] = {}
    for name, field in schema.model_fields.items():
        if name in positional:
            fields[name] = (by_position[str | None], FieldInfo(default=None, description=field.description))
        elif field.annotation is bool:
            fields[name] = (flag[bool], field)
    settings = create_model("Settings", __base__=(BaseSettings, schema), **fields)
    source: CliSettingsSource[Any] = CliSettingsSource(
        cast("type[BaseSettings]", settings),
        root_parser=parser,
        cli_avoid_json=True,
        cli_hide_none_type=True,
        cli_parse_none_str="null",
        cli_use_class_docs_for_groups=True,
    )
    for action in parser._actions:  # noqa: SLF001, argparse shows its options nowhere else
        if action.dest not in {"recipe", "config", "debug", "help"} and action.help is not argparse.SUPPRESS:
            action.help = _help(schema, action.dest).replace("%", "%%")
    for group in parser._action_groups:  # noqa: SLF001
        if group.title == "options":
            group.title = "settings"
        elif group.title is not None:
            group.title = group.title.removesuffix(" options")
    return parser, source


def _holders(schema: type[BaseModel], sections: Sequence[str]) -> list[tuple[str, type[BaseModel], Any]]:
    """The models that a path of sections leads to: the union's member it is of, the model, and its default."""
    holders: list[tuple[str, type[BaseModel], Any]] = [("", schema, None)]
    for section in sections:
        inner = []
        for outer, model, default in holders:
            if (field := model.model_fields.get(section)) is None:
                continue
            value = getattr(default, section) if default is not None else field.default
            models = models_of(field.annotation)
            for member in models:
                tag = str(member.model_fields["name"].default) if len(models) > 1 else outer
                inner.append((tag, member, value if isinstance(value, member) else None))
        holders = inner
    return holders


def _help(schema: type[BaseModel], path: str) -> str:
    """Description and default of a setting; of each member that has it, where its section is a union."""
    *sections, name = path.split(".")
    holders = _holders(schema, sections)
    texts: dict[str, None] = {}
    defaults: dict[str, str] = {}
    for tag, model, default in holders:
        if (found := model.model_fields.get(name)) is None:
            continue
        if found.description:
            texts[found.description] = None
        value = getattr(default, name) if default is not None else found.default
        if isinstance(value, bool | int | float | str) or (
            isinstance(value, tuple) and not models_of(found.annotation)
        ):
            defaults[tag] = (
                "true" if value is True else "false" if value is False else str(value).strip("()").rstrip(",")
            )
    text = "; ".join(texts)
    if name == "name" and sections and len(holders) > 1:
        chosen = schema.model_fields[sections[0]].default
        shown = f"(default: {chosen.name})"
    elif len(holders) > 1:
        shown = f"({', '.join(f'{tag}: {value}' for tag, value in defaults.items())})" if defaults else ""
    else:
        shown = f"(default: {defaults['']})" if defaults.get("") else ""
    return f"{text} {shown}".strip()
