"""Pretraining: check, train, judge, register."""

from __future__ import annotations

import contextlib
import hashlib
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import yaml
from pydantic import ValidationError

import jem
from jem.config import PretrainConfig
from jem.credentials import stripped
from jem.data.cache import check_cache, fill
from jem.data.index import Index, open_index
from jem.data.read import count_classes, read_rows
from jem.encoder import Encoder, EncoderInfo, save_encoder
from jem.errors import InputError
from jem.evaluate.extract import extract_all
from jem.evaluate.judge import judge
from jem.methods import build_method
from jem.tracking.pictures import loss_curves, projection
from jem.tracking.registry import register_encoder
from jem.tracking.runs import Tracker
from jem.train.job import Job, Trained
from jem.train.launch import train
from jem.train.online import encoder_of
from jem.train.profile import LEAST
from jem.train.schedules import scaled_lr
from pipelines.cluster import await_room, bundle, check_shared, connect, look, place
from pipelines.command import main_for
from pipelines.folder import RunFolder
from pipelines.settings import dump_config

C = TypeVar("C", bound=PretrainConfig)
PREVIEW_IMAGES = 6
PROFILE = "profile"
"""Where the profile's files go, in the run's folder and in MLflow."""
CURVES = ("train/", "health/", "online/")


@dataclass(frozen=True)
class PretrainResult:
    """A finished pretraining."""

    name: str
    run_id: str
    """In MLflow."""
    encoder: str
    """URI of the registered version, models:/NAME/VERSION."""
    pretrained: dict[str, float]
    """`knn` and `linear`, accuracies in [0, 1], where there are labels; spread of the features in any case."""
    random: dict[str, float]
    """The same of an untrained encoder; empty unless `evaluation.random_baseline`."""
    collapse: int
    """0, or the type: 1 complete, 2 informational."""
    verdict: str
    """The same in words."""


@dataclass(frozen=True)
class Data:
    """What a pretraining is given."""

    train: Index
    test: Index | None
    classes: int | None


def pretrain(config: PretrainConfig) -> PretrainResult:
    """Pretrain an encoder, judge it beside an untrained one, and register it.

    Raises:
        InputError: Before anything is written, if the data, the storage, the cluster or MLflow will not do.
        RunError: The training could not finish; it can go on with `resume`.
    """
    if config.resume is not None:
        config, folder, record = resumed(config)
        if record["status"] == "finished":
            raise InputError(f"run {folder.name} is finished: there is nothing to resume; start a new run")
    else:
        name = config.name or f"{config.method.name}-{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:4]}"
        folder, record = RunFolder.at(config.storage, name), None
        if folder.exists():
            raise InputError(
                f"{folder.storage} has a run {name} already: go on with it (--resume {name}), or give another --name"
            )
    data = open_data(config)
    if record is not None and record["data"] != fingerprint(data.train):
        raise InputError(f"the data set changed since run {folder.name} began: it cannot go on; start a new run")
    folder.check_writable()

    with connect(config.cluster):
        beside = config.augment.cpus_beside
        cluster, placement = await_room(
            config.cluster,
            bundle(config.cluster, config.stream, beside),
            config.cluster.workers,
            lambda cluster: place(config.cluster, config.stream, cluster, beside, config.worlds),
        )
        check_shared(cluster, folder.storage, config.data)
        if config.stream.cache is not None:
            check_cache(data.train, config.stream, [node.store for node in cluster.nodes])
        tracker = Tracker(config.track)
        stored = yaml.safe_dump(stripped(yaml.safe_load(dump_config(config))), sort_keys=False)
        if record is None:
            picture = _views_picture(config, data.train)  # data that cannot be read leave no run
            tags = {"jem.job": "pretrain", "jem.method": config.method.name, "jem.name": folder.name}
            record = {
                "run_id": tracker.start_run(folder.name, config, tags),
                "data": fingerprint(data.train),
                "status": "running",
                "jem": jem.__version__,
            }
            folder.write(stored, record)
            tracker.log_text(record["run_id"], stored, "config.yaml")
            tracker.log_image(record["run_id"], picture, "views.png")
        else:
            tracker.resume_run(record["run_id"])
        with _ending(tracker, folder, record):
            _announce(config, data, folder.name, str(cluster), gpu=placement.gpu)
            job = Job(
                config=config,
                name=folder.name,
                storage=folder.storage,
                index=data.train,
                test=data.test,
                classes=data.classes,
                gpu=placement.gpu,
                decode_tasks=placement.decode_tasks,
                cache=fill(data.train, config.stream) if config.stream.cache is not None else None,
                tracking_uri=tracker.uri,
                run_id=record["run_id"],
            )
            save = partial(_save_profile, folder, tracker, job.run_id)
            result = finish(job, train(job, save), data, tracker)
    _print(result, config, tracker.where(result.run_id))
    return result


# --- before -------------------------------------------------------------------------------------------------------


def resumed(given: C, changeable: frozenset[str] = frozenset()) -> tuple[C, RunFolder, dict[str, Any]]:
    """The run's own configuration, to start anew; of what is given only places, workers, and `changeable` may differ.

    Raises:
        InputError: There is no such run, or something else is given.
    """
    assert given.resume is not None
    folder = RunFolder.at(given.storage, given.resume)
    text, record = folder.read()
    own = type(given).model_validate(yaml.safe_load(text))
    default = type(given)(data=own.data, resume=given.resume)
    flat, base, kept = (_flat(each.model_dump()) for each in (given, default, own))
    places = {"resume", "name", "storage", "data", "test", "track.uri"} | changeable
    free = {key for key in flat if key in places or key.startswith("cluster.")}
    other = [key for key in flat if key not in free and flat[key] not in (base.get(key), kept.get(key))]
    if other:
        raise InputError(f"a resumed run keeps its settings: leave out --{other[0]} (it was {kept.get(other[0])})")
    changes: dict[str, Any] = {"storage": given.storage}
    changes |= {name: value for name in ("data", "test") if (value := getattr(given, name))}
    changes["cluster"] = own.cluster.model_dump() | given.cluster.model_dump(exclude_unset=True)
    if changes["cluster"]["workers"] != own.cluster.workers:
        changes["train"] = own.train.model_dump() | {"parts": own.parts}
    changes["track"] = own.track.model_copy(update={"uri": given.track.uri or own.track.uri})
    try:
        return type(given).model_validate(own.model_dump() | changes), folder, record
    except ValidationError as error:
        reason = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise InputError(f"run {folder.name} cannot go on so: {reason}") from error


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    items = [_flat(item, f"{prefix}.{key}" if prefix else key) for key, item in value.items()]
    return {key: item for each in items for key, item in each.items()}


def open_data(config: PretrainConfig) -> Data:
    """Open the data sets and check that the method can be trained on them.

    Raises:
        InputError: They will not do.
    """
    index = open_index(config.data, config.limit)
    test = open_index(config.test) if config.test is not None else None
    if test is not None and test.label_column is None:
        raise InputError(f"the test set {config.test} has no labels: give a labelled one, or leave out --test")
    data = Data(index, test, count_classes(index))
    check_data(config, data)
    return data


def check_data(config: PretrainConfig, data: Data) -> None:
    """Check that there are images enough for the configuration.

    Raises:
        InputError: There are not.
    """
    index = data.train
    if config.train.batch_size > len(index):
        raise InputError(
            f"{config.data} has {len(index)} images, which do not fill one batch of train.batch_size "
            f"{config.train.batch_size}: lower it"
        )
    batch, epochs = config.train.batch_size, config.train.epochs
    carried = config.stream.remainder == "carry"
    steps = epochs * len(index) // batch if carried else epochs * (len(index) // batch)
    if config.profile and steps < LEAST:
        raise InputError(
            f"a profile needs {LEAST} steps, and this run has {steps}: raise train.epochs, or leave out --profile"
        )
    build_method(config.method, config.backbone, data.classes, len(index))


def fingerprint(index: Index) -> str:
    """Tells whether a data set is the one that a run began with."""
    return hashlib.sha256(repr((len(index), index.rows.tolist())).encode()).hexdigest()[:16]


def _save_profile(folder: RunFolder, tracker: Tracker, run_id: str, name: str, content: bytes) -> None:
    """Put a file of the profile into the run's folder and into MLflow; a failure costs the file, not the run."""
    try:
        folder.save(PROFILE, name, content)
    except OSError as error:
        print(f"warning: {PROFILE}/{name} could not be written ({error})", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / name
        path.write_bytes(content)
        tracker.log_artifact(run_id, path, PROFILE)


def _announce(config: PretrainConfig, data: Data, name: str, cluster: str, *, gpu: bool) -> None:
    train, steps = config.train, len(data.train) // config.train.batch_size
    rate = scaled_lr(config.optimizer.lr, train.batch_size, config.schedule.scale_lr)
    print(f"run {name}: {config.method.name}, {config.backbone.name}, on {cluster}")
    print(
        f"  {len(data.train):,} images, {train.epochs} epochs of {steps} steps, batch {train.batch_size} on "
        f"{config.cluster.workers} {'GPU' if gpu else 'CPU'} worker(s)"
    )
    print(
        f"  {config.optimizer.name}, learning rate {rate:.4g} = {config.optimizer.lr:g} scaled "
        f"({config.schedule.scale_lr}) by batch {train.batch_size} / 256",
        flush=True,
    )
    traits = config.method.traits
    if train.batch_size < traits.bears:
        print(
            f"  warning: batch {train.batch_size} is small for {traits.title}: take {traits.bears} or more", flush=True
        )


@contextlib.contextmanager
def _ending(tracker: Tracker, folder: RunFolder, record: dict[str, Any]) -> Iterator[None]:
    """Says in MLflow and in the folder how the run ended."""
    status, ended = "FAILED", "failed"
    try:
        yield
        status, ended = "FINISHED", "finished"
    except (KeyboardInterrupt, SystemExit):
        status, ended = "KILLED", "stopped"
        raise
    finally:
        try:
            folder.note(record | {"status": ended})
        except OSError as error:  # a full storage ended the run: its own reason says so
            print(f"warning: {folder.name} could not be noted as {ended} ({error})", file=sys.stderr, flush=True)
        if ended == "stopped":
            where = f"--resume {folder.name} --storage {folder.storage}"
            print(f"run {folder.name}: stopped; go on with {where}", file=sys.stderr, flush=True)
        # last: a server that is away is asked for minutes, and who stops a job may give it seconds
        tracker.finish(record["run_id"], status)  # type: ignore[arg-type]


# --- after --------------------------------------------------------------------------------------------------------


def finish(job: Job, trained: Trained, data: Data, tracker: Tracker) -> PretrainResult:
    """Judge the encoder beside an untrained one, log figures and pictures to its run, and register it."""
    config, run_id = job.config, job.run_id
    method = build_method(config.method, config.backbone, data.classes, len(data.train))
    method.load_state_dict(trained.state.model)
    encoder = encoder_of(method, config).eval()
    collapse, verdict = int(trained.summary["collapse"]), str(trained.summary["verdict"])

    encoders = [encoder, _untrained(config, data)] if config.evaluation.random_baseline else [encoder]
    sets = [data.train] if data.test is None else [data.train, data.test]
    actors = min(config.cluster.workers, max(1, int(look().gpus))) if job.gpu else config.cluster.workers
    batch_size = config.evaluation.batch_size
    found = extract_all(encoders, sets, config.stream, batch_size, actors, gpu=job.gpu, replace=True)
    figures = [judge(each[0], each[1] if each[1:] else None, config.evaluation, config.seed) for each in found]
    pretrained, untrained = figures[0], figures[1] if figures[1:] else {}

    step = trained.state.step
    tracker.log_metrics(run_id, {f"final/{key}": value for key, value in pretrained.items()}, step)
    tracker.log_metrics(run_id, {f"random/{key}": value for key, value in untrained.items()}, step)
    tracker.set_tags(run_id, {"jem.collapse": collapse, "jem.verdict": verdict})
    shown = found[0][-1]
    tracker.log_figure(
        run_id, projection(shown.features.numpy(), shown.labels.numpy(), data.train.classes), "features.png"
    )
    curves = {key: curve for key, curve in tracker.history(run_id).items() if key.startswith(CURVES)}
    if curves:  # MLflow may have been away all the time
        tracker.log_figure(run_id, loss_curves(curves), "curves.png")

    version = _register(job, encoder, pretrained, untrained, collapse, verdict)
    tracker.set_tags(run_id, {"jem.encoder": version})
    return PretrainResult(job.name, run_id, version, pretrained, untrained, collapse, verdict)


def _untrained(config: PretrainConfig, data: Data) -> Encoder:
    torch.manual_seed(config.seed)
    return encoder_of(build_method(config.method, config.backbone, data.classes, len(data.train)), config).eval()


def _register(
    job: Job, encoder: Encoder, pretrained: dict[str, float], untrained: dict[str, float], collapse: int, verdict: str
) -> str:
    config = job.config
    # the registry takes no colon, which a library's backbone has
    name = config.track.register_as or f"{config.method.name}-{config.backbone.name}".replace(":", "-")
    settings = config.model_dump(mode="json")
    info = EncoderInfo(method=config.method.name, data=config.data, metrics=pretrained, config=settings)
    tags = {"run": job.name, "collapse": str(collapse), "verdict": verdict}
    tags |= {f"random.{key}": f"{value:.4f}" for key, value in untrained.items()}
    with tempfile.TemporaryDirectory() as folder:
        save_encoder(encoder, Path(folder) / "encoder", info)
        # A collapsed encoder is kept for study, but takes no alias from a good one.
        alias = config.track.alias if not collapse else None
        version = register_encoder(Path(folder) / "encoder", name, job.run_id, tags, alias, config.track)
    return f"models:/{name}/{version}"


def _views_picture(config: PretrainConfig, index: Index) -> Any:
    from jem.augment.preview import preview
    from jem.augment.views import Augment, generator

    batch = read_rows(index, range(min(PREVIEW_IMAGES, len(index))), config.stream.canvas, config.stream.pixel_limit)
    return preview(batch, Augment(config.augment), generator(config.seed, 0, 0, 0))


def _print(result: PretrainResult, config: PretrainConfig, where: str) -> None:
    print(f"\n{result.name}: {result.verdict}")
    columns = [("random", result.random), ("pretrained", result.pretrained)]
    for label, key in (("kNN", "knn"), ("linear", "linear")):
        found = [f"{title} {figures[key]:.1%}" for title, figures in columns if key in figures]
        if found:
            print(f"  {label:<7}{', '.join(found)}")
    print(f"  RankMe {result.pretrained['rankme']:.0f}")
    alias = f", alias {config.track.alias}" if config.track.alias and not result.collapse else ""
    print(f"registered as {result.encoder}{alias}")
    print(f"  use it:    jem.load_encoder({result.encoder!r})")
    print(f"  embed:     jem embed --encoder {result.encoder} --data {config.data} --out embeddings")
    print(f"  look:      {where}")


if __name__ == "__main__":
    raise SystemExit(main_for("pretrain"))
