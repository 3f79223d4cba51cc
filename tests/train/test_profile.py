"""The profile of a run: disjoint phases that add up, a trace with their names, and a training that stays the same."""

from __future__ import annotations

import gzip
import json
import re
import threading
from collections import Counter
from pathlib import Path

import pytest
import torch

from jem.augment.views import Augment, generator, prefetched
from jem.config import PretrainConfig
from jem.data.index import open_index
from jem.data.read import local_batches
from jem.errors import InputError
from jem.methods import build_method
from jem.train import profile as module
from jem.train.loop import fit
from jem.train.profile import Measured, Profile
from pipelines.pretrain import pretrain
from pipelines.settings import load_config
from tests.train.test_loop import CPU, Told, config_of, plan_of, same

PHASES = ("wait", "copy", "augment", "forward", "backward", "optimizer")


class Kept:
    """What a profile reports; the trace is read while it is there."""

    def __init__(self) -> None:
        self.measured: list[Measured] = []
        self.labels: Counter[str] = Counter()

    def __call__(self, measured: Measured, trace: Path) -> None:
        self.measured.append(measured)
        events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
        names = [event["name"] for event in events if event.get("cat") == "user_annotation"]
        self.labels.update(name for name in names if name.startswith("jem/"))


class Hours:
    """A clock that goes on when it is told to."""

    now = 0.0

    def spend(self, milliseconds: float) -> None:
        self.now += milliseconds / 1000


def walk(profile: Profile, clock: Hours, steps: int) -> None:
    """Steps of known length, of which the first five are slow and the timed ones get slower by 1 ms each."""
    for step in profile.steps(range(100, 100 + steps)):
        slow = 1000.0 if step < 105 else 0.0
        with profile.phase("wait"):
            clock.spend(5 + slow)
            with profile.phase("copy"):
                clock.spend(2)
            with profile.phase("augment"):
                clock.spend(10)
        for _ in range(2):  # in two parts, as with train.accumulate
            with profile.phase("forward"):
                clock.spend(10 + (step - 105) / 2)
            with profile.phase("backward"):
                clock.spend(20)
        with profile.phase("optimizer"):
            clock.spend(3)
        clock.spend(8)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Hours:
    hours = Hours()
    monkeypatch.setattr(module.time, "perf_counter", lambda: hours.now)
    return hours


def test_phases_are_disjoint_means_of_the_timed_steps_alone(clock: Hours) -> None:
    kept = Kept()
    walk(Profile(CPU, kept), clock, 60)
    (measured,) = kept.measured
    assert measured.steps == 20
    growing = sum(range(20)) / 20
    expected = {"wait": 5, "copy": 2, "augment": 10, "forward": 20 + growing, "backward": 40, "optimizer": 3}
    assert measured.phases == pytest.approx(expected)
    assert measured.whole == pytest.approx(88 + growing)
    assert measured.aside == {}
    assert kept.labels == {f"jem/{name}": 3 * (2 if name in ("forward", "backward") else 1) for name in PHASES}


def test_what_another_thread_does_meanwhile_is_not_taken_out_of_the_step(clock: Hours) -> None:
    """On a GPU a thread makes the next views while the step waits for these."""
    kept = Kept()
    profile = Profile(CPU, kept)

    def augment() -> None:
        with profile.phase("augment"):
            clock.spend(10)

    for _ in profile.steps(range(9)):
        with profile.phase("wait"):
            beside = threading.Thread(target=augment)
            beside.start()
            beside.join()
            with profile.phase("copy"):
                clock.spend(2)
    (measured,) = kept.measured
    assert measured.phases == pytest.approx({"wait": 10, "augment": 10, "copy": 2})


@pytest.mark.parametrize(("steps", "timed", "traced"), [(3, 1, 1), (4, 2, 1), (12, 5, 3), (27, 19, 3), (28, 20, 3)])
def test_a_short_run_is_divided(clock: Hours, steps: int, timed: int, traced: int) -> None:
    kept = Kept()
    walk(Profile(CPU, kept), clock, steps)
    assert [measured.steps for measured in kept.measured] == [timed]
    assert kept.labels["jem/wait"] == traced


def test_a_run_too_short_is_not_measured_and_all_its_steps_are_done(clock: Hours) -> None:
    kept = Kept()
    assert list(Profile(CPU, kept).steps(range(7, 9))) == [7, 8]
    assert kept.measured == []


def rows(table: str) -> dict[str, tuple[float, float]]:
    found = re.findall(r"^\| ([a-z, ]+?) +\| +([\d.]+) \| +([\d.]+) \|$", table, re.MULTILINE)
    return {name: (float(ms), float(percent)) for name, ms, percent in found}


def test_the_table_names_every_phase_and_its_percent_add_up_to_100() -> None:
    sevenths = dict.fromkeys(PHASES, 1.0)
    table = Measured(20, 7.0, sevenths, {}, pooled=False).table()
    found = rows(table)
    names = ["waiting for data", "copy to the device", "augmentation", "forward", "backward", "optimizer"]
    assert list(found) == [*names, "everything else", "a step"]
    shares = [percent for name, (_, percent) in found.items() if name != "a step"]
    assert sum(shares) == pytest.approx(100, abs=1e-9)
    assert set(shares) == {14.2, 14.3}
    assert found["everything else"][0] == 1
    assert found["a step"] == (7, 100)
    assert "Means of 20 steps." in table
    assert "pool" not in table


def test_what_runs_beside_the_step_or_in_a_pool_is_said_and_not_counted() -> None:
    beside = Measured(5, 4.0, {"wait": 1.0, "forward": 2.0, "keep": 0.5}, {"copy": 3.0, "augment": 9.0}, pooled=False)
    found = rows(beside.table())
    assert not {"copy to the device", "augmentation"} & found.keys()
    assert found["evaluation, checkpoint"] == (0.5, 12.5)
    assert found["everything else"] == (0.5, 12.5)
    parts = "copy to the device 3.00 ms, augmentation 9.00 ms"
    assert f"On a stream of their own, while the step before runs: {parts}." in beside.table()
    pooled = Measured(5, 4.0, {"wait": 4.0}, {}, pooled=True).table()
    assert rows(pooled)["augmentation"] == (0, 0)
    assert "Views are made in a pool (augment.placement)" in pooled


def trained(config: PretrainConfig, profile: Profile | None) -> Told:
    """As in `test_loop`, the source's phases measured too."""
    told, plan = Told(), plan_of(config)
    index, epochs = open_index(config.data, config.limit), config.train.epochs
    torch.manual_seed(config.seed)
    method = build_method(config.method, config.backbone, None, len(index))

    def source(start):
        batches = local_batches(index, plan, config.stream, 0, start, epochs)
        generators = (generator(config.seed, *position, 0) for position in plan.positions(start, epochs))
        phase = {} if profile is None else {"phase": profile.phase}
        for _, views in prefetched(batches, generators, Augment(config.augment), CPU, **phase):
            yield views

    fit(config, method, source, plan, told, told.keep, device=CPU, profile=profile)
    return told


def test_a_profiled_run_ends_with_the_same_weights_bit_for_bit_and_tells_the_same(digits_dataset: Path) -> None:
    config = config_of(digits_dataset, epochs=4, accumulate=2)
    kept = Kept()
    without, profiled = trained(config, None), trained(config, Profile(CPU, kept))
    assert same(without.states[-1], profiled.states[-1])
    assert without.kept_at == profiled.kept_at
    assert without.numbers["train/loss"] == profiled.numbers["train/loss"]
    (measured,) = kept.measured
    assert measured.steps == 12 - 4 - 3
    assert measured.phases.keys() == {*PHASES, "keep"}
    assert min(measured.phases.values()) > 0
    assert sum(measured.phases.values()) < measured.whole
    assert kept.labels == {f"jem/{name}": 3 * (2 if name in ("forward", "backward") else 1) for name in PHASES} | {
        "jem/keep": 3 + 1  # three checkpoints, and the end of an epoch
    }


def test_a_run_that_is_broken_off_while_it_is_traced_leaves_no_tracer(clock: Hours) -> None:
    kept = Kept()
    steps = Profile(CPU, kept).steps(range(40))
    assert [next(steps) for _ in range(27)][-1] == 26, "the second of the traced ones"
    assert torch._C._autograd._profiler_enabled()
    steps.close()
    assert kept.measured == []
    assert not torch._C._autograd._profiler_enabled()


def test_profile_is_a_flag_and_a_run_without_enough_steps_is_refused(digits_dataset: Path, tmp_path: Path) -> None:
    assert load_config(PretrainConfig, ["--data", "x", "--profile"]).profile is True
    assert load_config(PretrainConfig, ["--data", "x", "--profile", "--name", "y"]).name == "y"
    assert load_config(PretrainConfig, ["--data", "x"]).profile is False
    with pytest.raises(InputError, match="unexpected argument '20'"):
        load_config(PretrainConfig, ["--data", "x", "--profile", "20"])
    config = config_of(digits_dataset, epochs=1, batch_size=56).model_copy(
        update={"profile": True, "storage": str(tmp_path / "runs")}
    )
    with pytest.raises(InputError, match=r"a profile needs 3 steps, and this run has 2: raise train\.epochs"):
        pretrain(config)
    assert not (tmp_path / "runs").exists()
