"""The book of a search: records in storage, runs in MLflow, and that a search goes on from them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from mlflow import MlflowClient

from jem.config import PretrainConfig, TuneConfig
from jem.errors import InputError
from jem.search.space import space_of
from jem.search.trials import Epoch
from jem.tracking.runs import Tracker
from pipelines.folder import RunFolder
from pipelines.pretrain import Data, open_data
from pipelines.trials import Search, settings_line
from pipelines.tune import trials_of


def config_of(data: Path, storage: Path, **search: Any) -> TuneConfig:
    return TuneConfig.model_validate(
        {
            "data": str(data),
            "limit": 200,
            "storage": str(storage),
            "train": {"epochs": 3, "batch_size": 64},
            "method": {"name": "vicreg", "expander": (8, 8)},
            "search": {"over": ["weights"], "trials": 4, "startup": 2, **search},
            "track": {"experiment": "books"},
        }
    )


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder.at(str(tmp_path), "mine")


@pytest.fixture(scope="module")
def data(digits_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Data:
    return open_data(config_of(digits_dataset, tmp_path_factory.mktemp("runs")).base())


@pytest.fixture
def begin(digits_dataset: Path, data: Data, folder: RunFolder):
    """Begin the search, or go on with it as a new process would."""
    tracker = Tracker(config_of(digits_dataset, Path(folder.storage)).track)
    parent = {"run_id": tracker.start_run("mine", {})}

    def open_book(**search: Any) -> Search:
        config = config_of(digits_dataset, Path(folder.storage), **search)
        base = config.base()
        space = space_of(config.search, base)
        count = config.search.trials or 4
        return Search(config, base, space, count, "knn", data, folder, tracker, parent, trials_of(folder))

    return open_book


def client() -> MlflowClient:
    return MlflowClient(os.environ["MLFLOW_TRACKING_URI"])


def finish(book: Search, number: int, knn: float) -> None:
    book.epoch(number, Epoch(1, knn, 0))
    book.ended(number, {"status": "finished", "figures": {"knn": knn}, "objective": knn})


def children(book: Search) -> dict[str, Any]:
    parent = client().get_run(book.run_id)
    runs = client().search_runs([parent.info.experiment_id], f"tags.`mlflow.parentRunId` = '{book.run_id}'")
    assert len({run.data.tags["jem.name"] for run in runs}) == len(runs), "one run for each trial"
    return {run.data.tags["jem.name"]: run for run in runs}


def test_a_trial_s_folder_is_a_pretraining_s_of_its_own_and_its_run_is_below_the_search_s(begin, folder):
    book = begin()
    trial = book.next()
    stored = PretrainConfig.model_validate(yaml.safe_load((Path(folder.path) / trial.name / "config.yaml").read_text()))
    assert stored.method.mu == trial.settings["method.mu"]
    assert (stored.name, stored.storage) == ("trial-000", folder.path)
    record = json.loads((Path(folder.path) / trial.name / "run.json").read_text())
    assert record["status"] == "running"
    run = children(book)["trial-000"]
    assert run.info.run_id == trial.run_id == record["run_id"]
    assert float(run.data.params["method.mu"]) == pytest.approx(trial.settings["method.mu"])


def test_a_search_has_so_many_trials_and_says_what_each_came_to(begin, capsys):
    book = begin()
    given = [book.next() for _ in range(4)]
    assert [trial.number for trial in given] == [0, 1, 2, 3]
    assert book.next() is None
    finish(book, 0, 0.5)
    book.epoch(1, Epoch(1, 0.25, 0))
    book.ended(1, {"status": "pruned", "reason": "others were better at its age"})
    book.ended(2, {"status": "collapsed", "reason": "collapsed (complete) since epoch 1"})
    book.ended(3, {"status": "failed", "reason": "not finite since step 3: loss"})
    assert book.left == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"trial 0 (1/4): {settings_line(given[0].settings)}: kNN 50.0%, 1 epochs"
    assert said[1].endswith("stopped early after epoch 1, at kNN 25.0%")
    assert said[2].endswith("collapsed (complete) since epoch 1")
    assert said[3].endswith("failed: not finite since step 3: loss")
    found = {name: (run.info.status, run.data.tags["jem.trial"]) for name, run in children(book).items()}
    assert found == {
        "trial-000": ("FINISHED", "finished"),
        "trial-001": ("KILLED", "pruned"),
        "trial-002": ("KILLED", "collapsed"),
        "trial-003": ("FAILED", "failed"),
    }
    assert children(book)["trial-000"].data.metrics["objective"] == 0.5


def test_a_killed_search_goes_on_with_what_was_begun_and_runs_nothing_twice(begin):
    first = begin()
    begun = [first.next(), first.next(), first.next()]
    finish(first, 1, 0.5)
    first.epoch(0, Epoch(1, 0.3, 0))
    # killed here: nothing says goodbye
    second = begin()
    assert second.left == 3
    again = [second.next(), second.next(), second.next()]
    assert second.next() is None
    assert [trial.number for trial in again] == [0, 2, 3]
    assert [trial.settings for trial in again[:2]] == [begun[0].settings, begun[2].settings]
    assert again[0].epochs == [Epoch(1, 0.3, 0)], "what is known of it is not lost"
    assert [trial.run_id for trial in again[:2]] == [begun[0].run_id, begun[2].run_id]
    assert len(children(second)) == 4
    undisturbed = begin()  # what trial 3 is depends on what was known: the same records, the same proposal
    assert undisturbed.trials[3].settings == again[2].settings


def test_a_search_killed_between_its_record_and_mlflow_s_run_makes_no_second_one(begin, folder):
    first = begin()
    trial = first.next()
    path = Path(folder.path) / trial.name / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"run_id": ""}))
    again = begin().next()
    assert again.run_id == trial.run_id
    (Path(folder.path) / trial.name / "run.json").unlink()  # and before its record
    assert begin().next().settings == trial.settings


def test_a_search_killed_between_a_trial_s_record_and_its_end_in_mlflow_makes_up_for_it(begin, monkeypatch):
    first = begin()
    first.next()
    with monkeypatch.context() as patch:
        patch.setattr(first, "_tell", lambda _trial: None)
        finish(first, 0, 0.5)
    assert children(first)["trial-000"].info.status == "RUNNING"
    second = begin()
    run = children(second)["trial-000"]
    assert (run.info.status, run.data.tags["jem.trial"]) == ("FINISHED", "finished")
    assert run.data.metrics["objective"] == 0.5
    assert second.left == 3


def test_a_stopped_search_leaves_its_trials_killed_and_hears_no_more(begin):
    book = begin()
    book.next()
    book.next()
    finish(book, 0, 0.5)
    book.stopped()
    book.epoch(1, Epoch(1, 0.9, 0))
    book.ended(1, {"status": "pruned", "reason": "late"})
    assert {name: run.info.status for name, run in children(book).items()} == {
        "trial-000": "FINISHED",
        "trial-001": "KILLED",
    }
    again = begin()
    assert again.trials[1].status == "stopped"
    assert again.trials[1].epochs == []
    assert again.next().number == 1
    assert {name: run.info.status for name, run in children(book).items()}["trial-001"] == "RUNNING"


def test_settings_that_cannot_be_trained_with_are_a_failed_trial_and_the_next_one_is_given(begin, capsys):
    book = begin(over=[], sampler="grid", space={"train.batch_size": {"choice": [512, 64]}}, trials=2)
    trial = book.next()
    assert trial.settings == {"train.batch_size": 64}
    assert book.trials[0].status == "failed"
    assert "200 images, which do not fill one batch" in book.trials[0].reason
    assert "failed: " in capsys.readouterr().out
    assert begin(over=[], sampler="grid", space={"train.batch_size": {"choice": [512, 64]}}, trials=2).left == 1


def test_a_store_that_is_away_does_not_stop_the_search(begin, monkeypatch, capsys):
    book = begin()
    with monkeypatch.context() as patch:
        patch.setattr(book.tracker, "start_run", lambda *_: (_ for _ in ()).throw(InputError("MLflow is away")))
        trial = book.next()
    assert trial.run_id == ""
    assert "warning: trial-000 is not tracked: MLflow is away" in capsys.readouterr().err
    finish(book, 0, 0.5)
    assert book.trials[0].status == "finished"


def test_settings_are_said_in_a_few_words():
    assert settings_line({"method.mu": 12.34567, "train.epochs": 3}) == "mu 12.35, epochs 3"
    same = {"method.momentum.tau": 0.99, "other.tau": 0.5}
    assert settings_line(same) == "method.momentum.tau 0.99, other.tau 0.5"
