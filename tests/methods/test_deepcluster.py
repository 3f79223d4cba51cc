"""DeepCluster: bank, assignments and prototypes follow the images' ids from epoch to epoch."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor
from torch.nn import functional

from jem.batch import Views
from jem.config import BackboneConfig, DeepClusterConfig, PretrainConfig
from jem.errors import InputError
from jem.methods import Progress, build_method
from jem.methods.deepcluster import DeepCluster, assignment_loss
from jem.methods.kmeans import spherical_kmeans

SMALL = BackboneConfig(stem="stride2")
IMAGES = 10


# --- the loss -----------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 9), k=st.integers(1, 6), weighted=st.booleans(), seed=st.integers(0, 99))
def test_loss_is_the_mean_cross_entropy_of_the_assigned_images(n: int, k: int, weighted: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores, target = rng.normal(size=(n, k)), rng.integers(-1, k, size=n)
    weight = rng.uniform(0.1, 2, size=k) if weighted else np.ones(k)
    total = counted = 0.0
    for row, cluster in zip(scores, target, strict=True):
        if cluster >= 0:
            total += weight[cluster] * (math.log(np.exp(row).sum()) - row[cluster])
            counted += weight[cluster]
    found = assignment_loss(torch.from_numpy(scores), torch.from_numpy(target), torch.from_numpy(weight))
    assert found.item() == pytest.approx(total / counted if counted else 0.0, rel=1e-10)


def test_a_batch_without_assignments_costs_nothing_and_its_gradient_is_zero() -> None:
    scores = torch.randn(4, 3, requires_grad=True)
    loss = assignment_loss(scores, torch.full((4,), -1), torch.ones(3))
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(scores.grad, torch.zeros(4, 3))


# --- the module ---------------------------------------------------------------------------------------------------


def views(epoch: int, local: int = 0) -> Views:
    """All images, each epoch in another order."""
    generator = torch.Generator().manual_seed(epoch)
    sizes = [16, 16] + [8] * local
    images = [torch.randn(IMAGES, 3, s, s, generator=generator) for s in sizes]
    return Views(images, torch.randperm(IMAGES, generator=generator), torch.full((IMAGES,), -1))


def part(batch: Views, rows: slice) -> Views:
    return Views([view[rows] for view in batch.views], batch.id[rows], batch.label[rows])


def make(images: int = IMAGES, **kwargs: object) -> DeepCluster:
    torch.manual_seed(0)
    method = build_method(DeepClusterConfig(**{"projector": (16, 8), "prototypes": (3, 4), **kwargs}), SMALL, 0, images)
    assert isinstance(method, DeepCluster)
    return method


def step(method: DeepCluster, batch: Views, epoch: int, first: bool = True, number: int | None = None) -> Tensor:
    progress = Progress(epoch if number is None else number, 20, epoch, first)
    method.before_step(progress)
    out = method(batch)
    out.loss.backward()
    method.after_backward(progress)
    optimizer = torch.optim.SGD(method.parameters(), lr=0.1, weight_decay=0.1)
    optimizer.step()
    optimizer.zero_grad()
    method.after_step(Progress(progress.step + 1, 20, epoch, first))
    return out.loss.detach()


def embed(method: DeepCluster, images: Tensor) -> Tensor:
    with torch.no_grad():
        return functional.normalize(method.branch(images)[1], dim=1)


def test_the_first_epoch_fills_the_bank_and_moves_nothing() -> None:
    method, batch = make(), views(0, local=1)
    before = {name: p.detach().clone() for name, p in method.named_parameters()}
    halves = [part(batch, slice(0, IMAGES // 2)), part(batch, slice(IMAGES // 2, IMAGES))]
    expected = torch.cat([embed(method, half.views[0]) for half in halves])
    assert step(method, halves[0], 0) == 0
    assert method.bank.seen.nonzero()[:, 0].tolist() == sorted(halves[0].id.tolist())
    assert step(method, halves[1], 0, first=False) == 0
    assert method.bank.seen.all()
    assert all(torch.equal(p, before[name]) for name, p in method.named_parameters())
    assert (method.assignments == -1).all()
    torch.testing.assert_close(method.bank.rows[batch.id], expected)


def test_every_parameter_gets_a_gradient_in_the_first_epoch_as_ddp_wants() -> None:
    for alternation in ("v2", "original"):
        method = make(alternation=alternation)
        method.before_step(Progress())
        method(views(0)).loss.backward()
        assert all(p.grad is not None and not p.grad.any() for p in method.parameters())
        method.after_backward(Progress())
        assert all(p.grad is None for p in method.parameters())


def test_bank_and_assignments_follow_the_ids_over_epochs_of_different_orders() -> None:
    method = make()
    step(method, views(0), 0)
    for epoch in (1, 2, 3):
        bank = method.bank.rows.clone()
        batch = views(epoch)
        progress = Progress(epoch, 20, epoch)
        drawn = progress.generator()
        expected = [spherical_kmeans(bank, k, 10, drawn) for k in (3, 4)]
        latest = embed(method, batch.views[0])
        step(method, batch, epoch)
        for head, (_, assigned) in enumerate(expected):
            assert torch.equal(method.assignments[:, head], assigned)
        assert torch.equal(method.prototypes, torch.cat([centroids for centroids, _ in expected]))
        torch.testing.assert_close(method.bank.rows[batch.id], latest, rtol=1e-5, atol=1e-6)


def test_loss_is_the_cross_entropy_of_all_views_with_the_images_clusters() -> None:
    method = make()
    step(method, views(0), 0)
    batch = views(1, local=2)
    method.before_step(Progress(1, 20, 1))
    out = method(batch)
    losses, right = [], []
    for view in batch.views:
        z = embed(method, view)
        for head, centroids in enumerate(method.prototypes.split([3, 4])):
            scores = z @ centroids.T / 0.1
            target = method.assignments[batch.id, head]
            losses.append(functional.cross_entropy(scores, target).item())
            right.append((scores.argmax(dim=1) == target).double().mean().item())
    assert len(losses) == 4 * 2
    assert out.loss.item() == pytest.approx(np.mean(losses), rel=1e-5)
    assert out.terms["accuracy"].item() == pytest.approx(np.mean(right))


def test_clusters_stay_within_an_epoch() -> None:
    method = make()
    step(method, views(0), 0)
    step(method, views(1), 1, number=1)
    kept = method.prototypes.clone(), method.assignments.clone()
    step(method, views(2), 1, first=False, number=2)
    assert torch.equal(method.prototypes, kept[0])
    assert torch.equal(method.assignments, kept[1])


def test_images_that_were_not_seen_have_no_assignment_and_do_not_count() -> None:
    method, first = make(), views(0)
    step(method, part(first, slice(0, 6)), 0)
    batch = views(1)
    progress = Progress(1, 20, 1)
    method.before_step(progress)
    unseen = sorted(set(range(IMAGES)) - set(first.id[:6].tolist()))
    assert (method.assignments[unseen] == -1).all()
    assert (method.assignments[first.id[:6]] >= 0).all()
    loss = method(batch).loss
    counted = torch.isin(batch.id, first.id[:6])
    losses = []
    for view in batch.views:
        z = embed(method, view)[counted]
        for head, centroids in enumerate(method.prototypes.split([3, 4])):
            target = method.assignments[batch.id[counted], head]
            losses.append(functional.cross_entropy(z @ centroids.T / 0.1, target).item())
    assert loss.item() == pytest.approx(np.mean(losses), rel=1e-5)


def test_prototypes_are_not_trained_and_the_originals_classifier_is() -> None:
    assert {name for name, _ in make().named_parameters() if "branch" not in name} == set()
    names = {name for name, _ in make(alternation="original").named_parameters() if "branch" not in name}
    assert names == {"classifier.weight", "classifier.bias"}


def test_the_originals_classifier_is_reset_at_each_epochs_start_and_trained_within() -> None:
    method = make(alternation="original")
    step(method, views(0), 0)
    seen = []
    for epoch in (1, 2):
        method.before_step(Progress(2 * epoch, 20, epoch))
        assert method.classifier.weight.std().item() == pytest.approx(0.01, rel=0.4)
        assert not method.classifier.bias.any()
        seen.append(method.classifier.weight.detach().clone())
        step(method, views(epoch), epoch, first=False, number=2 * epoch + 1)
        assert not torch.equal(method.classifier.weight, seen[-1])
        assert method.classifier.bias.any()
    assert not torch.equal(seen[0], seen[1])


def test_the_originals_images_weigh_one_over_the_size_of_their_cluster() -> None:
    method = make(alternation="original")
    step(method, views(0), 0)
    batch = views(1)
    method.before_step(Progress(1, 20, 1))
    loss = method(batch).loss
    losses = []
    for view in batch.views:
        logits = method.classifier(method.branch(view)[1]).detach().split([3, 4], dim=1)
        for head, scores in enumerate(logits):
            target = method.assignments[batch.id, head]
            # each cluster's mean, and the mean of the clusters: what sampling the clusters alike would give
            means = [functional.cross_entropy(scores[target == c], target[target == c]) for c in target.unique()]
            losses.append(torch.stack(means).mean().item())
    assert loss.item() == pytest.approx(np.mean(losses), rel=1e-5)


def test_an_id_without_a_row_is_refused() -> None:
    with pytest.raises(InputError, match="9 images and an id 9"):
        step(make(images=9), views(0), 0)


# --- what is refused ----------------------------------------------------------------------------------------------


def test_more_prototypes_than_images_are_refused() -> None:
    with pytest.raises(InputError, match="prototypes 11 are more than the data set's 10 images"):
        make(prototypes=(3, 11))
    with pytest.raises(InputError, match="data set's size is not known"):
        build_method(DeepClusterConfig(), SMALL, None, None)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"limit": 2000}, "prototypes 3000 are more than the 2000 images of limit"),
        ({"train": {"epochs": 1}}, "first epoch only embeds the images"),
        (
            {"method": {"name": "deepcluster", "alternation": "original", "temperature": 0.2}},
            "for alternation v2",
        ),
    ],
)
def test_what_cannot_work_is_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        PretrainConfig(**{"data": "x", "method": {"name": "deepcluster"}, **settings})
