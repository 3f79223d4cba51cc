"""How many workers an elastic run takes, when it changes their number, and that waiting for them has an end."""

from __future__ import annotations

from typing import Any

import pytest
from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy, NoopDecision, ResizeDecision
from ray.train.v2.api.config import ScalingConfig

from jem.errors import RunError
from jem.train import elastic
from jem.train.elastic import Divisors


def policy_of(worlds: list[int], *, cpus: float = 1.0, beside: float = 0.25, deadline: float = 5.0) -> Divisors:
    scaling = ScalingConfig(num_workers=(worlds[0], worlds[-1]), resources_per_worker={"CPU": cpus})
    return Divisors(scaling, worlds, beside, deadline, mailbox=None)


class Cluster:
    """What Ray tells about nodes: (CPUs, alive, leaving) of each."""

    def __init__(self, patch: pytest.MonkeyPatch, *nodes: tuple[float, bool, bool]) -> None:
        import ray

        found = [
            {"NodeID": str(number), "Alive": alive, "Resources": {"CPU": cpus}}
            for number, (cpus, alive, _) in enumerate(nodes)
        ]
        leaving = {str(number): 0 for number, node in enumerate(nodes) if node[2]}
        patch.setattr(ray, "nodes", lambda: found)
        patch.setattr(ray._private.state.state, "get_draining_nodes", lambda: leaving)
        self.reserved = {str(number): {"CPU": node[0]} for number, node in enumerate(nodes)}


@pytest.mark.parametrize(
    ("nodes", "expected"),
    [
        ([(5, True, False)] * 2, 8),
        ([(4, True, False)] * 2, 4),  # room for 8, but none is left to decode
        ([(5, True, False), (2.5, True, False)], 4),  # 7 do not divide 8 parts
        ([(5, True, False), (5, False, False)], 4),
        ([(5, True, False), (5, True, True)], 4),
        ([(2.5, True, False)], 2),
        ([(1.5, True, False)], 0),  # fewer than the least
    ],
)
def test_the_number_divides_the_parts_and_leaves_room_to_decode(
    monkeypatch: pytest.MonkeyPatch, nodes: list[tuple[float, bool, bool]], expected: int
) -> None:
    cluster = Cluster(monkeypatch, *nodes)
    assert policy_of([2, 4, 8])._count_possible_workers(cluster.reserved) == expected


def test_a_node_that_does_not_answer_is_not_counted_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster(monkeypatch, (2.5, True, False), (2.5, True, False))
    policy = policy_of([2, 4])
    counted: list[int] = []

    def decide(self: Any) -> Any:
        counted.append(self._count_possible_workers(cluster.reserved))
        return ResizeDecision(num_workers=counted[-1], resources_per_worker={"CPU": 1.0})

    monkeypatch.setattr(ElasticScalingPolicy, "make_decision_for_non_running_worker_group", decide)
    for answering in ({"0", "1"}, {"1"}):
        monkeypatch.setattr(policy, "_nodes_that_answer", lambda found=answering: found)
        policy.make_decision_for_non_running_worker_group()
    assert counted == [4, 2]
    assert policy._count_possible_workers(cluster.reserved) == 4, "while it runs, what is listed counts"


class Letters:
    """In place of the mailbox: the answers come when they are let."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, ...]] = []
        self.answered = 0

    def __call__(self, method: str, *arguments: Any) -> int:
        self.asked.append((method, *arguments))
        return 1 if method == "want" else self.answered


def test_a_resize_waits_for_a_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = ResizeDecision(num_workers=4, resources_per_worker={"CPU": 1.0})
    monkeypatch.setattr(ElasticScalingPolicy, "make_decision_for_running_worker_group", lambda *_: wanted)
    policy, letters = policy_of([2, 4]), Letters()
    monkeypatch.setattr(policy, "_ask", letters)

    def decide() -> Any:
        return policy.make_decision_for_running_worker_group(None, None)  # type: ignore[arg-type]

    assert [type(decide()) for _ in range(5)] == [NoopDecision] * 5
    assert letters.asked[0] == ("want", 4)
    assert set(letters.asked[1:]) == {("answered",)}
    letters.answered = 1
    assert isinstance(decide(), NoopDecision), "one round in which Ray Train learns of it"
    assert decide() is wanted
    letters.answered = 0
    assert isinstance(decide(), NoopDecision), "the next one waits again"


def test_a_resize_is_made_without_a_checkpoint_that_does_not_come(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = ResizeDecision(num_workers=4, resources_per_worker={"CPU": 1.0})
    monkeypatch.setattr(ElasticScalingPolicy, "make_decision_for_running_worker_group", lambda *_: wanted)
    now = [0.0]
    monkeypatch.setattr(elastic.time, "monotonic", lambda: now[0])
    policy = policy_of([2, 4])
    monkeypatch.setattr(policy, "_ask", Letters())
    for seconds in (0.0, elastic.KEEP_SECONDS):
        now[0] = seconds
        assert isinstance(policy.make_decision_for_running_worker_group(None, None), NoopDecision)  # type: ignore[arg-type]
    now[0] += 1
    assert policy.make_decision_for_running_worker_group(None, None) is wanted  # type: ignore[arg-type]


def test_waiting_for_the_least_number_ends_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Any] = [NoopDecision()]
    monkeypatch.setattr(ElasticScalingPolicy, "make_decision_for_non_running_worker_group", lambda *_: found[0])
    now = [100.0]
    monkeypatch.setattr(elastic.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(elastic.time, "sleep", lambda _: None)
    policy = policy_of([2, 4])
    monkeypatch.setattr(policy, "_nodes_that_answer", set[str])
    policy.make_decision_for_non_running_worker_group()
    now[0] = 104
    policy.make_decision_for_non_running_worker_group()
    found[0] = ResizeDecision(num_workers=2, resources_per_worker={"CPU": 1.0})
    assert policy.make_decision_for_non_running_worker_group() is found[0]
    found[0], now[0] = NoopDecision(), 200
    policy.make_decision_for_non_running_worker_group()  # counted from the beginning again
    now[0] = 206
    with pytest.raises(RunError, match=r"no room for cluster\.min_workers 2 in 5 s \(cluster\.start_timeout\)"):
        policy.make_decision_for_non_running_worker_group()
