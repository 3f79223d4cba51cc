"""Checks before a job starts: what fits on a cluster, and what its nodes see."""

from __future__ import annotations

from pathlib import Path

import pytest

from jem.config import ClusterConfig, StreamConfig
from jem.errors import InputError
from pipelines.cluster import Cluster, Node, check_shared, place

STREAM = StreamConfig(decode_cpus=0.25)


def cluster_of(*cpus: float) -> Cluster:
    return Cluster(tuple(Node(str(number), each, 0.0, 1e9) for number, each in enumerate(cpus)))


def test_an_elastic_run_starts_where_its_least_number_fits() -> None:
    config = ClusterConfig(workers=8, min_workers=2, cpus_per_worker=1.0)
    with pytest.raises(InputError, match=r"holds 4 of 8 workers x 1 CPUs: lower cluster\.workers"):
        place(ClusterConfig(workers=8, cpus_per_worker=1.0), STREAM, cluster_of(2.0, 2.0))
    # four would leave nothing to decode with: planned for two, 2 of 4 CPUs are left
    assert place(config, STREAM, cluster_of(2.0, 2.0), worlds=[2, 4, 8]).decode_tasks == 3
    with pytest.raises(InputError, match=r"holds 1 of 2 workers x 1 CPUs: lower cluster\.min_workers"):
        place(config, STREAM, cluster_of(1.5), worlds=[2, 4, 8])


def test_decode_tasks_are_planned_for_as_many_workers_as_fit() -> None:
    config = ClusterConfig(workers=4, min_workers=1, cpus_per_worker=0.5)
    fixed = place(ClusterConfig(workers=4, cpus_per_worker=0.5), STREAM, cluster_of(16.0))
    assert place(config, STREAM, cluster_of(16.0), worlds=[1, 2, 4]) == fixed


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_several_nodes_may_see_a_storage_that_is_not_made_yet(tmp_path: Path) -> None:
    import ray

    here = Node(ray.get_runtime_context().get_node_id(), 1.0, 0.0, 0.0)
    check_shared(Cluster((here, here)), str(tmp_path / "new" / "runs"), str(tmp_path))
    assert not (tmp_path / "new" / "runs").exists()
    with pytest.raises(InputError, match="does not see data"):
        check_shared(Cluster((here, here)), str(tmp_path), str(tmp_path / "no" / "data"))
