"""SwAV: Sinkhorn-Knopp's codes are the paper's, the prediction is swapped, prototypes and queues are kept."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn import functional

from jem.batch import Views
from jem.config import BackboneConfig, PretrainConfig, SwAVConfig
from jem.methods import Progress, build_method
from jem.methods.swav import SwAV, sinkhorn, swapped_prediction

SMALL = BackboneConfig(stem="stride2")


def paper_codes(scores: np.ndarray, epsilon: float, iterations: int) -> np.ndarray:
    """Algorithm of the paper: Q = exp(C^T Z / epsilon), then rows to 1 / K and columns to 1 / N, entry by entry."""
    n, k = scores.shape
    q = [[math.exp(scores[i, j] / epsilon) for i in range(n)] for j in range(k)]
    total = sum(map(sum, q))
    q = [[entry / total for entry in row] for row in q]
    for _ in range(iterations):
        for j in range(k):
            row = sum(q[j])
            q[j] = [entry / row / k for entry in q[j]]
        for i in range(n):
            column = sum(q[j][i] for j in range(k))
            for j in range(k):
                q[j][i] /= column * n
    return np.array(q).T * n


def random_scores(n: int, k: int, seed: int = 0) -> Tensor:
    """Cosines, as SwAV's."""
    generator = torch.Generator().manual_seed(seed)
    z, c = (torch.randn(m, 6, generator=generator, dtype=torch.float64) for m in (n, k))
    return functional.normalize(z, dim=1) @ functional.normalize(c, dim=1).T


# --- the codes ----------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 12),
    k=st.integers(1, 9),
    epsilon=st.sampled_from([0.05, 0.2, 1.0]),
    iterations=st.integers(1, 4),
    seed=st.integers(0, 99),
)
def test_codes_are_the_papers(n: int, k: int, epsilon: float, iterations: int, seed: int) -> None:
    scores = random_scores(n, k, seed)
    found = sinkhorn(scores, epsilon, iterations).numpy()
    np.testing.assert_allclose(found, paper_codes(scores.numpy(), epsilon, iterations), rtol=1e-9, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 40), k=st.integers(1, 40), iterations=st.integers(0, 5), seed=st.integers(0, 99))
def test_every_images_codes_sum_to_one(n: int, k: int, iterations: int, seed: int) -> None:
    codes = sinkhorn(random_scores(n, k, seed), 0.05, iterations)
    assert codes.shape == (n, k)
    assert codes.min() >= 0
    torch.testing.assert_close(codes.sum(dim=1), torch.ones(n, dtype=torch.float64), rtol=1e-12, atol=0)


@settings(max_examples=20, deadline=None)
@given(n=st.integers(1, 30), k=st.integers(1, 12), seed=st.integers(0, 99))
def test_after_many_iterations_every_prototype_has_its_equal_part(n: int, k: int, seed: int) -> None:
    used = sinkhorn(random_scores(n, k, seed), 0.2, 3000).sum(dim=0)
    torch.testing.assert_close(used, torch.full((k,), n / k, dtype=torch.float64), rtol=1e-6, atol=0)


def test_after_the_papers_three_iterations_it_is_near() -> None:
    """Batch 256, 64 prototypes: with epsilon 0.05 within a half of N / K, and nearer with each iteration."""
    scores, part = random_scores(256, 64), 256 / 64
    off = [(sinkhorn(scores, 0.05, count).sum(dim=0) / part - 1).abs().max().item() for count in (0, 1, 3, 10, 100)]
    assert off == sorted(off, reverse=True)
    assert off[0] > 1
    assert off[2] < 0.5
    assert off[4] < 0.01


def test_a_large_epsilon_makes_them_uniform_and_a_small_one_hard() -> None:
    scores = random_scores(12, 4)
    torch.testing.assert_close(sinkhorn(scores, 1e6), torch.full((12, 4), 0.25, dtype=torch.float64), rtol=0, atol=1e-5)
    hard = sinkhorn(scores, 1e-3, 2000)
    assert ((hard > 0.99).sum(dim=0) >= 2).all()  # 3 images each, of which one may be shared
    assert ((hard > 0.01) & (hard < 0.99)).sum() <= 2 * 3


def test_no_score_is_too_large_for_float32() -> None:
    codes = sinkhorn(torch.tensor([[1.0, -1.0], [1.0, -1.0], [-1.0, 1.0]]) * 100, 0.01)
    assert torch.isfinite(codes).all()
    torch.testing.assert_close(codes.sum(dim=1), torch.ones(3))


def test_in_half_precision_they_are_computed_in_float32() -> None:
    scores = random_scores(8, 4).bfloat16()
    assert torch.equal(sinkhorn(scores), sinkhorn(scores.float()))


def test_without_iterations_they_are_a_softmax() -> None:
    scores = random_scores(9, 5)
    torch.testing.assert_close(sinkhorn(scores, 0.1, 0), (scores / 0.1).softmax(dim=1))


# --- the loss -----------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 7), k=st.integers(1, 6), views=st.integers(2, 4), seed=st.integers(0, 99))
def test_loss_is_the_swapped_cross_entropy(n: int, k: int, views: int, seed: int) -> None:
    scores = [random_scores(n, k, 10 * seed + view) for view in range(views)]
    codes = [sinkhorn(each) for each in scores[:2]]
    losses = []
    for s in range(2):
        for t in range(views):
            if t == s:
                continue
            for i in range(n):
                row = [scores[t][i, j].item() / 0.3 for j in range(k)]
                log_sum = math.log(sum(math.exp(x) for x in row))
                losses.append(-sum(codes[s][i, j].item() * (row[j] - log_sum) for j in range(k)))
    assert swapped_prediction(scores, codes, 0.3).item() == pytest.approx(sum(losses) / len(losses), rel=1e-10)


def test_codes_carry_no_gradient() -> None:
    scores = random_scores(6, 3).requires_grad_()
    assert not sinkhorn(scores).requires_grad


def descend(iterations: int) -> Tensor:
    """Embeddings of 64 noisy views by a linear network that SwAV trained, unit norm."""
    torch.manual_seed(0)
    network, prototypes = nn.Linear(16, 8), nn.Parameter(functional.normalize(torch.randn(8, 8), dim=1))
    optimizer = torch.optim.SGD([*network.parameters(), prototypes], lr=1.0)
    x = torch.randn(64, 16)
    for _ in range(200):
        scores = [functional.normalize(network(x + torch.randn_like(x)), dim=1) @ prototypes.T for _ in range(2)]
        optimizer.zero_grad()
        swapped_prediction(scores, [sinkhorn(each, 0.05, iterations) for each in scores], 0.1).backward()
        optimizer.step()
        with torch.no_grad():
            prototypes.copy_(functional.normalize(prototypes, dim=1))
    return functional.normalize(network(x), dim=1).detach() @ prototypes.detach().T


def test_without_sinkhorn_all_images_go_to_few_prototypes_and_with_it_they_do_not() -> None:
    def used(scores: Tensor) -> int:
        return int(scores.argmax(dim=1).unique().numel())

    assert used(descend(iterations=0)) <= 3
    assert used(descend(iterations=3)) >= 6


# --- the module ---------------------------------------------------------------------------------------------------


def views(n: int = 6, seed: int = 0, local: int = 0) -> Views:
    generator = torch.Generator().manual_seed(seed)
    sizes = [16, 16] + [8] * local
    return Views([torch.randn(n, 3, s, s, generator=generator) for s in sizes], torch.arange(n), torch.full((n,), -1))


def make(**kwargs: object) -> SwAV:
    torch.manual_seed(0)
    method = build_method(SwAVConfig(**{"projector": (16, 8), "prototypes": 5, **kwargs}), SMALL)
    assert isinstance(method, SwAV)
    return method


def step(method: SwAV, batch: Views, number: int, epoch: int = 0, lr: float = 0.1) -> Tensor:
    """A step of SGD as the loop makes it; its loss."""
    progress = Progress(number, 10, epoch, number == 0)
    method.before_step(progress)
    out = method(batch)
    out.loss.backward()
    method.after_backward(progress)
    optimizer = torch.optim.SGD(method.parameters(), lr=lr)
    optimizer.step()
    optimizer.zero_grad()
    method.after_step(Progress(number + 1, 10, epoch, number == 0))
    return out.loss.detach()


def test_codes_are_of_the_global_views_and_predictions_of_all() -> None:
    method, batch = make(), views(local=2)
    out = method(batch)
    z = [functional.normalize(method.branch(view)[1], dim=1) for view in batch.views]
    scores = [each @ method.prototypes.T for each in z]
    expected = swapped_prediction(scores, [sinkhorn(each) for each in scores[:2]], 0.1)
    torch.testing.assert_close(out.loss, expected)
    assert len(scores) == 4
    assert 1 <= out.terms["perplexity"] <= 5.001


def test_prototypes_are_of_unit_norm_at_the_beginning_and_after_each_step() -> None:
    method = make(freeze_epochs=0)
    before = method.prototypes.detach().clone()
    torch.testing.assert_close(before.norm(dim=1), torch.ones(5))
    step(method, views(), 0, lr=1.0)
    assert not torch.equal(method.prototypes, before)
    torch.testing.assert_close(method.prototypes.detach().norm(dim=1), torch.ones(5))


def test_prototypes_stand_still_in_the_first_epochs() -> None:
    method = make(freeze_epochs=2)
    before = method.prototypes.detach().clone()
    weight = method.branch.projector[0].weight.detach().clone()
    for epoch in (0, 1):
        step(method, views(), epoch, epoch=epoch)
        torch.testing.assert_close(method.prototypes.detach(), before, rtol=0, atol=1e-7)  # normalised anew
    assert not torch.equal(method.branch.projector[0].weight, weight)
    step(method, views(), 2, epoch=2)
    assert (method.prototypes.detach() - before).abs().max() > 1e-4


def test_queue_holds_each_global_views_latest_embeddings_in_order() -> None:
    method = make(queue=12)
    kept: list[list[Tensor]] = [[], []]
    for number in range(3):
        batch = views(seed=number, local=1)
        with torch.no_grad():
            for view in range(2):
                kept[view].append(functional.normalize(method.branch(batch.views[view])[1], dim=1))
        step(method, batch, number)
    for view, queue in enumerate(method.queues):
        assert int(queue.filled) == 12
        assert int(queue.place) == 6  # the third batch took the first one's place
        torch.testing.assert_close(queue.rows, torch.cat([kept[view][2], kept[view][1]]))


def test_queue_joins_before_the_batch_from_its_epoch_on_and_once_it_is_full() -> None:
    method, batch = make(queue=12, queue_from_epoch=3), views(seed=9)
    step(method, views(seed=1), 0, epoch=3)
    for epoch, full in ((3, False), (2, True), (3, True)):
        if full and epoch == 2:
            step(method, views(seed=2), 1, epoch=2)
        method.before_step(Progress(2, 10, epoch, first=False))
        loss = method(batch).loss
        method._pending.clear()
        scores = [functional.normalize(method.branch(view)[1], dim=1) @ method.prototypes.T for view in batch.views]
        if full and epoch == 3:
            joined = [torch.cat([q.rows @ method.prototypes.T, s]) for q, s in zip(method.queues, scores, strict=True)]
            codes = [sinkhorn(each)[12:] for each in joined]
        else:
            codes = [sinkhorn(each) for each in scores]
        torch.testing.assert_close(loss, swapped_prediction(scores, codes, 0.1))


def test_several_forward_passes_of_a_step_fill_the_queue_in_their_order() -> None:
    method, parts = make(queue=12), [views(3, seed=1), views(3, seed=2)]
    with torch.no_grad():
        expected = [functional.normalize(method.branch(part.views[0])[1], dim=1) for part in parts]
    for part in parts:
        method(part)
    method.after_step(Progress(1, 10))
    torch.testing.assert_close(method.queues[0].rows[:6], torch.cat(expected))


def test_the_diagnostics_look_at_the_assignment_of_the_first_view() -> None:
    method, given = make(), views()
    with torch.no_grad():
        z = functional.normalize(method.branch(given.views[0])[1], dim=1)
        scores = (z @ method.prototypes.T / method.config.temperature).exp()
    torch.testing.assert_close(method(given).assignment, scores / scores.sum(dim=1, keepdim=True))


def test_the_loss_stays_in_float32_under_autocast() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        out = make()(views())
    assert {out.loss.dtype, out.embedding.dtype} == {torch.float32}


# --- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ({"prototypes": 300}, r"prototypes 300 cannot be shared out .* raise method.queue to 256"),
        ({"prototypes": 3000, "queue": 2560}, r"raise method.queue to 2816"),
        ({"prototypes": 100, "queue": 300}, r"queue 300 is no multiple of train.batch_size 256.* take 512"),
        ({"prototypes": 100, "queue_from_epoch": 5}, r"queue_from_epoch is for a queue"),
    ],
)
def test_what_cannot_be_partitioned_is_refused(method: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        PretrainConfig(data="x", method={"name": "swav", **method}, train={"batch_size": 256})


def test_parts_of_a_batch_count_for_the_partition() -> None:
    settings = {"data": "x", "method": {"name": "swav", "prototypes": 200}}
    PretrainConfig(**settings, train={"batch_size": 256})
    with pytest.raises(ValidationError, match="among 128 images in a batch"):
        PretrainConfig(**settings, train={"batch_size": 256, "accumulate": 2})


def test_one_view_is_refused() -> None:
    with pytest.raises(ValidationError, match="SwAV needs 2 global ones"):
        PretrainConfig(data="x", method={"name": "swav", "prototypes": 10}, augment={"views": [{"count": 1}]})
