"""Short trainings in this process, without Ray, one core each: what the tables of methods and ablations are made of.

A trial is a recipe with some settings changed. Its result is one line of a JSON Lines file; a trial whose line is
there, made with the same configuration, is not run again: an interrupted table goes on where it stopped.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from jem.augment.views import Augment, generator
from jem.batch import Views
from jem.config import PretrainConfig
from jem.data.index import Index, open_index
from jem.data.plan import Plan, Position
from jem.data.read import count_classes, local_batches, read_rows
from jem.encoder import Encoder
from jem.evaluate.judge import Features, judge
from jem.methods import build_method
from jem.models.backbones import build_backbone
from jem.train.checkpoint import State
from jem.train.loop import fit
from jem.train.online import encoder_of
from jem.train.watch import Summary
from pipelines.settings import load_config

CHUNK = 500
"""Images per forward pass of the evaluation."""


@dataclass(frozen=True)
class Trial:
    """One training."""

    name: str
    """Of its row."""
    recipe: str
    settings: tuple[str, ...] = ()
    """As on the command line of `jem pretrain`, after the recipe's."""
    seed: int = 0

    def config(self, data: str) -> PretrainConfig:
        """The resolved configuration; `data` has the folders train and test."""
        places = ("--data", f"{data}/train", "--test", f"{data}/test", "--cluster.workers", "1")
        return load_config(PretrainConfig, ["--recipe", self.recipe, *places, "--seed", str(self.seed), *self.settings])

    def key(self, data: str) -> str:
        """Changes with what is set, but not with where the data is, nor with a setting that is added to the schema."""
        config = self.config(data).model_copy(update={"data": "train", "test": "test"})
        members = (config.method.name, config.optimizer.name)
        text = json.dumps([members, config.model_dump(mode="json", exclude_defaults=True)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def untrained_key(self, data: str) -> str:
        """The same for all trials whose untrained encoders, and their judges, are alike."""
        config = self.config(data)
        augment = config.augment
        what = (
            config.limit,
            config.stream.canvas,
            augment.views[0].size,
            augment.mean,
            augment.std,
            config.train.precision,
        )
        text = repr((config.backbone, self.seed, config.evaluation, what))
        return hashlib.sha256(text.encode()).hexdigest()[:16]


class Quiet:
    """A reporter that prints the epochs' lines, with the trial's name."""

    def __init__(self, name: str) -> None:
        self.name = name

    def metrics(self, values: dict[str, float], step: int) -> None:
        pass

    def progress(self, images: int, info: dict[str, float]) -> None:
        pass

    def say(self, message: str) -> None:
        print(f"  {self.name}: {message}", flush=True)


def run(trial: Trial, data: str) -> dict[str, Any]:
    """Train and judge: one row. Seconds are of one core's processor time, which other processes do not lengthen."""
    torch.set_num_threads(1)
    config = trial.config(data)
    index, test = open_index(config.data, config.limit), open_index(f"{data}/test")
    torch.manual_seed(config.seed)
    method = build_method(config.method, config.backbone, count_classes(index), len(index))
    summary: Summary = {}

    def keep(_state: State | None, _step: int, found: Summary) -> None:
        summary.update(found)

    plan = Plan(index.rows, config.seed, config.train.batch_size, 1, config.stream.window, config.stream.remainder)
    augment = Augment(config.augment)

    def source(start: Position) -> Iterator[Views]:
        batches = local_batches(index, plan, config.stream, 0, start, config.train.epochs)
        for batch, position in zip(batches, plan.positions(start, config.train.epochs), strict=True):
            yield augment(batch, generator(config.seed, *position, 0))

    began = time.process_time()
    fit(config, method, source, plan, Quiet(trial.name), keep, device=torch.device("cpu"))
    seconds = time.process_time() - began
    after = judged(encoder_of(method, config), config, index, test)
    images = plan.total_steps(config.train.epochs) * config.train.batch_size
    return {
        "name": trial.name,
        "method": config.method.name,
        "backbone": config.backbone.name,
        "seed": trial.seed,
        "key": trial.key(data),
        "epochs": config.train.epochs,
        "seconds": round(seconds, 1),
        "images_per_second": round(images / seconds, 1),
        "trained": {name: round(value, 4) for name, value in after.items()},
        "embedding": {
            name: summary[name] for name in ("std", "spread", "rankme", "correlation", "collapse", "verdict")
        },
    }


def run_untrained(trial: Trial, data: str) -> dict[str, Any]:
    """Judge the untrained encoder of a trial's kind: one row."""
    torch.set_num_threads(1)
    config = trial.config(data)
    torch.manual_seed(config.seed)
    augment = config.augment
    encoder = Encoder(
        build_backbone(config.backbone), config.backbone, augment.views[0].size, augment.mean, augment.std
    )
    found = judged(encoder, config, open_index(config.data, config.limit), open_index(f"{data}/test"))
    return {
        "name": "untrained",
        "backbone": config.backbone.name,
        "seed": trial.seed,
        "key": trial.untrained_key(data),
        "trained": {name: round(value, 4) for name, value in found.items()},
    }


def judged(encoder: Encoder, config: PretrainConfig, index: Index, test: Index) -> dict[str, float]:
    """kNN, linear probe and spread of an encoder."""
    encoder.eval()

    @torch.no_grad()
    def features(of: Index) -> Features:
        batch = read_rows(of, range(len(of)), config.stream.canvas, config.stream.pixel_limit)
        with torch.autocast("cpu", torch.bfloat16, enabled=config.train.precision == "bf16"):
            made = [
                encoder(batch.image[low : low + CHUNK], batch.size[low : low + CHUNK]).float()
                for low in range(0, len(batch), CHUNK)
            ]
        return Features(torch.cat(made), batch.label, batch.id)

    return judge(features(index), features(test), config.evaluation, config.seed)


def run_all(trials: Sequence[Trial], options: argparse.Namespace) -> None:
    """Run what has no line in `options.out`, `options.jobs` at a time: the trials, and their untrained encoders."""
    out: Path = options.out
    done = _read(out)
    jobs = {trial.untrained_key(options.data): (run_untrained, trial) for trial in trials}
    jobs |= {trial.key(options.data): (run, trial) for trial in trials}
    waiting = [job for key, job in jobs.items() if key not in done]
    print(f"{len(trials)} trials, {len(waiting)} things to do", flush=True)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.jobs, mp_context=context, max_tasks_per_child=1) as pool:
        for future in as_completed([pool.submit(job, trial, options.data) for job, trial in waiting]):
            row = future.result()
            with out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            print(f"done {row['name']}: kNN {row['trained']['knn']:.1%}", flush=True)


def _read(out: Path) -> dict[str, dict[str, Any]]:
    if not out.exists():
        out.parent.mkdir(parents=True, exist_ok=True)
        return {}
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    return {row["key"]: row for row in rows}


def options(description: str, out: str) -> argparse.Namespace:
    """The command line of both tables."""
    parser = argparse.ArgumentParser(description=description)
    here = Path(__file__).parent
    parser.add_argument("--data", default=str(here / "../../shared/data/cifar10"), help="folder with train and test")
    parser.add_argument("--out", type=Path, default=here / out, help="JSON Lines file of the results")
    parser.add_argument("--jobs", type=int, default=2, help="trainings side by side, one core each")
    parser.add_argument("--only", nargs="*", help="the rows whose names begin so")
    parser.add_argument("--table", action="store_true", help="print what is there, run nothing")
    return parser.parse_args()


def selected(trials: Sequence[Trial], chosen: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows asked for, run if they are not there (unless `--table`); `random` is the untrained encoder's figures."""
    if chosen.only:
        trials = [trial for trial in trials if trial.name.startswith(tuple(chosen.only))]
    if not chosen.table:
        run_all(trials, chosen)
    done = _read(chosen.out)
    rows = []
    for trial in trials:
        row, untrained = done.get(trial.key(chosen.data)), done.get(trial.untrained_key(chosen.data))
        if row is not None and untrained is not None:
            rows.append(row | {"random": untrained["trained"]})
    return rows
