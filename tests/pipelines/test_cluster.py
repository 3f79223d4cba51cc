"""Checks before a job starts: what fits on a cluster, and what its nodes see."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from jem.config import ClusterConfig, StreamConfig
from jem.errors import InputError
from pipelines import cluster as clusters
from pipelines.cluster import Cluster, Node, await_room, bundle, check_shared, connect, place

STREAM = StreamConfig(decode_cpus=0.25)


def cluster_of(*cpus: float) -> Cluster:
    return Cluster(tuple(Node(str(number), each, 0.0, 1e9) for number, each in enumerate(cpus)))


def test_an_elastic_run_starts_where_its_least_number_fits() -> None:
    config = ClusterConfig(workers=8, min_workers=2, cpus_per_worker=1.0)
    with pytest.raises(InputError, match=r"holds 4 of 8 workers x 1 CPUs: lower cluster\.workers"):
        place(ClusterConfig(workers=8, cpus_per_worker=1.0), STREAM, cluster_of(2.0, 2.0))
    # four would leave nothing to decode with: planned for two, 2 of 4 CPUs are left
    assert place(config, STREAM, cluster_of(2.0, 2.0), worlds=[2, 4, 8]).decode_tasks == 2
    with pytest.raises(InputError, match=r"holds 1 of 2 workers x 1 CPUs: lower cluster\.min_workers"):
        place(config, STREAM, cluster_of(1.5), worlds=[2, 4, 8])


def test_decode_tasks_are_planned_for_as_many_workers_as_fit() -> None:
    config = ClusterConfig(workers=4, min_workers=1, cpus_per_worker=0.5)
    fixed = place(ClusterConfig(workers=4, cpus_per_worker=0.5), STREAM, cluster_of(16.0))
    assert place(config, STREAM, cluster_of(16.0), worlds=[1, 2, 4]) == fixed


def fit_four(cluster: Cluster) -> int:
    return place(ClusterConfig(workers=4, cpus_per_worker=1.0), STREAM, cluster).decode_tasks


@pytest.fixture
def requests(monkeypatch) -> list[list[dict[str, float]]]:
    """What the autoscaler is asked for."""
    found: list[list[dict[str, float]]] = []
    monkeypatch.setattr(clusters, "request_resources", lambda *, bundles: found.append(bundles))
    monkeypatch.setattr(clusters, "LOOK_SECONDS", 0.01)
    return found


def test_a_job_waits_for_the_nodes_that_it_asked_for(requests, monkeypatch) -> None:
    grown = iter([cluster_of(0.0), cluster_of(0.0, 4.0), cluster_of(0.0, 4.0, 4.0), cluster_of(99.0)])
    monkeypatch.setattr(clusters, "look", lambda: next(grown))
    config = ClusterConfig(workers=4, cpus_per_worker=1.0, wait_for_nodes=60.0, gpu=True)
    cluster, tasks = await_room(config, bundle(config, STREAM, 0.5), 4, fit_four)
    assert (cluster, tasks) == (cluster_of(0.0, 4.0, 4.0), 2)
    assert requests == [[{"CPU": 1.75, "GPU": 1.0}] * 4, []]  # asked for once, then given back


def test_a_job_is_refused_at_once_or_after_waiting(requests, monkeypatch) -> None:
    monkeypatch.setattr(clusters, "look", lambda: cluster_of(2.0))
    for seconds, asked in ((0.0, []), (0.05, [[{"CPU": 1.25}] * 4, []])):
        config = ClusterConfig(workers=4, cpus_per_worker=1.0, wait_for_nodes=seconds)
        with pytest.raises(InputError, match=r"holds 2 of 4 workers x 1 CPUs: lower cluster\.workers"):
            await_room(config, bundle(config, STREAM, 0.0), 4, fit_four)
        assert requests == asked


def test_a_cluster_that_is_gone_is_not_waited_for(monkeypatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        gone = f"127.0.0.1:{taken.getsockname()[1]}"
        monkeypatch.setattr(clusters, "find_bootstrap_address", lambda _: gone)
        monkeypatch.setattr("ray.is_initialized", lambda: False)
        with (
            pytest.raises(InputError, match=f"no Ray .* at {gone}"),
            connect(ClusterConfig(address="auto")),
        ):
            pass


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_several_nodes_may_see_a_storage_that_is_not_made_yet(tmp_path: Path) -> None:
    import ray

    here = Node(ray.get_runtime_context().get_node_id(), 1.0, 0.0, 0.0)
    lost = Node("a" * 56, 1.0, 0.0, 0.0)
    check_shared(Cluster((here, lost, here)), str(tmp_path / "new" / "runs"), str(tmp_path))
    assert not (tmp_path / "new" / "runs").exists()
    with pytest.raises(InputError, match="does not see data"):
        check_shared(Cluster((here, here)), str(tmp_path), str(tmp_path / "no" / "data"))
