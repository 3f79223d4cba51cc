"""DINO's loss, centre, teacher and frozen layer."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor, nn

from jem.batch import Views
from jem.config import BackboneConfig, DINOConfig, MomentumConfig, PretrainConfig
from jem.evaluate.collapse import embedding_health, verdict
from jem.methods import Progress, build_method
from jem.methods.dino import DINO, dino_loss

SMALL = BackboneConfig(stem="stride2", zero_init=False)


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max())
    return e / e.sum()


def paper(
    teacher: list[np.ndarray], student: list[np.ndarray], centre: np.ndarray, sharp: float, soft: float
) -> tuple[float, float]:
    """Cross entropy and teacher's entropy, for each pair of views and each image."""
    cross, entropy = [], []
    for i, t in enumerate(teacher):
        for n in range(len(t)):
            q = softmax((t[n] - centre) / sharp)
            entropy.append(-sum(x * math.log(x) for x in q))
            cross += [
                -sum(a * math.log(b) for a, b in zip(q, softmax(s[n] / soft), strict=True))
                for j, s in enumerate(student)
                if j != i
            ]
    return sum(cross) / len(cross), sum(entropy) / len(entropy)


def views(local: int = 0, seed: int = 0) -> Views:
    generator = torch.Generator().manual_seed(seed)
    sizes = [8, 8] + [6] * local
    return Views([torch.randn(6, 3, s, s, generator=generator) for s in sizes], torch.arange(6), torch.full((6,), -1))


def make(**changes: object) -> DINO:
    torch.manual_seed(0)
    method = build_method(DINOConfig(**{"projector": (16, 8), "prototypes": 10, **changes}), SMALL)
    assert isinstance(method, DINO)
    return method


# --- the loss -----------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 5), k=st.integers(2, 9), local=st.integers(0, 3), seed=st.integers(0, 99))
def test_loss_is_the_papers(n: int, k: int, local: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    teacher = [rng.uniform(-1, 1, size=(n, k)) for _ in range(2)]
    student = [rng.uniform(-1, 1, size=(n, k)) for _ in range(2 + local)]
    centre = rng.normal(size=k) / 10
    to = torch.from_numpy
    found = dino_loss([to(t) for t in teacher], [to(s) for s in student], to(centre), 0.2, 0.3)
    assert [x.item() for x in found] == pytest.approx(paper(teacher, student, centre, 0.2, 0.3), rel=1e-9)


def test_a_view_is_not_compared_with_itself() -> None:
    """With two views, the student's first meets the teacher's second only."""
    t1, t2, s1, s2 = (torch.randn(4, 6, generator=torch.Generator().manual_seed(seed)) for seed in range(4))
    s1.requires_grad_(), s2.requires_grad_()
    centre = torch.zeros(6)
    both, _ = dino_loss([t1, t2], [s1, s2], centre, 0.1, 0.1)
    (gradient,) = torch.autograd.grad(both, s1, retain_graph=True)
    changed, _ = dino_loss([t1 + torch.randn(4, 6), t2], [s1, s2], centre, 0.1, 0.1)
    assert torch.equal(torch.autograd.grad(changed, s1)[0], gradient)
    other, _ = dino_loss([t1, -t2], [s1, s2], centre, 0.1, 0.1)
    assert not torch.equal(torch.autograd.grad(other, s1)[0], gradient)


def test_gradient_reaches_the_student_alone() -> None:
    t, s = (torch.randn(4, 6, requires_grad=True) for _ in range(2))
    loss, _ = dino_loss([t, t], [s, s], torch.zeros(6), 0.04, 0.1)
    loss.backward()
    assert t.grad is None
    assert s.grad is not None


# --- collapse -----------------------------------------------------------------------------------------------------


def descend(centring: bool, sharp: float) -> tuple[float, float, float, int]:
    """Teacher's entropy / log K, divergence, spread of the teacher's probabilities and the verdict, of a small network.

    Its inputs share a direction, as the representations of an untrained backbone do.
    """
    torch.manual_seed(0)
    x, k = torch.randn(128, 16) + 1, 16
    body, last = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 8)), nn.Linear(8, k, bias=False)
    student = nn.ModuleList([body, last])
    teacher, centre = copy.deepcopy(student), torch.zeros(k)

    def output(network: nn.ModuleList, images: Tensor) -> Tensor:
        unit = nn.functional.normalize(network[0](images), dim=1)
        return nn.functional.linear(unit, nn.functional.normalize(network[1].weight, dim=1))

    optimizer = torch.optim.Adam(student.parameters(), lr=1e-2)
    for _ in range(400):
        two = [x + 0.6 * torch.randn_like(x) for _ in range(2)]
        with torch.no_grad():
            taught = [output(teacher, view) for view in two]
        loss, entropy = dino_loss(taught, [output(student, view) for view in two], centre, sharp, 0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            if centring:
                centre = 0.9 * centre + 0.1 * torch.stack(taught).mean(dim=(0, 1))
            for slow, fast in zip(teacher.parameters(), student.parameters(), strict=True):
                slow.lerp_(fast, 0.1)
    health = embedding_health(((output(teacher, x) - centre) / sharp).softmax(dim=1))
    return entropy.item() / math.log(k), (loss - entropy).item(), health.spread, verdict(health, absolute=False).kind


def test_sharpening_alone_and_centring_alone_collapse_as_figure_7_shows_and_both_together_do_not() -> None:
    entropy, divergence, spread, kind = descend(centring=True, sharp=0.04)
    assert 0.02 < entropy < 0.9
    assert divergence > 0.2
    assert spread > 0.5
    assert kind == 0
    entropy, divergence, spread, kind = descend(centring=False, sharp=0.04)
    assert entropy < 0.01
    assert divergence < 0.01
    assert spread < 0.01
    assert kind == 1
    entropy, divergence, spread, kind = descend(centring=True, sharp=0.1)
    assert entropy > 0.99
    assert divergence < 0.01
    assert spread < 0.03
    assert kind == 1


@pytest.mark.parametrize("row", [[1.0, 0, 0, 0, 0, 0, 0, 0], [0.125] * 8], ids=["one dimension", "uniform"])
def test_diagnostics_name_both_collapses(row: list[float]) -> None:
    collapsed = torch.tensor(row).repeat(64, 1)
    noise = 1e-3 * torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    assert verdict(embedding_health(collapsed + noise), absolute=False).kind == 1


def test_uniform_outputs_are_a_fixed_point_without_sharpening_and_one_hot_ones_without_centring() -> None:
    def gradient(s: Tensor, centre: Tensor, sharp: float) -> float:
        s = s.clone().requires_grad_()
        loss, _ = dino_loss([s.detach()] * 2, [s] * 2, centre, sharp, 0.1)
        return torch.autograd.grad(loss, s)[0].norm().item()

    same = torch.tensor([0.9, -0.3, 0.1, 0.2]).repeat(8, 1)
    assert gradient(torch.zeros(8, 4), torch.zeros(4), 0.1) < 1e-7
    assert gradient(same, torch.zeros(4), 0.04) < gradient(same, torch.tensor([0.9, -0.3, 0.1, 0.2]), 0.04) / 100


# --- the networks -------------------------------------------------------------------------------------------------


def test_output_is_the_loss_of_all_pairs_and_its_terms_are_the_entropy_and_the_divergence() -> None:
    method, given = make(), views(local=2)
    with torch.no_grad():
        method.centre += torch.linspace(-0.1, 0.1, 10)
    method.before_step(Progress())
    out = method(given)
    student = [method.student(view)[2] for view in given.views]
    teacher = [method.teacher(view)[2] for view in given.views[:2]]
    loss, entropy = dino_loss(teacher, student, method.centre, 0.04, 0.1)
    assert out.loss.item() == pytest.approx(loss.item(), rel=1e-5)
    assert out.terms["teacher_entropy"].item() == pytest.approx(entropy.item(), rel=1e-5)
    assert out.terms["kl"].item() == pytest.approx((loss - entropy).item(), rel=1e-4, abs=1e-6)
    torch.testing.assert_close(out.assignment, ((teacher[0] - method.centre) / 0.04).softmax(dim=1))
    out.loss.backward()
    assert all(parameter.grad is None for parameter in method.teacher.parameters())
    assert all(parameter.grad is not None for parameter in method.student.parameters())


def test_output_layer_takes_cosines_with_the_prototypes_whatever_their_norm() -> None:
    method = make()
    _, z, output = method.student(views().views[0])
    expected = nn.functional.cosine_similarity(z[:, None], method.student.prototypes.weight[None], dim=2)
    torch.testing.assert_close(output, expected)
    assert output.abs().max() <= 1
    assert [type(layer).__name__ for layer in method.student.projector] == ["Linear", "GELU", "Linear"]
    assert "BatchNorm1d" in [type(layer).__name__ for layer in make(norm=True).student.projector]


def test_centre_is_the_moving_mean_of_the_teachers_global_views_and_changes_after_the_step() -> None:
    method = make(centre_decay=0.8)
    means = []
    for step in (1, 2):
        given = views(local=1, seed=step)
        with torch.no_grad():
            means.append(torch.cat([method.teacher(view)[2] for view in given.views[:2]]).mean(dim=0))
        before = method.centre.clone()
        method(given)
        assert torch.equal(method.centre, before)
        method.after_step(Progress(step, 10))
        torch.testing.assert_close(method.centre, 0.8 * before + 0.2 * means[-1])


def test_without_centring_there_is_no_centre() -> None:
    method = make(centring=False)
    method(views())
    method.after_step(Progress(1, 10))
    assert torch.equal(method.centre, torch.zeros(10))


def test_last_layer_is_frozen_in_the_first_epochs() -> None:
    method = make(freeze_epochs=2)
    for epoch in range(3):
        method(views()).loss.backward()
        method.after_backward(Progress(epoch, 3, epoch))
        assert (method.student.prototypes.weight.grad is None) == (epoch < 2)
        assert method.student.projector[0].weight.grad is not None


def test_teachers_temperature_rises_to_its_last_and_may_be_the_students() -> None:
    method = make(warmup_epochs=4, teacher_temperature=0.08)
    found = []
    for epoch in range(6):
        method.before_step(Progress(epoch, 6, epoch))
        found.append(method.teacher_temperature)
    assert found == pytest.approx([0.04, 0.05, 0.06, 0.07, 0.08, 0.08])
    unsharpened = make(first_teacher_temperature=0.1, teacher_temperature=0.1)
    unsharpened.before_step(Progress())
    assert unsharpened.teacher_temperature == unsharpened.config.temperature


def test_teacher_follows_the_student() -> None:
    method = make(momentum=MomentumConfig(tau=0.75, schedule="constant"))
    old = method.teacher.prototypes.weight.clone()
    with torch.no_grad():
        method.student.prototypes.weight += 1
    method(views())
    method.after_step(Progress(1, 10))
    torch.testing.assert_close(method.teacher.prototypes.weight, old + 0.25)


@pytest.mark.parametrize("encoder", ["teacher", "student"])
def test_backbone_is_whose_the_setting_says(encoder: str) -> None:
    method, given = make(encoder=encoder), views()
    kept = getattr(method, encoder)
    with torch.no_grad():
        method.teacher.backbone.conv1.weight *= -1
    assert method.backbone is kept.backbone
    assert torch.equal(method(given).representation, kept.backbone(given.views[0]))


def test_one_view_is_refused_and_an_output_of_one_dimension_too() -> None:
    with pytest.raises(ValidationError, match="DINO needs 2 global ones"):
        PretrainConfig(data="x", method={"name": "dino"}, augment={"views": [{"count": 1}]})
    with pytest.raises(ValidationError, match="prototypes"):
        PretrainConfig(data="x", method={"name": "dino", "prototypes": 1})
