"""The trials of `jem tune`: what each one does, and the book that is kept of them."""

from __future__ import annotations

import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import yaml
from pydantic import ValidationError

import jem
from jem.config import PretrainConfig, TuneConfig
from jem.credentials import stripped
from jem.data.cache import Cache
from jem.errors import InputError
from jem.evaluate.extract import extract_all
from jem.evaluate.judge import judge
from jem.methods import build_method
from jem.search.launch import Told
from jem.search.pictures import TITLES
from jem.search.sampling import propose
from jem.search.space import Settings, Space, refusal, varied
from jem.search.trials import ONLINE, Epoch, Objective, Trial
from jem.tracking.runs import Tracker
from jem.train.job import Job, Trained
from jem.train.launch import train
from jem.train.online import encoder_of
from pipelines.cluster import Placement
from pipelines.folder import RunFolder
from pipelines.pretrain import Data, check_data, fingerprint
from pipelines.settings import dump_config

ENDS = {"finished": "FINISHED", "pruned": "KILLED", "collapsed": "KILLED", "failed": "FAILED"}
"""How MLflow calls them; the tag jem.trial has our word."""


class Search:
    """The search's book: each trial's record in its own folder, its run in MLflow, and a line for the user.

    A trial's record is written before anything of it runs, so a search that is killed knows what it had begun.
    """

    def __init__(
        self,
        config: TuneConfig,
        base: PretrainConfig,
        space: Space,
        count: int,
        objective: Objective,
        data: Data,
        folder: RunFolder,
        tracker: Tracker,
        record: dict[str, Any],
        known: Sequence[Trial],
    ) -> None:
        self.config, self.base, self.space, self.count = config, base, space, count
        self.objective, self.data, self.folder, self.tracker = objective, data, folder, tracker
        self.run_id: str = record["run_id"]
        self.storage = folder.path
        self.trials = {trial.number: trial for trial in known}
        self._lock = threading.RLock()  # a trial that cannot begin ends while it is begun
        self._closed = False
        self._begun: set[int] = set()
        self._runs = tracker.children(self.run_id) if known else {}
        for trial in known:  # killed between the record and what MLflow is told
            run = self._runs.get(trial.name)
            if trial.over and run is not None and run.data.tags.get("jem.trial") != trial.status:
                self._track(trial)

    @property
    def left(self) -> int:
        """Trials that are not over."""
        return self.count - sum(trial.over for trial in self.trials.values())

    def next(self) -> Trial | None:
        """The first that is not over and does not run."""
        with self._lock:
            for number in range(self.count):
                trial = self.trials.get(number)
                if self._closed or number in self._begun or (trial is not None and trial.over):
                    continue
                self._begun.add(number)
                if trial is None:
                    others = list(self.trials.values())
                    trial = Trial(number, propose(self.space, self.config.search, self.config.seed, number, others))
                self.trials[number] = trial
                if self._begin(trial):
                    return trial
        return None

    def epoch(self, number: int, epoch: Epoch) -> None:
        """Note it."""
        with self._lock:
            if not self._closed:
                self.trials[number].note(epoch)
                self._note(self.trials[number])

    def ended(self, number: int, outcome: dict[str, Any]) -> None:
        """Note it, in MLflow too, and say it."""
        with self._lock:
            if self._closed:
                return
            trial = replace(self.trials[number], **outcome)
            self.trials[number] = trial
            self._note(trial)
        self._tell(trial)

    def stopped(self) -> None:
        """Say of what runs that it was stopped; what comes later is not heard."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            for number in self._begun:
                trial = self.trials[number]
                if not trial.over:
                    trial.status = "stopped"
                    self._note(trial)
                    if trial.run_id:
                        self.tracker.finish(trial.run_id, "KILLED")
                        self.tracker.set_tags(trial.run_id, {"jem.trial": "stopped"})

    def job(self, trial: Trial, work: Work) -> Job:
        """What the trial's training was given."""
        return work.job(trial, varied(self.base, trial.settings))

    def _begin(self, trial: Trial) -> bool:
        """Write the record, begin the run; whether the trial can run."""
        trial.status = "running"
        folder = RunFolder.at(self.storage, trial.name)
        try:
            config = varied(self.base, trial.settings)
            check_data(config, self.data)
            problem = ""
        except (ValidationError, InputError) as error:
            config, problem = self.base, refusal(error) if isinstance(error, ValidationError) else str(error)
        named = config.model_copy(update={"name": trial.name, "storage": self.storage})
        stored = yaml.safe_dump(stripped(yaml.safe_load(dump_config(named))), sort_keys=False)
        if not trial.run_id and trial.name in self._runs:  # killed between MLflow's run and the record of it
            trial.run_id = self._runs[trial.name].info.run_id
        folder.write(stored, self._record(trial))
        self._begin_run(trial, named, stored)
        self._note(trial)
        if problem:
            self.ended(trial.number, {"status": "failed", "reason": problem})
        return not problem

    def _begin_run(self, trial: Trial, config: PretrainConfig, stored: str) -> None:
        try:
            if trial.run_id:
                self.tracker.resume_run(trial.run_id)
                return
            tags = {"jem.job": "pretrain", "jem.method": config.method.name, "jem.name": trial.name}
            tags |= {"mlflow.parentRunId": self.run_id, "jem.search": self.folder.name}
            trial.run_id = self.tracker.start_run(f"{self.folder.name}/{trial.name}", config, tags)
            self.tracker.log_text(trial.run_id, stored, "config.yaml")
        except InputError as error:  # the store is away: the search is worth more than its curves
            print(f"warning: {trial.name} is not tracked: {error}", file=sys.stderr, flush=True)

    def _record(self, trial: Trial) -> dict[str, Any]:
        return trial.to_json() | {"data": fingerprint(self.data.train), "jem": jem.__version__}

    def _note(self, trial: Trial) -> None:
        RunFolder.at(self.storage, trial.name).note(self._record(trial))

    def _tell(self, trial: Trial) -> None:
        if trial.run_id:
            self._track(trial)
        over = sum(each.over for each in self.trials.values())
        words = f"trial {trial.number} ({over}/{self.count}): {settings_line(trial.settings)}: {self._came_to(trial)}"
        print(words, flush=True)

    def _track(self, trial: Trial) -> None:
        metrics = {f"final/{key}": value for key, value in trial.figures.items()}
        if trial.objective is not None:
            metrics["objective"] = trial.objective
        self.tracker.log_metrics(trial.run_id, metrics, len(trial.epochs))
        self.tracker.finish(trial.run_id, ENDS[trial.status])  # type: ignore[arg-type]  # one of the three
        self.tracker.set_tags(trial.run_id, {"jem.reason": trial.reason, "jem.trial": trial.status})

    def _came_to(self, trial: Trial) -> str:
        epochs = trial.epochs[-1].epoch if trial.epochs else 0
        if trial.status == "finished":
            return f"{figure(trial.objective, self.objective)}, {epochs} epochs"
        if trial.status == "pruned":
            return f"stopped early after epoch {epochs}, at {figure(trial.last, self.objective)}"
        return trial.reason if trial.status == "collapsed" else f"failed: {trial.reason}"


@dataclass(frozen=True)
class Work:
    """What a trial's actor does: train and judge."""

    base: PretrainConfig
    data: Data
    storage: str
    placement: Placement
    cache: Cache | None
    tracking_uri: str
    objective: Objective
    share: float
    """Of the cluster's CPUs, for one trial."""

    def __call__(self, trial: Trial, told: Told, stop: threading.Event) -> tuple[dict[str, float], float, str]:
        """See `jem.search.launch.Work`."""
        config = varied(self.base, trial.settings)
        job = self.job(trial, config)

        def epoch(metrics: dict[str, float]) -> None:
            number = int(metrics["epoch"])
            end = Epoch(number, metrics.get(ONLINE[self.objective]), int(metrics["health/collapse"]))
            told(end, number == config.train.epochs)

        trained = train(job, lambda _name, _content: None, epoch, stop)
        figures = self._judged(job, trained)
        verdict = str(trained.summary["verdict"]) if int(trained.summary["collapse"]) else ""
        return figures, figures[self.objective], verdict

    def job(self, trial: Trial, config: PretrainConfig) -> Job:
        """What the training needs to know."""
        return Job(
            config=config,
            name=trial.name,
            storage=self.storage,
            index=self.data.train,
            test=self.data.test,
            classes=self.data.classes,
            gpu=self.placement.gpu,
            decode_tasks=self.placement.decode_tasks,
            cache=self.cache,
            tracking_uri=self.tracking_uri,
            run_id=trial.run_id,
            share=self.share,
        )

    def _judged(self, job: Job, trained: Trained) -> dict[str, float]:
        config = job.config
        method = build_method(config.method, config.backbone, self.data.classes, len(self.data.train))
        method.load_state_dict(trained.state.model)
        encoder = encoder_of(method, config).eval()
        sets = [self.data.train] if self.data.test is None else [self.data.train, self.data.test]
        settings = config.evaluation
        if self.objective != "linear":  # the probe takes longest, and is not asked for
            settings = settings.model_copy(update={"probe": None})
        actors = config.cluster.workers
        found = extract_all([encoder], sets, config.stream, settings.batch_size, actors, gpu=job.gpu, share=self.share)[
            0
        ]
        return judge(found[0], found[1] if found[1:] else None, settings, config.seed)


def settings_line(settings: Settings) -> str:
    """Settings in a few words: each by the last part of its name, where that is enough."""
    lasts = [key.rpartition(".")[2] for key in settings]
    names = [last if lasts.count(last) == 1 else key for key, last in zip(settings, lasts, strict=True)]
    values = (f"{value:.4g}" if isinstance(value, float) else str(value) for value in settings.values())
    return ", ".join(f"{name} {value}" for name, value in zip(names, values, strict=True))


def figure(value: float | None, objective: Objective) -> str:
    """A figure with its name."""
    if value is None:
        return f"{TITLES[objective]} unknown"
    shown = f"{value:.1f}" if objective == "rankme" else f"{value:.1%}"
    return f"{TITLES[objective]} {shown}"
