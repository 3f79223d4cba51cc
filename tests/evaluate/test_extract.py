"""Features over Ray Data against the encoder called by hand."""

from __future__ import annotations

import io
import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import torch
from PIL import Image

from jem.config import IMAGENET_MEAN, IMAGENET_STD, BackboneConfig, StreamConfig
from jem.data.index import open_index
from jem.encoder import Encoder
from jem.errors import InputError, RunError
from jem.evaluate import extract
from jem.evaluate.extract import extract_all, extract_features, plan_cpus, stream_of, within
from jem.models.backbones import build_backbone

STREAM = StreamConfig(canvas=32)


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    torch.manual_seed(0)
    architecture = BackboneConfig(stem="stride2")
    return Encoder(build_backbone(architecture), architecture, 32, IMAGENET_MEAN, IMAGENET_STD)


@pytest.mark.ray
@pytest.mark.parametrize("few", [True, False])
def test_features_are_the_encoders_own_sorted_by_id(
    ray_cluster: None, encoder: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, few: bool
) -> None:
    # two encoders take 77 images of 32 x 32 pixels: with a limit of one pixel less, in actors
    monkeypatch.setattr(extract, "HERE", 77 * 2 * 32 * 32 - (not few))
    pools: list[int] = []
    plan = extract.plan_cpus
    monkeypatch.setattr(extract, "plan_cpus", lambda *args, **options: (pools.append(1), plan(*args, **options))[1])
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (47, 32, 32, 3), dtype=np.uint8)
    ids = rng.permutation(47) + 100
    cells = []
    for image in images:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "PNG")
        cells.append({"bytes": buffer.getvalue(), "path": None})
    table = pa.table({"image": cells, "label": rng.integers(0, 5, 47), "id": ids})
    for number, part in enumerate(range(0, 47, 20)):
        pq.write_table(table.slice(part, 20), tmp_path / f"part-{number}.parquet", row_group_size=7)
    encoder.train()  # and its running statistics stay as they are
    before = {name: value.clone() for name, value in encoder.state_dict().items()}

    torch.manual_seed(1)
    other = Encoder(build_backbone(encoder.architecture), encoder.architecture, 32, IMAGENET_MEAN, IMAGENET_STD)
    both = [open_index(str(tmp_path)), open_index(str(tmp_path), limit=30)]
    (found, first), (others, _) = extract_all([encoder, other], both, STREAM, batch_size=16, actors=2)
    assert bool(pools) is not few

    order = np.argsort(ids)
    assert encoder.training
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    with torch.no_grad():
        expected = encoder.eval()(torch.from_numpy(images[order]).permute(0, 3, 1, 2))
    torch.testing.assert_close(found.features, expected, rtol=1e-4, atol=1e-5)
    assert found.features.dtype == torch.float32
    assert found.ids.tolist() == ids[order].tolist()
    assert found.labels.tolist() == table["label"].to_numpy()[order].tolist()
    assert found.labelled
    in_file_order = torch.tensor(ids[:30]).sort().values
    assert torch.equal(first.ids, in_file_order)
    torch.testing.assert_close(
        first.features, found.features[torch.isin(found.ids, in_file_order)], rtol=1e-4, atol=1e-5
    )
    with torch.no_grad():
        expected = other.eval()(torch.from_numpy(images[order]).permute(0, 3, 1, 2))
    torch.testing.assert_close(others.features, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.ray
@pytest.mark.parametrize("few", [True, False])
def test_an_image_that_cannot_be_decoded_is_named(
    ray_cluster: None, encoder: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, few: bool
) -> None:
    monkeypatch.setattr(extract, "HERE", extract.HERE if few else 0)
    pq.write_table(pa.table({"image": [{"bytes": b"not an image", "path": "a.jpg"}]}), tmp_path / "part-0.parquet")
    with pytest.raises(RunError, match=r"part-0\.parquet"):
        extract_features(encoder, open_index(str(tmp_path)), STREAM, batch_size=4)


@pytest.mark.ray
def test_waiting_has_an_end(ray_cluster: None) -> None:
    rows = ray.data.from_items([{"id": 0}]).map_batches(lambda batch: batch, num_cpus=400)
    with pytest.raises(RunError, match=r"no features came for 2 s"):
        next(within(rows, 2))
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("StreamingExecutor")]


@pytest.mark.ray
def test_decoding_keeps_a_place_beside_the_actors(ray_cluster: None) -> None:
    has = ray.cluster_resources()["CPU"]
    for actors in (1, 2, 3, 7, 40):
        each, threads = plan_cpus(actors, 0.25, gpu=False)
        assert 0 < each <= 1
        assert actors * each + 0.25 <= has
        assert threads >= 1
    with pytest.raises(InputError, match="too few for 1000"):
        plan_cpus(1000, 0.25, gpu=False)
    with pytest.raises(InputError, match="0 GPUs"):
        plan_cpus(1, 0.25, gpu=True)


def test_canvas_is_the_encoders_own_unless_another_is_set() -> None:
    trained = {"stream": {"canvas": 48}}
    assert stream_of(trained, StreamConfig()).canvas == 48
    assert stream_of(trained, StreamConfig(canvas=64)).canvas == 64
    assert stream_of({}, StreamConfig()).canvas == StreamConfig().canvas
