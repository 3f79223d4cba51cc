"""The `jem` command, and the way every `python -m pipelines.JOB` starts.

A job is a function that takes its configuration object; this file finds it, reads its configuration, runs it, and
turns errors into one line and an exit status: 0, 1 (the job failed), 2 (bad input), 130 (interrupted), 143 (SIGTERM).
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TextIO

import jem
from jem import config as schema
from jem.credentials import without_credentials
from jem.errors import InputError, RunError
from pipelines.settings import dump_config, load_config, recipe_names, recipe_text

__all__ = ["dump_config", "load_config", "main", "main_for", "run_job"]

TERMINATED = 128 + signal.SIGTERM


@dataclass(frozen=True)
class Job:
    """What a job's words on the command line lead to."""

    words: str
    """`ingest`, `encoders list`, ..."""
    function: str
    """`module:function`; imported only when it is run, for torch and Ray take seconds."""
    config: str
    """Name of its model in `jem.config`."""
    positional: tuple[str, ...] = ()
    """Fields that are given by position."""

    @property
    def schema(self) -> type[schema.Section]:
        """The model of its configuration."""
        return getattr(schema, self.config)  # type: ignore[no-any-return]


JOBS = (
    Job("demo", "pipelines.demo:demo", "DemoConfig"),
    Job("ingest", "pipelines.ingest:ingest", "IngestConfig", ("source", "dest")),
    Job("preview", "pipelines.preview:preview", "PreviewConfig", ("data", "out")),
    Job("pretrain", "pipelines.pretrain:pretrain", "PretrainConfig"),
    Job("tune", "pipelines.tune:tune", "TuneConfig"),
    Job("evaluate", "pipelines.evaluate:evaluate", "EvaluateConfig"),
    Job("embed", "pipelines.embed:embed", "EmbedConfig"),
    Job("encoders list", "pipelines.encoders:list_encoders", "EncodersListConfig"),
    Job("encoders show", "pipelines.encoders:show_encoder", "EncodersShowConfig", ("encoder",)),
    Job("encoders promote", "pipelines.encoders:promote_encoder", "EncodersPromoteConfig", ("encoder", "alias")),
    Job("encoders pull", "pipelines.encoders:pull_encoder", "EncodersPullConfig", ("encoder", "dest")),
    Job("methods", "pipelines.methods:list_methods", "MethodsConfig"),
    Job("recipes list", "pipelines.command:list_recipes", "RecipesListConfig"),
    Job("recipes show", "pipelines.command:show_recipe", "RecipesShowConfig", ("name",)),
    Job("doctor", "pipelines.doctor:doctor", "DoctorConfig"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run `jem ARGV` and return its exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in {"-h", "--help", "help"}:
        print(overview())
        return 0
    if words[0] == "--version":
        print(f"jem {jem.__version__}")
        return 0
    debug = [word for word in words[:1] if word == "--debug"]
    words = words[len(debug) :]
    for job in JOBS:
        length = len(job.words.split())
        if words[:length] == job.words.split():
            return run_job(job.words, [*debug, *words[length:]])
    return _no_job(words)


def main_for(words: str) -> int:
    """What `python -m pipelines.JOB` does: run the job with this process's arguments."""
    return run_job(words, sys.argv[1:])


def run_job(words: str, argv: Sequence[str]) -> int:
    """Read the configuration of the job `words` from `argv`, run it, and return the exit status.

    The job's result may have an `exit_status` of its own (`jem doctor`: 1 where something is broken).
    """
    job = next(job for job in JOBS if job.words == words)
    with contextlib.redirect_stdout(_Shown(sys.stdout)), contextlib.redirect_stderr(_Shown(sys.stderr)):
        return _run(job, argv)


class _Shown:
    """An output that URIs pass without their credentials: it ends up in the logs of the cluster."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        return self._stream.write(without_credentials(text))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _run(job: Job, argv: Sequence[str]) -> int:
    prog = f"jem {job.words}"
    try:
        config = load_config(job.schema, argv, prog=prog, positional=job.positional)
        result = _function(job)(config)
        sys.stdout.flush()
    except SystemExit as stop:
        if stop.code == signal.SIGTERM:  # what Ray makes of the signal
            print(f"{prog}: stopped", file=sys.stderr)
            return TERMINATED
        return stop.code if isinstance(stop.code, int) else 1  # after --help
    except KeyboardInterrupt:
        print(f"{prog}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `jem recipes show NAME | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:  # noqa: BLE001, the border of the program
        if "--debug" in argv:
            traceback.print_exception(error)
        return _say(prog, error)
    return int(getattr(result, "exit_status", 0))


def _function(job: Job) -> Callable[[Any], Any]:
    module, _, name = job.function.partition(":")
    return getattr(importlib.import_module(module), name)  # type: ignore[no-any-return]


def _say(prog: str, error: BaseException) -> int:
    """Print the cause, one line each, and return the exit status that its kind has."""
    causes = list(_causes(error))
    known = next((cause for kind in (InputError, RunError) for cause in causes if isinstance(cause, kind)), None)
    if known is not None:
        lines = str(known).splitlines()
    else:
        first = next((line for line in str(error).splitlines() if line.strip()), "")
        lines = [f"{type(error).__name__}: {first} (--debug shows where)"]
    for line in lines:
        print(f"{prog}: {line}", file=sys.stderr)
    return 2 if isinstance(known, InputError) else 1


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The innermost first: Ray wraps a worker's error in one or two of its own, whose texts are whole tracebacks."""
    inner: list[Any] = [getattr(error, "cause", None), error.__cause__]
    inner += getattr(error, "worker_failures", {}).values()
    for cause in inner:
        if isinstance(cause, BaseException) and cause is not error:
            yield from _causes(cause)
    yield error


# --- what there is ------------------------------------------------------------------------------------------------


def overview() -> str:
    """The help of `jem` alone."""
    rows = []
    for job in JOBS:
        usage = " ".join([job.words, *(field.upper() for field in job.positional)])
        text = next(iter((job.schema.__doc__ or "").splitlines()), "")
        rows.append(f"  {usage:<34}{text}")
    return "\n".join(
        [
            "usage: jem JOB [--recipe NAME] [--config FILE] [--name.of.setting VALUE ...]",
            "",
            "Pretrain image encoders without labels, by joint embedding methods, on Ray.",
            "",
            *rows,
            "",
            "jem JOB --help lists a job's settings; --debug shows the traceback of an error; jem --version.",
        ]
    )


def _no_job(words: Sequence[str]) -> int:
    """No job has these words: a group alone lists, anything else is refused with the nearest name."""
    groups = {job.words.split()[0] for job in JOBS if " " in job.words}
    if words[0] in groups:
        if words[1:] == []:
            return run_job(f"{words[0]} list", [])
        second = [job.words.split()[1] for job in JOBS if job.words.startswith(f"{words[0]} ")]
        if words[1] in {"--help", "-h"}:
            print(f"usage: jem {words[0]} {{{','.join(second)}}}: each has --help")
            return 0
        near = difflib.get_close_matches(words[1], second, n=1)
        hint = f"did you mean {words[0]} {near[0]}?" if near else f"choose from {', '.join(second)}"
        print(f"jem: unknown command {words[0]} {words[1]}: {hint}", file=sys.stderr)
        return 2
    names = list(dict.fromkeys(job.words.split()[0] for job in JOBS))
    near = difflib.get_close_matches(words[0], names, n=1)
    hint = f"did you mean {near[0]}?" if near else f"choose from {', '.join(names)}"
    print(f"jem: unknown command {words[0]}: {hint}", file=sys.stderr)
    return 2


def list_recipes(_config: schema.RecipesListConfig) -> list[str]:
    """Print the recipes' names and first lines."""
    names = recipe_names()
    for name in names:
        print(f"{name:<24}{recipe_text(name).splitlines()[0].lstrip('# ')}")
    return names


def show_recipe(config: schema.RecipesShowConfig) -> str:
    """Print a recipe's YAML."""
    text = recipe_text(config.name)
    print(text, end="")
    return text


if __name__ == "__main__":
    raise SystemExit(main())
