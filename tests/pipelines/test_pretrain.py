"""Pretraining on Ray Train: from data to a registered encoder, and what a killed worker or driver costs."""

from __future__ import annotations

import gzip
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from mlflow import MlflowClient
from ray.train.v2._internal.constants import CHECKPOINT_MANAGER_SNAPSHOT_FILENAME

import jem
from jem.config import PretrainConfig
from jem.data.index import open_index
from jem.data.read import read_rows
from jem.errors import InputError, RunError
from jem.train import checkpoint
from pipelines.pretrain import PretrainResult, pretrain
from pipelines.settings import dump_config

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]
STEPS = 12
DEADLINE = 240.0


def config_of(data: Path, test: Path, storage: Path, name: str) -> PretrainConfig:
    return PretrainConfig.model_validate(
        {
            "data": str(data),
            "test": str(test),
            "limit": 200,
            "name": name,
            "storage": str(storage),
            "stream": {"canvas": 32, "window": 1},
            "augment": {"views": [{"count": 2, "size": 32, "scale": (0.4, 1.0), "flip": 0.0}]},
            "backbone": {"name": "timm:test_resnet"},  # a small network: what is tested is around it
            "method": {"name": "vicreg", "expander": (64, 64)},
            "optimizer": {"name": "adamw", "lr": 0.004},
            "schedule": {"warmup_epochs": 0.5},
            "train": {"epochs": 4, "batch_size": 64, "log_every": 1, "checkpoint_every": 2, "keep_checkpoints": 20},
            "cluster": {"workers": 2},
            "evaluation": {"knn": {"k": 5}, "online": {"bank": 60, "queries": 30}, "random_baseline": False},
            "track": {"experiment": "faults", "register_as": name},
        }
    )


def weights(storage: Path, name: str) -> dict[str, torch.Tensor]:
    return checkpoint.load(storage / name / f"step-{STEPS:08d}").model


def curve(run_id: str, key: str) -> list[tuple[int, float]]:
    points = MlflowClient(os.environ["MLFLOW_TRACKING_URI"]).get_metric_history(run_id, key)
    return [(point.step, point.value) for point in points]


def when(condition: Callable[[], object], act: Callable[[], None]) -> threading.Thread:
    """Act in the background once the condition holds."""

    def wait() -> None:
        end = time.monotonic() + DEADLINE
        while not condition():
            if time.monotonic() > end:
                return
            time.sleep(0.02)
        act()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


def workers() -> list[psutil.Process]:
    """Ray Train's workers on this session's own cluster, whose processes are children of this one."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if "RayTrainWorker" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:  # it has ended meanwhile
            continue
    return found


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def undisturbed(ray_cluster, digits_dataset, digits_test, storage) -> PretrainResult:
    return pretrain(config_of(digits_dataset, digits_test, storage, "undisturbed"))


def test_pretraining_ends_with_a_registered_encoder_its_run_and_its_pictures(undisturbed, storage, digits_test):
    client = MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
    run = client.get_run(undisturbed.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params["method.mu"] == "25.0"
    assert run.data.tags["jem.collapse"] == "0"
    assert {"final/knn", "final/linear", "train/loss", "health/rankme", "online/knn"} <= run.data.metrics.keys()
    pictures = {item.path for item in client.list_artifacts(undisturbed.run_id)}
    assert {"views.png", "curves.png", "features.png", "config.yaml"} <= pictures
    version = client.get_model_version("undisturbed", "1")
    assert float(version.tags["metric.knn"]) == pytest.approx(undisturbed.pretrained["knn"], abs=1e-3)
    assert [step for step, _ in curve(undisturbed.run_id, "train/loss")] == list(range(1, STEPS + 1))
    encoder = jem.load_encoder(undisturbed.encoder)
    batch = read_rows(open_index(str(digits_test)), range(3), 32, 10**6)
    assert encoder(batch.image).shape == (3, 96)


def test_the_registered_encoder_gives_the_features_of_the_training_process(undisturbed, storage, digits_test):
    batch = read_rows(open_index(str(digits_test)), range(8), 32, 10**6)
    encoder = jem.load_encoder(undisturbed.encoder)
    state = weights(storage, "undisturbed")
    for name, tensor in encoder.backbone.state_dict().items():
        assert torch.equal(tensor, state[f"branches.0.backbone.{name}"])
    with torch.no_grad():
        many = encoder(batch.image)
        torch.testing.assert_close(encoder(batch.image.float() / 255), many, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(encoder(batch.image[3]), many[3], rtol=1e-4, atol=1e-5)


def test_the_stored_configuration_alone_starts_the_same_run_again(undisturbed, storage, digits_dataset, digits_test):
    import yaml

    stored = PretrainConfig.model_validate(yaml.safe_load((storage / "undisturbed" / "config.yaml").read_text()))
    assert stored == config_of(digits_dataset, digits_test, storage, "undisturbed")


def test_a_name_that_is_taken_is_refused_and_a_finished_run_is_not_resumed(undisturbed, digits_dataset, storage):
    config = config_of(digits_dataset, digits_dataset, storage, "undisturbed")
    with pytest.raises(InputError, match=r"has a run undisturbed already: go on with it \(--resume undisturbed\)"):
        pretrain(config)
    with pytest.raises(InputError, match="undisturbed is finished"):
        pretrain(PretrainConfig(resume="undisturbed", storage=str(storage)))
    with pytest.raises(InputError, match="no run nosuch in"):
        pretrain(PretrainConfig(resume="nosuch", storage=str(storage)))


def test_a_killed_worker_costs_steps_and_nothing_else(undisturbed, digits_dataset, digits_test, storage, capsys):
    killed: list[int] = []

    def kill() -> None:
        worker = workers()[0]
        killed.append(worker.pid)
        worker.kill()

    # Ray Train asks its workers now and then what they kept, and goes on from a checkpoint that it heard of.
    heard = storage / "worker" / CHECKPOINT_MANAGER_SNAPSHOT_FILENAME
    thread = when(lambda: heard.exists() and "step-00000002" in heard.read_text(), kill)
    result = pretrain(config_of(digits_dataset, digits_test, storage, "worker"))
    thread.join(1)
    assert killed, "nothing was killed, so nothing was shown"
    _is_as_undisturbed(result, undisturbed, storage)
    said = capsys.readouterr().err
    assert said.count("the workers start again, from the last checkpoint: ") == 1, said
    assert said.count("with 2 worker(s)\n") == said.count("going on from step ") == 1, said


@pytest.fixture
def own_copy(digits_dataset, tmp_path) -> Path:
    """The training set, to be harmed."""
    return Path(shutil.copytree(digits_dataset, tmp_path / "data"))


def cut_in_half(data: Path) -> None:
    """The first of two shards, with the first images."""
    shard = min(data.glob("*.parquet"))
    os.truncate(shard, shard.stat().st_size // 2)


def test_images_that_are_lost_while_training_are_replaced_counted_and_said(
    ray_cluster, own_copy, digits_test, storage, capsys
):
    values = config_of(own_copy, digits_test, storage, "truncated").model_dump()
    values |= {"limit": 900}  # of which the second shard has 181
    values["stream"] |= {"max_lost": 0.9}
    values["train"] |= {"epochs": 2, "keep_checkpoints": 2}
    values["evaluation"] |= {"probe": None}
    thread = when((storage / "truncated" / "step-00000002" / checkpoint.FILE).exists, lambda: cut_in_half(own_copy))
    result = pretrain(PretrainConfig.model_validate(values))
    thread.join(1)
    shard = min(own_copy.glob("*.parquet"))
    assert capsys.readouterr().err.count(f"warning: cannot read {shard}") == 1, "once, with its name"
    lost = [value for _, value in curve(result.run_id, "stream/lost")]
    assert lost == sorted(lost)
    assert 0 < lost[-1] <= 719
    assert [step for step, _ in curve(result.run_id, "train/loss")] == list(range(1, 2 * (900 // 64) + 1))


def test_a_lost_image_too_many_stops_the_run_with_the_reason(ray_cluster, own_copy, digits_test, storage):
    values = config_of(own_copy, digits_test, storage, "over").model_dump()
    values["stream"] |= {"max_lost": 0.1}
    thread = when((storage / "over" / "run.json").exists, lambda: cut_in_half(own_copy))
    # the only shard: what is not read yet has no other image to stand in for it
    many = r"\d+ of 200 images are lost, more than stream\.max_lost 0\.1 allows: cannot read .*"
    reason = rf"training stopped: ({many}|cannot read .*part-00000\.parquet, nor \d+ others in place of it.*)"
    with pytest.raises(RunError, match=reason + "Mend the cause, then go on with --resume over"):
        pretrain(PretrainConfig.model_validate(values))
    thread.join(1)
    assert json.loads((storage / "over" / "run.json").read_text())["status"] == "failed"


def test_a_storage_that_cannot_be_written_stops_the_run_which_goes_on_with_fewer_workers(
    ray_cluster, digits_dataset, digits_test, storage
):
    values = config_of(digits_dataset, digits_test, storage, "resized").model_dump()
    values["evaluation"] |= {"probe": None}
    in_the_way = storage / "resized" / "step-00000006"
    thread = when((storage / "resized" / "run.json").exists, lambda: in_the_way.write_text(""))
    with pytest.raises(RunError, match=r"training stopped: step-00000006 cannot be written to .*runs"):
        pretrain(PretrainConfig.model_validate(values))
    thread.join(1)
    in_the_way.unlink()
    assert (storage / "resized" / "step-00000004" / checkpoint.FILE).exists()
    resume = {"resume": "resized", "storage": str(storage)}
    with pytest.raises(
        InputError, match=r"run resized cannot go on so: train\.batch_size 64 does not divide among cluster\.workers 3"
    ):
        pretrain(PretrainConfig.model_validate(resume | {"cluster": {"workers": 3}}))  # nor do they divide by default
    result = pretrain(PretrainConfig.model_validate(resume | {"cluster": {"workers": 1}}))
    assert [step for step, _ in curve(result.run_id, "train/loss")] == list(range(1, STEPS + 1))
    state = checkpoint.load(storage / "resized" / f"step-{STEPS:08d}")
    assert (state.step, state.parts) == (STEPS, 2)


def test_a_killed_driver_is_resumed_by_name(undisturbed, digits_dataset, digits_test, storage, tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(dump_config(config_of(digits_dataset, digits_test, storage, "driver")))
    command = [sys.executable, "-m", "pipelines.pretrain"]
    repository = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": str(repository)}
    with (tmp_path / "log").open("wb") as log:
        driver = subprocess.Popen(
            [*command, "--config", str(file)], env=environment, cwd=tmp_path, stdout=log, stderr=subprocess.STDOUT
        )
        when((storage / "driver" / "step-00000004" / checkpoint.FILE).exists, driver.kill).join(DEADLINE)
        assert driver.wait(DEADLINE) == -signal.SIGKILL, (tmp_path / "log").read_text()
    assert not (storage / "driver" / f"step-{STEPS:08d}").exists(), "it was killed too late to show anything"

    with pytest.raises(InputError, match=r"go on with it \(--resume driver\)"):
        pretrain(config_of(digits_dataset, digits_test, storage, "driver"))
    result = pretrain(PretrainConfig(resume="driver", storage=str(storage)))
    record = json.loads((storage / "driver" / "run.json").read_text())
    assert record["status"] == "finished"
    _is_as_undisturbed(result, undisturbed, storage)


def _is_as_undisturbed(result: PretrainResult, undisturbed: PretrainResult, storage: Path) -> None:
    expected, found = weights(storage, "undisturbed"), weights(storage, result.name)
    assert expected.keys() == found.keys()
    different = [name for name in expected if not torch.equal(expected[name], found[name])]
    assert different == []
    for key in ("train/loss", "train/variance", "health/std", "online/knn"):
        assert curve(result.run_id, key) == curve(undisturbed.run_id, key), f"one curve of {key}, without a repeat"
    runs = MlflowClient(os.environ["MLFLOW_TRACKING_URI"]).search_runs(
        [MlflowClient(os.environ["MLFLOW_TRACKING_URI"]).get_experiment_by_name("faults").experiment_id],
        f"tags.`jem.name` = '{result.name}'",
    )
    assert [run.info.run_id for run in runs] == [result.run_id]
    assert runs[0].info.status == "FINISHED"


def test_views_made_in_a_pool_are_those_of_the_device_and_a_profile_changes_nothing(
    ray_cluster, digits_dataset, digits_test, storage, capsys
):
    """Masked views, and views of two sizes, for a ViT."""
    values = config_of(digits_dataset, digits_test, storage, "masked").model_dump()
    values["backbone"] = {"name": "vit_tiny", "patch": 8}
    masked = {"size": 32, "mask": {"patch": 8, "kind": "block", "block": 4, "ratio": 0.5}}
    values["augment"] |= {"views": [masked, {"size": 16}], "pool_actors": 1, "pool_cpus": 0.2}
    values["train"] |= {"checkpoint_every": None}
    values["evaluation"] |= {"probe": None}
    kept = {}
    for placement in ("device", "pool"):
        values |= {"name": f"masked-{placement}", "profile": placement == "pool"}
        values["augment"] |= {"placement": placement}
        result = pretrain(PretrainConfig.model_validate(values))
        kept[placement] = weights(storage, result.name)
        assert jem.load_encoder(f"models:/masked/{len(kept)}").input_size == 32
    assert [name for name, value in kept["device"].items() if not torch.equal(value, kept["pool"][name])] == []
    table = (storage / "masked-pool" / "profile" / "profile.md").read_text()
    assert "| backward " in table
    assert "Means of 5 steps.\nViews are made in a pool (augment.placement)" in table
    assert table in capsys.readouterr().err
    trace = gzip.decompress((storage / "masked-pool" / "profile" / "trace.json.gz").read_bytes())
    assert b"jem/forward" in trace
    client = MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
    assert {item.path for item in client.list_artifacts(result.run_id, "profile")} == {
        "profile/profile.md",
        "profile/trace.json.gz",
    }


def test_a_collapse_is_named_in_the_terminal_and_in_the_tags(ray_cluster, digits_dataset, digits_test, storage, capsys):
    values = config_of(digits_dataset, digits_test, storage, "collapsing").model_dump()
    values["method"]["mu"] = 0.0
    values["optimizer"]["lr"] = 0.04
    values["train"] |= {"epochs": 12, "checkpoint_every": None}
    values["cluster"]["workers"] = 1
    values["track"]["alias"] = "champion"
    result = pretrain(PretrainConfig.model_validate(values))
    assert result.collapse == 1
    printed = capsys.readouterr()
    assert "collapsing: collapsed (complete)" in printed.out
    assert re.search(r"step \d+: collapsed \(complete\)", printed.err), "early, while it trains"
    client = MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
    assert client.get_run(result.run_id).data.tags["jem.collapse"] == "1"
    version = client.get_model_version("collapsing", "1")
    assert version.tags["collapse"] == "1"
    assert version.aliases == [], "a collapsed encoder takes no alias from a good one"


def test_a_resumed_run_keeps_its_settings(storage, undisturbed, digits_dataset, tmp_path):
    record = storage / "undisturbed" / "run.json"
    text = record.read_text()
    record.write_text(json.dumps(json.loads(text) | {"status": "stopped"}))
    try:
        with pytest.raises(
            InputError, match=r"a resumed run keeps its settings: leave out --train\.epochs \(it was 4\)"
        ):
            pretrain(
                PretrainConfig.model_validate(
                    {"resume": "undisturbed", "storage": str(storage), "train": {"epochs": 9}}
                )
            )
    finally:
        record.write_text(text)
