"""`jem evaluate`: kNN, linear probe and collapse diagnostics of an encoder, beside an untrained one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from jem.errors import InputError
from pipelines.command import main_for

if TYPE_CHECKING:
    from jem.config import EvaluateConfig
    from jem.data.index import Index

_ROWS = (
    ("kNN", "knn", "{:.2%}"),
    ("linear probe", "linear", "{:.2%}"),
    ("RankMe", "rankme", "{:.1f}"),
    ("standard deviation", "std", "{:.3f}"),
    ("spread", "spread", "{:.3f}"),
    ("correlation", "correlation", "{:.3f}"),
)


@dataclass(frozen=True)
class EvaluateResult:
    """What the encoder's features of the test set are worth."""

    encoder: str
    run_id: str
    """In MLflow."""
    figures: dict[str, float]
    """`knn` and `linear`, accuracies in [0, 1]; `rankme`, `std`, `spread` and `correlation` of the test features."""
    random: dict[str, float]
    """The same of an untrained encoder; empty unless `evaluation.random_baseline`."""
    collapse: int
    """Of the representation: 0, or the type: 1 complete, 2 informational."""
    verdict: str
    """The same in words."""


def evaluate(config: EvaluateConfig) -> EvaluateResult:
    """Judge an encoder on a labelled training and test set, print a table, and log it as an MLflow run.

    Raises:
        InputError: no such data, encoder, cluster or MLflow, or a set without labels; nothing is written.
        RunError: an image cannot be decoded, or the cluster stopped working.
    """
    import torch

    from jem.data.index import open_index
    from jem.encoder import Encoder
    from jem.evaluate.collapse import embedding_health, verdict
    from jem.evaluate.extract import extract_all, stream_of
    from jem.evaluate.judge import judge
    from jem.models.backbones import build_backbone
    from jem.tracking.pictures import projection
    from jem.tracking.registry import load_encoder, show
    from jem.tracking.runs import Tracker
    from pipelines.cluster import connect

    train, test = open_index(config.data, config.limit), open_index(config.test)
    for index in (train, test):
        _must_have_labels(index)
    encoder = load_encoder(config.encoder, config.track)
    manifest, version = show(config.encoder, config.track)
    stream = stream_of(manifest.info.config, config.stream)
    name = config.encoder if version is None else version.uri
    settings, actors = config.evaluation, config.cluster.workers

    with connect(config.cluster) as cluster:
        gpu = config.cluster.gpu if config.cluster.gpu is not None else cluster.gpus >= actors
        device = "cuda" if torch.cuda.is_available() else "cpu"
        tracker = Tracker(config.track)
        print(
            f"{name}: {len(train):,} training and {len(test):,} test images, decoded to {stream.canvas} px", flush=True
        )

        tags = {"jem.job": "evaluate", "jem.encoder": name, "jem.data": config.data, "jem.test": config.test}
        run_id = tracker.start_run(f"evaluate {name.removeprefix('models:/')}", config, tags)
        status = "FAILED"
        try:
            encoders = [encoder]
            if settings.random_baseline:
                torch.manual_seed(config.seed)
                untrained = build_backbone(encoder.architecture)
                encoders.append(Encoder(untrained, encoder.architecture, encoder.input_size, encoder.mean, encoder.std))
            found = extract_all(encoders, [train, test], stream, settings.batch_size, actors, gpu=gpu)
            figures, *rest = [judge(bank, queries, settings, config.seed, device) for bank, queries in found]
            random = rest[0] if rest else {}
            features = found[0][1]
            health = verdict(embedding_health(features.features), absolute=False)
            tracker.log_metrics(run_id, {f"final/{key}": value for key, value in figures.items()})
            tracker.log_metrics(run_id, {f"random/{key}": value for key, value in random.items()})
            tracker.set_tags(run_id, {"jem.collapse": health.kind, "jem.verdict": health.words})
            picture = projection(features.features.numpy(), features.labels.numpy(), test.classes, config.seed)
            tracker.log_figure(run_id, picture, "features.png")
            status = "FINISHED"
        except (KeyboardInterrupt, SystemExit):
            status = "KILLED"
            raise
        finally:
            tracker.finish(run_id, status)  # type: ignore[arg-type]  # one of the three
    result = EvaluateResult(name, run_id, figures, random, health.kind, health.words)
    print(table(result))
    print(f"look: {tracker.where(run_id)}")
    return result


def table(result: EvaluateResult) -> str:
    """The figures as text, one row each, the untrained encoder's beside them."""
    columns = ([("random", result.random)] if result.random else []) + [("encoder", result.figures)]
    lines = [" " * 20 + "".join(f"{title:>12}" for title, _ in columns)]
    for title, key, form in _ROWS:
        if key in result.figures:
            cells = [form.format(figures[key]) if key in figures else "-" for _, figures in columns]
            lines.append(f"{title:<20}" + "".join(f"{cell:>12}" for cell in cells))
    return "\n".join([*lines, f"representation: {result.verdict}"])


def _must_have_labels(index: Index) -> None:
    if index.label_column is None:
        raise InputError(f"{index.uri} has no labels, which kNN and linear probe need: give a labelled data set")


if __name__ == "__main__":
    raise SystemExit(main_for("evaluate"))
