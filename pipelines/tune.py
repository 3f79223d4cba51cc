"""`jem tune`: many short pretrainings, judged by accuracy or by rank; the best one's recipe and its encoder."""

from __future__ import annotations

import sys
import tempfile
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

import jem
from jem.config import PretrainConfig, TuneConfig
from jem.credentials import stripped
from jem.data.cache import check_cache, fill
from jem.errors import InputError, RunError
from jem.search.launch import run_trials
from jem.search.pictures import TITLES, importance_bars, parallel_coordinates
from jem.search.sampling import importances, planned
from jem.search.space import Space, space_of, varied
from jem.search.trials import Objective, Trial, objective_of, ranked
from jem.tracking.runs import Tracker
from jem.train import checkpoint
from jem.train.job import Trained
from jem.train.watch import Summary
from pipelines.cluster import TRIAL_CPUS, Cluster, Placement, await_room, bundle, check_shared, connect, place
from pipelines.command import main_for
from pipelines.folder import RunFolder
from pipelines.pretrain import PretrainResult, fingerprint, finish, open_data, resumed
from pipelines.settings import dump_config
from pipelines.trials import Search, Work, figure, settings_line

BEST = "best.yaml"
PARALLEL, IMPORTANCE = "parallel.png", "importance.png"
ENDINGS = {"pruned": "stopped early", "collapsed": "collapsed", "failed": "failed"}
CHANGEABLE = frozenset({"search.trials", "search.concurrent"})
"""Of the search's settings, those that may be others when it goes on."""


@dataclass(frozen=True)
class TuneResult:
    """A finished search."""

    name: str
    run_id: str
    """Of the parent run in MLflow."""
    objective: Objective
    trials: tuple[Trial, ...]
    best: Trial
    pretrained: PretrainResult
    """The best trial's encoder, judged and registered as a pretraining's is."""
    importances: dict[str, float]
    """Share of the objective's variance that each setting explains; empty where it could not be told."""
    recipe: str
    """The file whose settings start the best trial again."""


def tune(config: TuneConfig) -> TuneResult:
    """Search for the best settings, and register the best trial's encoder.

    Raises:
        InputError: Before anything is written, if the space, the data, the storage, the cluster or MLflow will not do.
        RunError: No trial finished, or the search could not go on; it can with `resume`.
    """
    known: list[Trial] = []
    if config.resume is not None:
        config, folder, record = _again(config)
        known = trials_of(folder)
    else:
        name = config.name or f"search-{config.method.name}-{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:4]}"
        folder, record = RunFolder.at(config.storage, name), {}
        if folder.exists():
            raise InputError(
                f"{folder.storage} has a run {name} already: go on with it (--resume {name}), or give another --name"
            )
    base = config.base()
    space = space_of(config.search, base)
    count = planned(config.search, space)
    if count < len(known):
        raise InputError(
            f"search {folder.name} has {len(known)} trials already: give --search.trials {len(known)} or more"
        )
    if record.get("status") == "finished" and count == len(known):
        raise InputError(f"search {folder.name} is finished: to go on, give it more than {count} with --search.trials")
    data = open_data(base)
    objective = objective_of(
        config.search,
        labelled=data.classes is not None,
        online=base.evaluation.online is not None,
        probe=base.evaluation.probe is not None,
    )
    if record and record["data"] != fingerprint(data.train):
        raise InputError(f"the data set changed since search {folder.name} began: it cannot go on; start a new one")
    folder.check_writable()

    with connect(config.cluster, dashboard=True):
        cluster, (concurrent, placement) = await_room(
            config.cluster,
            bundle(config.cluster, config.stream, config.augment.cpus_beside),
            config.cluster.workers * min(config.search.concurrent or 1, count),
            lambda cluster: _side_by_side(config, count, cluster),
        )
        check_shared(cluster, folder.storage, config.data)
        if base.stream.cache is not None:
            check_cache(data.train, base.stream, [node.store for node in cluster.nodes])
        tracker = Tracker(config.track)
        if not record:
            tags = {"jem.job": "tune", "jem.method": config.method.name, "jem.name": folder.name}
            stored = yaml.safe_dump(stripped(yaml.safe_load(dump_config(config))), sort_keys=False)
            record = {
                "run_id": tracker.start_run(folder.name, config, tags),
                "data": fingerprint(data.train),
                "status": "running",
                "jem": jem.__version__,
            }
            folder.write(stored, record)
            tracker.log_text(record["run_id"], stored, "config.yaml")
        else:
            tracker.resume_run(record["run_id"])
        search = Search(config, base, space, count, objective, data, folder, tracker, record, known)
        _announce(search, cluster, concurrent, gpu=placement.gpu)
        status = "FAILED"
        try:
            cache = fill(data.train, base.stream) if base.stream.cache is not None and search.left else None
            work = Work(base, data, search.storage, placement, cache, tracker.uri, objective, 1 / concurrent)
            if search.left:
                run_trials(
                    search,
                    work,
                    config.search,
                    left=search.left,
                    concurrent=concurrent,
                    epochs=_longest(base, space),
                    over=[trial for trial in known if trial.over],
                    cpus=TRIAL_CPUS,
                    max_failures=config.cluster.max_failures,
                )
            result = _conclude(search, work)
            status = "FINISHED"
        except (KeyboardInterrupt, SystemExit):
            status = "KILLED"
            search.stopped()
            print(
                f"search {folder.name}: stopped; go on with: jem tune --resume {folder.name}"
                + (f" --storage {config.storage}" if config.storage != "runs" else ""),
                file=sys.stderr,
            )
            raise
        finally:
            tracker.finish(record["run_id"], status)  # type: ignore[arg-type]  # one of the three
            folder.note(record | {"status": {"FAILED": "failed", "KILLED": "stopped"}.get(status, "finished")})
    _print(result, search, tracker.where(result.run_id))
    return result


# --- before -----------------------------------------------------------------------------------------------------------


def _again(given: TuneConfig) -> tuple[TuneConfig, RunFolder, dict[str, Any]]:
    """A search that was stopped, with more trials if more are asked for."""
    own, folder, record = resumed(given, CHANGEABLE)
    new = {key: value for key in ("trials", "concurrent") if (value := getattr(given.search, key)) is not None}
    return own.model_copy(update={"search": own.search.model_copy(update=new)}), folder, record


def trials_of(folder: RunFolder) -> list[Trial]:
    """What the search's folder knows of its trials, by number."""
    within = folder.path
    names = [name for name in RunFolder.at(within, "any").others() if name.startswith("trial-")]
    trials = []
    for name in names:
        trial = RunFolder.at(within, name)
        try:
            trials.append(Trial.from_json(trial.read()[1]))
        except InputError:  # it was killed before it had begun: its number is given out again
            continue
    return sorted(trials, key=lambda trial: trial.number)


def _side_by_side(config: TuneConfig, count: int, cluster: Cluster) -> tuple[int, Placement]:
    """How many trials run at a time, and how they are laid on the cluster.

    Raises:
        InputError: so many as asked for, or even one, do not fit.
    """
    asked = config.search.concurrent
    for trials in [min(asked, count)] if asked is not None else range(count, 0, -1):
        try:
            return trials, place(
                config.cluster, config.stream, cluster, config.augment.cpus_beside, config.worlds, trials
            )
        except InputError:
            if trials == 1 or asked is not None:
                raise
    raise AssertionError("a search has a trial")


def _longest(base: PretrainConfig, space: Space) -> int:
    epochs = space.get("train.epochs")
    if epochs is None:
        return base.train.epochs
    return max(int(value) for value in (epochs.choice if epochs.choice is not None else epochs.ends))


def _announce(search: Search, cluster: Cluster, concurrent: int, *, gpu: bool) -> None:
    config, done = search.config, sum(trial.over for trial in search.trials.values())
    kind = "GPU" if gpu else "CPU"
    print(f"search {search.folder.name}: {config.method.name}, {config.backbone.name}, on {cluster}")
    print(
        f"  {search.count} trials{f', of which {done} are over' if done else ''}, {concurrent} at a time, each on "
        f"{config.cluster.workers} {kind} worker(s); {config.search.sampler}, "
        f"early stopping {config.search.early_stop}, by {TITLES[search.objective]}"
    )
    for key, values in search.space.items():
        content = getattr(values, values.kind)
        print(f"  {key:<28}{values.kind} {list(content)}")
    print(
        f"  {len(search.data.train):,} images, {config.train.epochs} epochs, batch {config.train.batch_size}",
        flush=True,
    )


# --- after ------------------------------------------------------------------------------------------------------------


def _conclude(search: Search, work: Work) -> TuneResult:
    """The pictures, the best trial's recipe, its encoder judged and registered."""
    tracker, folder, run_id = search.tracker, search.folder, search.run_id
    trials = [search.trials[number] for number in sorted(search.trials)]
    shares = importances(search.space, trials, search.config.seed)
    if any(trial.score is not None for trial in trials):
        _picture(search, PARALLEL, parallel_coordinates(search.space, trials, search.objective))
    if shares:
        _picture(search, IMPORTANCE, importance_bars(shares, search.objective))
        tracker.log_metrics(run_id, {f"importance/{key}": value for key, value in shares.items()})
    best = next(iter(ranked(trials)), None)
    if best is None:
        raise RunError(f"no trial finished: {_ends(trials)}")
    config = varied(search.base, best.settings)
    recipe = yaml.safe_dump(stripped(yaml.safe_load(dump_config(config))), sort_keys=False)
    folder.save("", BEST, recipe.encode())
    tracker.log_text(run_id, recipe, BEST)

    trained = _trained(RunFolder.at(search.storage, best.name), best)
    pretrained = finish(search.job(best, work), trained, search.data, tracker)
    tracker.log_metrics(run_id, {f"best/{key}": value for key, value in pretrained.pretrained.items()})
    tracker.log_metrics(run_id, {"best/objective": best.objective or 0.0, "trials": len(trials)})
    tracker.set_tags(run_id, {"jem.best": best.name, "jem.encoder": pretrained.encoder})
    return TuneResult(
        folder.name, run_id, search.objective, tuple(trials), best, pretrained, shares, f"{search.storage}/{BEST}"
    )


def _picture(search: Search, name: str, drawn: Any) -> None:
    search.tracker.log_figure(search.run_id, drawn, name)
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / name
        drawn.savefig(path, dpi=150)
        search.folder.save("", name, path.read_bytes())


def _trained(folder: RunFolder, trial: Trial) -> Trained:
    """A finished trial's training, from its last checkpoint."""
    step = max(name for name in RunFolder.at(folder.path, "any").others() if name.startswith("step-"))
    with tempfile.TemporaryDirectory() as scratch:
        folder.fetch(step, Path(scratch))
        state = checkpoint.load(Path(scratch))
    summary: Summary = {"collapse": 0, "verdict": "not collapsed"}
    return Trained(state, summary, f"{folder.path}/{step}")


def _ends(trials: Sequence[Trial]) -> str:
    """How many failed and how many collapsed, with the first reason of each."""
    parts = []
    for status, words in ENDINGS.items():
        of = [trial for trial in trials if trial.status == status]
        if of:
            parts.append(f"{len(of)} {words} (trial {of[0].number}: {of[0].reason})")
    return "; ".join(parts)


def _print(result: TuneResult, search: Search, where: str) -> None:
    done = ranked(result.trials)
    print(f"\n{result.name}: {len(result.trials)} trials, {len(done)} finished")
    for status, words in ENDINGS.items():
        count = sum(trial.status == status for trial in result.trials)
        if count:
            print(f"  {words:<14}{count}")
    scored = [trial for trial in result.trials if trial.score is not None]
    worst = min(scored, key=lambda trial: trial.score or 0.0)
    for title, trial in (("best", done[0]), ("worst", worst)):
        ending = "" if trial.status == "finished" else f" ({ENDINGS[trial.status]})"
        came_to = figure(trial.score, result.objective) + ending
        print(f"  {title:<7}trial {trial.number}: {came_to}, {settings_line(trial.settings)}")
    if result.importances:
        shares = ", ".join(f"{key.rpartition('.')[2]} {value:.2f}" for key, value in result.importances.items())
        print(f"  importance: {shares}")
    pretrained = result.pretrained
    for label, key in (("kNN", "knn"), ("linear", "linear")):
        if key in pretrained.pretrained:
            random = f", random {pretrained.random[key]:.1%}" if key in pretrained.random else ""
            print(f"  {label:<7}{pretrained.pretrained[key]:.1%} (the best trial's encoder{random})")
    print(f"registered as {pretrained.encoder}")
    local = "://" not in result.recipe
    print(f"  start it again:  jem pretrain --config {result.recipe if local else f'{BEST}, from {search.storage}'}")
    print(f"  pictures:        {search.storage}/{PARALLEL}, {IMPORTANCE}")
    print(f"  look:            {where}")


if __name__ == "__main__":
    raise SystemExit(main_for("tune"))
