"""The stream on Ray: what `local_batches` gives, whatever the cluster does in between."""

from __future__ import annotations

import contextlib
import contextvars
import gc
import io
import itertools
import logging
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import torch
from PIL import Image
from ray._private.internal_api import get_memory_info_reply, get_state_from_address

from jem.batch import Batch, Views
from jem.config import AugmentConfig, StreamConfig
from jem.data import scheduling
from jem.data import stream as stream_module
from jem.data.index import Index, open_index
from jem.data.plan import Plan, Position
from jem.data.read import local_batches
from jem.data.stream import dataset, ray_batches, views_batches
from jem.errors import RunError

pytestmark = pytest.mark.ray

SMALL = StreamConfig(canvas=8)
START = Position(0, 0)


def picture(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (number % 256, number // 256, 77)).save(buffer, "PNG")
    return buffer.getvalue()


def told(image: torch.Tensor) -> torch.Tensor:
    """The numbers that the colours of (N, 3, S, S) tell."""
    return image[:, 0, 0, 0].long() + 256 * image[:, 1, 0, 0].long()


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """What is in circles stays: a collection takes a quarter of a second, in which a training stands still."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def stored() -> int:
    """Bytes in the object store that are in use."""
    state = get_state_from_address(ray.get_runtime_context().gcs_address)
    return int(get_memory_info_reply(state).store_stats.object_store_bytes_used)


@pytest.fixture(scope="module")
def numbered(tmp_path_factory: pytest.TempPathFactory) -> Index:
    """500 images, each of a colour that tells its position, in row groups of 30."""
    folder = tmp_path_factory.mktemp("numbered")
    for shard in range(2):
        numbers = np.arange(250) + 250 * shard
        images = [{"bytes": picture(number), "path": ""} for number in numbers]
        pq.write_table(
            pa.table({"image": images, "label": numbers % 10}), folder / f"{shard}.parquet", row_group_size=30
        )
    return open_index(str(folder))


@pytest.fixture(scope="module")
def cifar(shared_data: Path) -> Index:
    return open_index(str(shared_data / "cifar10" / "train"), limit=5500)


def ids(batches: itertools.chain[Batch] | object) -> list[list[int]]:
    return [batch.id.tolist() for batch in batches]  # type: ignore[attr-defined]


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("remainder", ["drop", "carry"])
def test_three_epochs_on_two_workers_have_each_image_once(cifar: Index, remainder: str) -> None:
    plan = Plan(cifar.rows, seed=0, batch_size=256, world=2, remainder=remainder)
    stream = StreamConfig(canvas=32)
    sequence: list[list[int]] = [[] for _ in range(3)]
    for rank in range(2):
        batches = ray_batches(cifar, plan, stream, rank, START, 3, decode_tasks=2)
        expected = local_batches(cifar, plan, stream, rank, START, 3)
        for position, batch, same in zip(plan.positions(START, 3), batches, expected, strict=True):
            assert torch.equal(batch.id, same.id)
            assert torch.equal(batch.image, same.image)
            assert torch.equal(batch.label, same.label)
            assert torch.equal(batch.size, same.size)
            sequence[position.epoch] += batch.id.tolist()
    if remainder == "drop":
        assert [len(set(epoch)) for epoch in sequence] == [len(epoch) for epoch in sequence] == [21 * 256] * 3
    else:
        assert [len(epoch) for epoch in sequence] == [21 * 256, 21 * 256, 22 * 256]
        seen = np.bincount(np.concatenate(sequence), minlength=len(cifar))
        assert (seen == 2).sum() == 3 * 5500 % 256
        assert (seen == 3).sum() == 5500 - 3 * 5500 % 256
    assert sequence[0][:256] != sequence[1][:256]


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("tasks", [1, 3, 4])
def test_the_order_is_the_same_with_any_number_of_decode_tasks(numbered: Index, tasks: int) -> None:
    plan = Plan(numbered.rows, seed=5, batch_size=20, world=2, window=1)
    found = list(ray_batches(numbered, plan, SMALL, 1, START, 2, decode_tasks=tasks))
    assert ids(found) == ids(local_batches(numbered, plan, SMALL, 1, START, 2))
    for batch in found:
        assert torch.equal(told(batch.image), batch.id)
        assert torch.equal(batch.label, batch.id % 10)


@pytest.mark.usefixtures("ray_cluster")
def test_a_batch_has_the_types_and_shapes_of_the_contract(numbered: Index) -> None:
    plan = Plan(numbered.rows, seed=0, batch_size=16, world=1)
    batches = ray_batches(numbered, plan, StreamConfig(canvas=24), 0, START, 1, decode_tasks=1)
    batch = next(batches)
    batches.close()
    assert batch.image.shape == (16, 3, 24, 24)
    assert batch.image.dtype == torch.uint8
    assert batch.image.is_contiguous(memory_format=torch.channels_last)
    assert (batch.size.shape, batch.size.dtype) == ((16, 2), torch.int32)
    assert (batch.id.dtype, batch.label.dtype) == (torch.int64, torch.int64)


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("stop", [1, 12, 24, 25, 26, 49])
def test_stopped_at_any_step_and_resumed_it_goes_on_without_repeat_or_gap(numbered: Index, stop: int) -> None:
    plan = Plan(numbered.rows, seed=2, batch_size=20, world=1, remainder="carry")
    whole = ids(local_batches(numbered, plan, SMALL, 0, START, 2))
    assert len(whole) == 50
    before = ray_batches(numbered, plan, SMALL, 0, START, 2, decode_tasks=2)
    consumed = ids(itertools.islice(before, stop))
    before.close()
    rest = ids(ray_batches(numbered, plan, SMALL, 0, plan.position(stop), 2, decode_tasks=2))
    assert consumed + rest == whole


@pytest.mark.usefixtures("ray_cluster")
def test_a_shard_listed_twice_loses_nothing(numbered: Index) -> None:
    index = open_index([numbered.files[0], numbered.files[1], numbered.files[0]])
    plan = Plan(index.rows, seed=0, batch_size=10, world=1)
    found = list(ray_batches(index, plan, SMALL, 0, START, 1, decode_tasks=2))
    assert sorted(itertools.chain(*ids(found))) == list(range(750))
    numbers = sorted(int(number) for batch in found for number in told(batch.image))
    assert numbers == sorted([*range(500), *range(250)])


@pytest.mark.usefixtures("ray_cluster")
def test_a_long_run_goes_through_many_executions_in_order(numbered: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first is shorter, as the first batch waits until it is listed."""
    monkeypatch.setattr(stream_module, "SPAN", 9)
    monkeypatch.setattr(stream_module, "FIRST_SPAN", 4)
    spans: list[int] = []
    decoded = stream_module._decoded

    def counted(index: Index, plan: Plan, stream: StreamConfig, windows: Any, *args: Any, **options: Any) -> Any:
        spans.append(len(windows))
        return decoded(index, plan, stream, windows, *args, **options)

    monkeypatch.setattr(stream_module, "_decoded", counted)
    plan = Plan(numbered.rows, seed=0, batch_size=20, world=1, window=1)
    start = Position(0, 3)
    windows = len(list(plan.windows(0, start, 2)))
    assert windows > 2 * 9
    found = ray_batches(numbered, plan, SMALL, 0, start, 2, decode_tasks=2)
    assert ids(found) == ids(local_batches(numbered, plan, SMALL, 0, start, 2))
    rest = windows - 4
    assert spans == [4, *[9] * (rest // 9), *([rest % 9] if rest % 9 else [])]


@pytest.mark.usefixtures("ray_cluster")
def test_executions_that_are_over_are_not_kept(numbered: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_module, "SPAN", 9)
    spans: weakref.WeakSet[object] = weakref.WeakSet()
    begin = stream_module._Span.begin

    def noted(*args: Any) -> Any:
        if (span := begin(*args)) is not None:
            spans.add(span)
            begun.append(len(spans))
        return span

    begun: list[int] = []
    monkeypatch.setattr(stream_module._Span, "begin", noted)
    plan = Plan(numbered.rows, seed=0, batch_size=20, world=1, window=1)
    with uncollected():
        assert sum(1 for _ in ray_batches(numbered, plan, SMALL, 0, START, 4, decode_tasks=2)) == plan.total_steps(4)
    assert len(begun) > 4
    assert max(begun) <= 2, "the one that is read, and the next"


@pytest.mark.usefixtures("ray_cluster")
def test_the_last_batches_of_an_execution_are_not_kept(numbered: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_module, "SPAN", 9)
    plan = Plan(numbered.rows, seed=0, batch_size=20, world=1, window=1)
    canvas = StreamConfig(canvas=256)
    batch = 20 * 256 * 256 * 3
    with uncollected():
        assert sum(1 for _ in ray_batches(numbered, plan, canvas, 0, START, 2, decode_tasks=2)) == plan.total_steps(2)
        until = time.monotonic() + 10  # Ray hears a little later what is no longer needed
        while (kept := stored()) >= batch and time.monotonic() < until:
            time.sleep(0.05)
    assert kept < batch, "beside the lists of what was to be read"


@pytest.mark.usefixtures("ray_cluster")
def test_the_next_execution_begins_before_the_last_one_ends_with_no_more_tasks(
    numbered: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream_module, "SPAN", 24)
    begun: list[int] = []
    active: dict[object, int] = {}
    most = 0

    pace = scheduling._Pace
    before, step = pace.before_execution_starts, pace.on_execution_step

    def starts(self: Any, executor: Any) -> None:
        before(self, executor)
        begun.append(taken)

    def steps(self: Any, executor: Any) -> None:
        nonlocal most
        active[executor] = sum(operator.num_active_tasks() for operator in executor._topology)
        most = max(most, sum(active.values()))
        step(self, executor)

    monkeypatch.setattr(pace, "before_execution_starts", starts)
    monkeypatch.setattr(pace, "on_execution_step", steps)
    monkeypatch.setattr(stream_module, "TASK_IMAGES", 60)
    monkeypatch.setattr(stream_module, "AHEAD_BYTES", 0)
    monkeypatch.setattr(stream_module, "BLOCKS_AHEAD", 2)  # tasks wait until something was taken
    plan = Plan(numbered.rows, seed=0, batch_size=20, world=1, window=1)
    taken = 0
    for _ in ray_batches(numbered, plan, SMALL, 0, START, 4, decode_tasks=3):
        taken += 1
        time.sleep(0.01)  # as long as a step takes
    per_span = 24 * plan.window_steps()
    assert taken == plan.total_steps(4)
    assert begun[0] == 0
    assert all(at < number * per_span for number, at in enumerate(begun[1:], 1))
    assert len(begun) == -(-taken // per_span) > 1
    assert 1 < most <= 3


@pytest.mark.usefixtures("ray_cluster")
def test_the_next_execution_does_not_wait_for_one_whose_batches_were_all_taken(
    numbered: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last batch may be taken before Ray Data notes that the last task has ended."""
    monkeypatch.setattr(stream_module, "SPAN", 9)
    monkeypatch.setattr(scheduling._Pace, "on_execution_step", lambda self, executor: None)
    plan = Plan(numbered.rows, seed=0, batch_size=20, world=1, window=1)
    batches = ray_batches(numbered, plan, SMALL, 0, START, 2, decode_tasks=2, deadline=10)
    assert len(list(batches)) == plan.total_steps(2)


@pytest.mark.usefixtures("ray_cluster")
def test_settings_of_the_process_stay_as_they_are(numbered: Index) -> None:
    import ray.data

    before = ray.data.DataContext.get_current().copy()
    plan = Plan(numbered.rows, seed=0, batch_size=100, world=1)
    list(ray_batches(numbered, plan, SMALL, 0, START, 1, decode_tasks=1))
    dataset(numbered, 8, 10**6)
    after = ray.data.DataContext.get_current()
    assert after.execution_options.preserve_order == before.execution_options.preserve_order
    assert after.enable_progress_bars == before.enable_progress_bars
    assert after.target_max_block_size == before.target_max_block_size


@pytest.mark.usefixtures("ray_cluster")
def test_closing_ends_the_reading(numbered: Index) -> None:
    plan = Plan(numbered.rows, seed=0, batch_size=20, world=1)
    batches = ray_batches(numbered, plan, SMALL, 0, START, 100, decode_tasks=2)
    next(batches)
    assert _streaming()
    batches.close()
    assert not _streaming()


@pytest.mark.usefixtures("ray_cluster")
def test_closing_before_anything_is_decoded_prints_no_trace(numbered: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[logging.LogRecord] = []
    monkeypatch.setattr(logging.getLogger("ray.data.exceptions"), "handle", said.append)
    plan = Plan(numbered.rows, seed=0, batch_size=20, world=1)
    batches = ray_batches(numbered, plan, SMALL, 0, START, 1, decode_tasks=1, deadline=0.01)
    with pytest.raises(RunError, match=r"no batch came for 0.01 s"):
        next(batches)
    batches.close()
    assert [record.getMessage() for record in said if not getattr(record, "hide", False)] == []


def _streaming() -> list[str]:
    """Threads that read a stream, or schedule its tasks."""
    names = [thread.name for thread in threading.enumerate()]
    return [name for name in names if name.startswith(("jem-stream", "StreamingExecutor"))]


@pytest.mark.usefixtures("ray_cluster")
def test_what_waits_to_be_taken_takes_no_processor_time(numbered: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_module, "AHEAD_BYTES", 0)
    monkeypatch.setattr(stream_module, "BLOCKS_AHEAD", 1)  # decode tasks have results, and may not give them
    monkeypatch.setattr(stream_module, "TASK_IMAGES", 60)
    plan = Plan(numbered.rows, 0, 20, 1)
    batches = ray_batches(numbered, plan, SMALL, 0, START, 100, decode_tasks=3)
    next(batches)
    time.sleep(2)
    used = time.process_time()
    time.sleep(2)
    used = time.process_time() - used
    batches.close()  # type: ignore[attr-defined]
    assert used < 0.2, f"{used / 2:.0%} of a core"


@pytest.mark.usefixtures("ray_cluster")
def test_the_scheduling_wakes_for_the_first_of_its_tasks_and_elsewhere_as_ray_data_has_it() -> None:
    import ray
    from ray.data._internal.execution import streaming_executor_state

    @ray.remote(num_cpus=0)
    def rests(seconds: float) -> None:
        time.sleep(seconds)

    tasks = [rests.remote(0.0), rests.remote(600.0)]

    def waits(seconds: float, *, paced: bool) -> float:
        scheduling._PACED.set(paced)
        begun = time.monotonic()
        wait = streaming_executor_state.ray.wait  # type: ignore[attr-defined]
        ready, rest = wait(tasks, num_returns=2, timeout=seconds, fetch_local=False)
        assert (ready, rest) == (tasks[:1], tasks[1:])
        return time.monotonic() - begun

    try:
        assert contextvars.copy_context().run(waits, 60.0, paced=True) < 60.0
        assert contextvars.copy_context().run(waits, 1.0, paced=False) >= 1.0
    finally:
        ray.cancel(tasks[1], force=True)


@pytest.mark.usefixtures("ray_cluster")
def test_the_scheduling_does_not_go_round_for_nothing(numbered: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    rounds = 0
    pace = scheduling._Pace
    step = pace.on_execution_step

    def steps(self: Any, executor: Any) -> None:
        nonlocal rounds
        step(self, executor)
        rounds += 1
        assert scheduling._PACED.get()

    monkeypatch.setattr(pace, "on_execution_step", steps)
    monkeypatch.setattr(stream_module, "TASK_IMAGES", 1)  # a task for each window
    plan = Plan(numbered.rows, seed=0, batch_size=20, world=1, window=1)
    begun = time.monotonic()
    taken = len(list(ray_batches(numbered, plan, SMALL, 0, START, 4, decode_tasks=2)))
    assert taken == plan.total_steps(4)
    assert rounds < 4 * taken + 12 * (time.monotonic() - begun) + 20  # four for a task; ten a second while none ends


@pytest.mark.usefixtures("ray_cluster")
def test_an_image_that_cannot_be_decoded_is_named_in_one_line(tmp_path: Path) -> None:
    images = [{"bytes": picture(number) if number != 37 else b"text", "path": ""} for number in range(60)]
    pq.write_table(pa.table({"image": images}), tmp_path / "a.parquet", row_group_size=20)
    index = open_index(str(tmp_path))
    plan = Plan(index.rows, seed=0, batch_size=10, world=1)
    with pytest.raises(RunError) as caught:
        list(ray_batches(index, plan, SMALL, 0, START, 1, decode_tasks=1))
    words = str(caught.value)
    assert f"row 17 of row group 1 of {tmp_path / 'a.parquet'}" in words
    assert "jem ingest" in words
    assert "\n" not in words


@pytest.mark.usefixtures("ray_cluster")
def test_without_a_free_cpu_it_ends_with_a_reason_instead_of_hanging(numbered: Index) -> None:
    plan = Plan(numbered.rows, seed=0, batch_size=20, world=1)
    greedy = StreamConfig(canvas=8, decode_cpus=400)
    with pytest.raises(RunError, match=r"no batch came for 3 s: one decode task asks for 400 CPUs, the cluster has 4"):
        next(ray_batches(numbered, plan, greedy, 0, START, 1, decode_tasks=1, deadline=3))
    assert not _streaming(), "Ray ends the whole process if it is shut down under an execution"


@pytest.mark.usefixtures("ray_cluster")
def test_it_goes_on_where_no_whole_cpu_is_free(numbered: Index) -> None:
    import ray

    @ray.remote
    class Held:
        def ready(self) -> None:
            pass

    held = Held.options(num_cpus=ray.available_resources()["CPU"] - 0.5).remote()
    ray.get(held.ready.remote(), timeout=60)
    plan = Plan(numbered.rows, seed=0, batch_size=20, world=1)
    try:
        batches = list(ray_batches(numbered, plan, SMALL, 0, START, 1, decode_tasks=1, deadline=60))
        rows = len(dataset(numbered, 8, 10**6).take_all())
    finally:
        ray.kill(held)
    assert len(batches) == plan.steps(0)
    assert rows == len(numbered)


@pytest.mark.usefixtures("ray_cluster")
def test_a_train_worker_streams_though_its_placement_group_is_full(numbered: Index) -> None:
    """Ray Train puts its workers into a placement group; decode tasks that stayed in it would wait for ever."""
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    @ray.remote(num_cpus=1)
    class Worker:
        def ids(self, index: Index, plan: Plan, rank: int) -> list[list[int]]:
            batches = ray_batches(index, plan, SMALL, rank, START, 1, decode_tasks=1, deadline=120)
            return [batch.id.tolist() for batch in batches]

    plan = Plan(numbered.rows, seed=0, batch_size=20, world=2)
    group = placement_group([{"CPU": 1}] * 2)
    assert group.wait(60)
    where = [
        PlacementGroupSchedulingStrategy(group, number, placement_group_capture_child_tasks=True) for number in (0, 1)
    ]
    workers = [Worker.options(scheduling_strategy=strategy).remote() for strategy in where]  # type: ignore[attr-defined]
    found = ray.get([worker.ids.remote(numbered, plan, rank) for rank, worker in enumerate(workers)], timeout=240)
    remove_placement_group(group)
    for rank in range(2):
        assert found[rank] == ids(local_batches(numbered, plan, SMALL, rank, START, 1))


@pytest.mark.usefixtures("ray_cluster")
def test_a_killed_decode_process_costs_nothing(
    numbered: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os
    import signal

    mark = tmp_path / "killed"
    real = stream_module.read_window

    def dying(*args: object, **options: object) -> object:
        if not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(stream_module, "read_window", dying)
    plan = Plan(numbered.rows, seed=0, batch_size=20, world=1)
    found = ids(ray_batches(numbered, plan, SMALL, 0, START, 1, decode_tasks=2))
    assert mark.exists()
    assert found == ids(local_batches(numbered, plan, SMALL, 0, START, 1))


@pytest.mark.usefixtures("ray_cluster")
def test_a_data_set_is_read_once_in_storage_order(numbered: Index) -> None:
    rows = dataset(numbered, 8, 10**6).take_all()
    assert [row["id"] for row in rows] == list(range(500))
    assert [row["label"] for row in rows] == [number % 10 for number in range(500)]
    assert rows[300]["image"].shape == (8, 8, 3)
    assert rows[300]["image"].dtype == np.uint8
    assert tuple(rows[300]["image"][0, 0]) == (300 % 256, 1, 77)
    assert rows[300]["size"].tolist() == [8, 8]


@pytest.mark.usefixtures("ray_cluster")
def test_views_from_a_pool_are_those_of_the_batch_at_its_position(numbered: Index) -> None:
    def painted() -> Callable[[Batch, Position], Views]:
        """A global view and a local one that tell the batch and its position."""

        def views(batch: Batch, position: Position) -> Views:
            whole = batch.image.float() + 1000 * position.epoch
            part = torch.full((len(batch), 3, 4, 4), float(position.step))
            mask = torch.arange(4) < (batch.id % 4)[:, None]
            return Views([whole, part], batch.id, batch.label, [None, mask])

        return views

    plan = Plan(numbered.rows, seed=0, batch_size=100, world=2)
    start = Position(0, 2)
    augment = AugmentConfig(placement="pool", pool_actors=2)
    made = views_batches(numbered, plan, SMALL, 1, start, 2, decode_tasks=1, augment=augment, make=painted)
    expected = local_batches(numbered, plan, SMALL, 1, start, 2)
    for position, views, batch in zip(plan.positions(start, 2), made, expected, strict=True):
        assert torch.equal(views.id, batch.id)
        assert torch.equal(views.label, batch.label)
        assert torch.equal(views.views[0], batch.image.float() + 1000 * position.epoch)
        assert views.views[0].is_contiguous(memory_format=torch.channels_last)
        assert views.views[1].shape == (50, 3, 4, 4)
        assert (views.views[1] == position.step).all()
        assert views.masks is not None
        assert views.masks[0] is None
        assert torch.equal(views.masks[1], torch.arange(4) < (batch.id % 4)[:, None])
