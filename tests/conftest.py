"""Fixtures that all tests share: a world of its own (home, caches, MLflow store), real images, one Ray cluster."""

from __future__ import annotations

import io
import json
import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import numpy as np
import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

REPOSITORY = Path(__file__).resolve().parents[1]
DIGITS_ROWS_PER_GROUP = 200

hypothesis.settings.register_profile(
    "jem",
    database=None,
    deadline=None,  # two cores are shared with Ray: a slow example is not a wrong one
    derandomize=True,  # the same examples in every run
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("jem")


@pytest.fixture(scope="session", autouse=True)
def own_world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Home, caches, MLflow store and working directory of this test session; nothing goes into the repository."""
    world = tmp_path_factory.mktemp("world")
    home = world / "home"
    home.mkdir()
    settings = {
        "HOME": str(home),
        "XDG_CACHE_HOME": str(world / "cache"),
        "MPLCONFIGDIR": str(world / "matplotlib"),
        "MLFLOW_TRACKING_URI": f"sqlite:///{world / 'mlflow.db'}",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "true",
        "RAY_AUTH_MODE": "disabled",
        "RAY_idle_worker_killing_time_threshold_ms": "600000",  # as pipelines.cluster starts it
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_TRAIN_V2_ENABLED": "1",
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # of Ray Train's looks at its workers, for trainings of seconds
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "COLUMNS": "120",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        for name in ("RAY_ADDRESS", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_RUN_ID"):
            patch.delenv(name, raising=False)
        patch.chdir(world)
        yield world


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real images beside the repository; a test that needs it skips, by name, where it is absent."""
    folder = REPOSITORY / "../shared/data"
    if not folder.is_dir():
        pytest.skip("no real images: ../shared/data is not there")
    return folder.resolve()


@pytest.fixture(scope="session")
def ray_cluster(own_world: Path) -> Iterator[None]:
    """One Ray of four CPUs (more than the machine may have: they are only a count) for the whole session."""
    import ray

    if not ray.is_initialized():
        ray.init(
            "local",  # whatever else runs on this machine
            num_cpus=4,
            num_gpus=0,
            include_dashboard=False,
            object_store_memory=500 * 2**20,
            log_to_driver=False,
            configure_logging=False,
        )
    yield
    left = [thread.name for thread in threading.enumerate() if thread.name.startswith("StreamingExecutor")]
    assert not left, "an execution of Ray Data outlived what read it, which can end the whole process"
    ray.shutdown()


def write_digits(folder: Path, images: np.ndarray, labels: np.ndarray, shards: int) -> Path:
    """Write 8 x 8 digits (values 0..16) as PNGs of 32 x 32 pixels, in the layout that ingest writes."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    folder.mkdir(parents=True)
    names = [str(digit) for digit in range(10)]
    features = {
        "image": {"_type": "Image"},
        "label": {"names": names, "_type": "ClassLabel"},
        **{
            name: {"dtype": kind, "_type": "Value"}
            for name, kind in (("id", "int64"), ("height", "int32"), ("width", "int32"))
        },
    }
    schema = pa.schema(
        {
            "image": pa.struct({"bytes": pa.binary(), "path": pa.string()}),
            "label": pa.int64(),
            "id": pa.int64(),
            "height": pa.int32(),
            "width": pa.int32(),
        },
        metadata={"huggingface": json.dumps({"info": {"features": features}})},
    )
    for shard, rows in enumerate(np.array_split(np.arange(len(images)), shards)):
        cells = []
        for row in rows:
            buffer = io.BytesIO()
            grey = Image.fromarray((images[row] * 255 / 16).astype(np.uint8))
            grey.resize((32, 32), Image.Resampling.BICUBIC).save(buffer, "PNG")
            cells.append({"bytes": buffer.getvalue(), "path": f"{labels[row]}/{row}.png"})
        size = np.full(len(rows), 32, np.int32)
        table = pa.table(
            {"image": cells, "label": labels[rows].astype(np.int64), "id": rows, "height": size, "width": size},
            schema=schema,
        )
        pq.write_table(table, folder / f"part-{shard:05d}.parquet", row_group_size=DIGITS_ROWS_PER_GROUP)
    return folder


@pytest.fixture(scope="session")
def digits_split() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """scikit-learn's digits in a seeded order: 1,437 training images and labels, 360 test images and labels."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    images, labels = digits.images[order], digits.target[order]
    return images[:1437], labels[:1437], images[1437:], labels[1437:]


@pytest.fixture(scope="session")
def digits_dataset(own_world: Path, digits_split: tuple[np.ndarray, ...]) -> Path:
    """Folder of two Parquet shards with 1,437 labelled digits, 32 pixels, in row groups of 200."""
    return write_digits(own_world / "digits-train", digits_split[0], digits_split[1], shards=2)


@pytest.fixture(scope="session")
def digits_test(own_world: Path, digits_split: tuple[np.ndarray, ...]) -> Path:
    """Folder of one Parquet shard with the other 360 digits."""
    return write_digits(own_world / "digits-test", digits_split[2], digits_split[3], shards=1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests without Ray first: what fails quickly is seen quickly, and the cluster starts once, late."""
    items.sort(key=lambda item: item.get_closest_marker("ray") is not None)


os.environ.setdefault("OMP_NUM_THREADS", "2")
