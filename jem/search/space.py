"""The search space: ready ranges for each method and one's own, checked against the schema before anything starts."""

from __future__ import annotations

import difflib
import itertools
import math
import random
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import ValidationError

from jem.config import PretrainConfig, Range, SearchConfig
from jem.errors import InputError

Space = dict[str, Range]
"""Ranges by the dotted name of the setting."""
Settings = dict[str, Any]
"""One value for each name, as JSON holds them."""

FIXED = (
    "data", "test", "limit", "name", "resume", "storage", "profile", "search", "cluster", "evaluation", "track",
    "method.name", "stream.cache", "stream.decode_cpus", "stream.decode_tasks", "augment.placement",
    "augment.pool_actors", "augment.pool_cpus", "augment.pool_gpus",
)  # fmt: skip
"""What all trials of a search have in common: what they are judged on, and what they run on."""
CHECKS = 256
"""Combinations of values, at most, that are validated before a search begins."""

WEIGHTS: dict[str, Space] = {
    "vicreg": {
        "method.lam": Range(loguniform=(1, 100)),
        "method.mu": Range(loguniform=(1, 100)),
        "method.nu": Range(loguniform=(0.04, 25)),
    },
    "barlow": {"method.lam": Range(loguniform=(5e-4, 0.1))},
}
TEMPERATURE: dict[str, Space] = {
    **{
        method: {"method.temperature": Range(loguniform=(0.05, 1.0))}
        for method in ("simclr", "moco", "mocov3", "pirl", "swav", "deepcluster")
    },
    "dino": {
        "method.temperature": Range(loguniform=(0.08, 0.3)),
        "method.teacher_temperature": Range(loguniform=(0.02, 0.07)),
    },
}
EMA: dict[str, Space] = {
    method: {"method.momentum.tau": Range(decay=(0.9, 0.9999))}
    for method in ("byol", "moco", "mocov3", "dino", "data2vec", "obow", "directpred")
}
RATES: dict[str, Space] = {
    "lars": {"optimizer.lr": Range(loguniform=(0.03, 3)), "optimizer.weight_decay": Range(loguniform=(1e-6, 1e-3))},
    "sgd": {"optimizer.lr": Range(loguniform=(0.006, 0.6)), "optimizer.weight_decay": Range(loguniform=(1e-5, 1e-2))},
    "adam": {"optimizer.lr": Range(loguniform=(1e-4, 1e-2)), "optimizer.weight_decay": Range(loguniform=(1e-7, 1e-4))},
    "adamw": {"optimizer.lr": Range(loguniform=(1e-4, 1e-2)), "optimizer.weight_decay": Range(loguniform=(1e-3, 0.3))},
}
"""By optimizer."""
READY = {"weights": WEIGHTS, "temperature": TEMPERATURE, "ema": EMA, "rates": RATES}


def space_of(search: SearchConfig, base: PretrainConfig) -> Space:
    """The ranges of a search, the ready ones first; one's own take their place where both have a setting.

    Raises:
        InputError: a ready space that the method has not, a setting that does not exist for it, or a range with a
            value that the schema refuses; one line each.
    """
    space: Space = {}
    for name in search.over:
        by_method = READY[name]
        key = base.optimizer.name if name == "rates" else base.method.name
        if key not in by_method:
            raise InputError(
                f"search.over {name} is not for {key}: it has ranges for {', '.join(by_method)}; give your own in "
                "search.space"
            )
        space |= by_method[key]
    space |= search.space
    problems = [problem for key, values in space.items() for problem in _problems(base, key, values)]
    if problems:
        raise InputError("\n".join(problems))
    if search.sampler == "grid":
        grid_of(space)
    _check_together(space, base, search)
    return space


def varied(base: PretrainConfig, settings: Mapping[str, Any]) -> PretrainConfig:
    """`base` with some settings of its own.

    Raises:
        KeyError: there is no such setting.
        ValidationError: the schema refuses them.
    """
    content: dict[str, Any] = base.model_dump(mode="json")
    for key, value in settings.items():
        *sections, last = key.split(".")
        holder: Any = content
        for section in sections:
            holder = holder[_index(holder, section)]
        position = _index(holder, last)
        holder[position]  # it must be there
        holder[position] = value
    return PretrainConfig.model_validate(content)


def grid_of(space: Space) -> list[Settings]:
    """Every combination, the last range changing fastest.

    Raises:
        InputError: a range has no end of values.
    """
    for key, values in space.items():
        if values.kind not in {"choice", "int"}:
            raise InputError(
                f"search.space.{key}: a grid needs its values one by one, as choice or int, not {values.kind}"
            )
    columns = [
        list(values.choice) if values.choice is not None else list(range(int(values.ends[0]), int(values.ends[1]) + 1))
        for values in space.values()
    ]
    return [dict(zip(space, row, strict=True)) for row in itertools.product(*columns)]


def drawn(values: Range, source: random.Random) -> Any:
    """One value of a range."""
    match values.kind:
        case "choice":
            return source.choice(values.choice or [])
        case "int":
            return source.randint(*(int(end) for end in values.ends))
        case "uniform":
            return source.uniform(*values.ends)
        case "decay":
            return 1 - math.exp(source.uniform(*sorted(math.log(1 - end) for end in values.ends)))
    value = math.exp(source.uniform(*(math.log(end) for end in values.ends)))
    low, high = values.ends
    return min(max(round(value), int(low)), int(high)) if values.kind == "logint" else min(max(value, low), high)


def refusal(error: ValidationError) -> str:
    """What the schema says first against a configuration, in a line."""
    detail = error.errors(include_url=False)[0]
    message = detail["msg"].removeprefix("Value error, ")
    return f"{message[:1].lower()}{message[1:]}"


# --- what is refused ------------------------------------------------------------------------------------------------


def _index(holder: Any, part: str) -> Any:
    if isinstance(holder, list) and part.isdigit() and int(part) < len(holder):
        return int(part)
    if isinstance(holder, dict) and part in holder:
        return part
    raise KeyError(part)


def _problems(base: PretrainConfig, key: str, values: Range) -> Iterator[str]:
    """What is wrong with one range, at most one line."""
    where = f"search.space.{key}"
    fixed = next((name for name in FIXED if key == name or key.startswith(f"{name}.")), None)
    if fixed is not None:
        yield f"{where}: {fixed} is the same in all trials of a search: leave it out"
        return
    for value in _samples(values):
        try:
            varied(base, {key: value})
        except KeyError:
            yield _unknown(base, key)
            return
        except ValidationError as error:
            yield f"{where} {value!r:.60}: {refusal(error)}"
            return


def _unknown(base: PretrainConfig, key: str) -> str:
    names = [name for name in _paths(base.model_dump(mode="json")) if not name.startswith(FIXED)]
    near = difflib.get_close_matches(key, names, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else "`jem tune --help` lists the settings"
    return f"search.space.{key} is no setting of this run, whose method is {base.method.name}: {hint}"


def _paths(content: Any, prefix: str = "") -> Iterator[str]:
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in items:
        yield f"{prefix}{key}"
        yield from _paths(value, f"{prefix}{key}.")


def _samples(values: Range) -> list[Any]:
    """Both ends, and some in between: what holds for 1 and 2 may not for 1.5."""
    if values.choice is not None:
        return list(values.choice)
    source = random.Random(0)
    low, high = values.ends
    whole = values.kind in {"int", "logint"}
    return [*((int(low), int(high)) if whole else (low, high)), *(drawn(values, source) for _ in range(3))]


def _check_together(space: Space, base: PretrainConfig, search: SearchConfig) -> None:
    """Refuse values that the schema takes one by one, but not together."""
    source = random.Random(search.trials or 0)
    columns = [_samples(values) for values in space.values()]
    if math.prod(len(column) for column in columns) <= CHECKS:
        rows = list(itertools.product(*columns))
    else:
        rows = [tuple(source.choice(column) for column in columns) for _ in range(CHECKS)]
    for row in rows:
        settings = dict(zip(space, row, strict=True))
        try:
            varied(base, settings)
        except ValidationError as error:
            words = ", ".join(f"{key} {value!r:.40}" for key, value in settings.items())
            raise InputError(f"search.space: {words} cannot go together: {refusal(error)}") from error
