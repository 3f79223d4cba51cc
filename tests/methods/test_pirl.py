"""PIRL's loss is the paper's, its bank follows the images' ids, and its jigsaw is made of patches in a drawn order."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor
from torch.nn import functional

from jem.batch import Views
from jem.config import BackboneConfig, PIRLConfig, PretrainConfig
from jem.errors import InputError
from jem.methods import Progress, build_method
from jem.methods.patches import cut_patches
from jem.methods.pirl import PIRL, SHARE, nce

SMALL = BackboneConfig(stem="stride2", zero_init=False)
close = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-12)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def unit(*shape: int, seed: int = 0) -> Tensor:
    return functional.normalize(randn(*shape, seed=seed), dim=-1)


# --- the loss -----------------------------------------------------------------------------------------------------


def paper(v: np.ndarray, positive: np.ndarray, negatives: list[np.ndarray], temperature: float) -> float:
    """L(m_I, v) of one image (equation 4): -log h of the positive, and -log(1 - h) of each negative."""

    def similarity(m: np.ndarray) -> float:
        return math.exp(float(m @ v) / float(np.linalg.norm(m) * np.linalg.norm(v)) / temperature)

    below = similarity(positive) + sum(similarity(m) for m in negatives)
    return -math.log(similarity(positive) / below) - sum(math.log(1 - similarity(m) / below) for m in negatives)


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 5), d=st.integers(2, 6), count=st.integers(1, 8), temperature=st.floats(0.2, 2))
def test_loss_is_the_papers_without_an_images_own_row(n: int, d: int, count: int, temperature: float) -> None:
    bank, v = unit(6, d, seed=d), randn(n, d, seed=n)
    ids = torch.arange(n)
    drawn = torch.randint(6, (count,), generator=torch.Generator().manual_seed(count))
    expected = [
        paper(v[i].numpy(), bank[i].numpy(), [bank[j].numpy() for j in drawn.tolist() if j != i], temperature)
        for i in range(n)
    ]
    found = nce(v, bank[ids], bank[drawn], ids[:, None] == drawn, temperature)
    assert found.item() == pytest.approx(np.mean(expected), rel=1e-9, abs=1e-12)


def test_gradient_is_that_of_the_loss() -> None:
    bank, own = unit(5, 3), torch.eye(2, 5, dtype=torch.bool)
    v = randn(2, 3, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: nce(x, bank[:2], bank, own, 0.5), v)


def test_a_negative_that_is_nearest_by_far_costs_no_infinity() -> None:
    v = torch.tensor([[1.0, 0.0]], requires_grad=True)
    loss = nce(v, -v.detach(), torch.cat([v.detach(), -v.detach()]), torch.tensor([[False, True]]), 0.01)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(v.grad).all()


# --- the module ---------------------------------------------------------------------------------------------------


def make(images: int = 6, **settings: Any) -> PIRL:
    torch.manual_seed(0)
    settings = {"projector": (4,), "patch_size": 5, "negatives": 7, **settings}
    method = build_method(PIRLConfig(**settings), SMALL, images=images).double()
    assert isinstance(method, PIRL)
    return method


def views(ids: list[int], seed: int = 0) -> Views:
    n = len(ids)
    return Views(list(randn(2, n, 3, 18, 18, seed=seed)), torch.tensor(ids), torch.full((n,), -1))


def test_loss_weighs_jigsaw_and_image_against_the_bank_before_this_step() -> None:
    method, given = make(lam=0.3), views([4, 0, 2])
    method.before_step(Progress(2, 10))
    out = method(given)
    image = method.branch(given.views[0])[1]
    generator = Progress(2, 10).generator()
    patches = cut_patches(given.views[1], 5, generator, SHARE)
    each = method.patch_projector(method.backbone(patches.flatten(0, 1))).view(3, 9, 4)
    orders = torch.rand(3, 9, generator=generator).argsort(dim=1)
    jigsaw = method.jigsaw(torch.stack([torch.cat([one[i] for i in o]) for one, o in zip(each, orders, strict=True)]))
    drawn = torch.randint(6, (7,), generator=generator)

    def loss(v: Tensor) -> float:
        rows = method.bank.rows.numpy()
        return np.mean(
            [
                paper(v[i].detach().numpy(), rows[own], [rows[j] for j in drawn.tolist() if j != own], 0.07)
                for i, own in enumerate([4, 0, 2])
            ]
        )

    # the rows were normalised in float32
    assert out.terms["jigsaw"].item() == pytest.approx(loss(jigsaw), rel=1e-6)
    assert out.terms["image"].item() == pytest.approx(loss(image), rel=1e-6)
    assert out.loss.item() == pytest.approx(0.3 * loss(jigsaw) + 0.7 * loss(image), rel=1e-6)
    close(out.embedding, image.detach())


def test_the_bank_starts_with_random_unit_rows_and_follows_the_ids() -> None:
    method = make()
    expected = method.bank.rows.clone()
    assert expected.std() > 0.1
    close(expected.norm(dim=1), torch.ones(6, dtype=torch.float64), rtol=1e-6, atol=0)
    for number, ids in enumerate(([0, 3, 5], [5, 1, 0], [3, 2, 1])):
        given = views(ids, seed=number)
        method.before_step(Progress(number, 3))
        method(given)
        embedding = functional.normalize(method.branch(given.views[0])[1], dim=1).detach()
        for place, own in enumerate(ids):
            row = 0.5 * expected[own] + 0.5 * embedding[place]
            expected[own] = row / row.norm()
        method.after_step(Progress(number + 1, 3))
        close(method.bank.rows, expected)
    assert method.bank.seen.tolist() == [True, True, True, True, False, True]
    assert method.pending == []


def test_parts_of_an_accumulated_batch_all_reach_the_bank_and_a_momentum_of_0_keeps_nothing() -> None:
    method, given = make(bank_momentum=0.0), views([1, 4, 3, 0])
    method.before_step(Progress(0, 3))
    embeddings = []
    for part in range(2):
        images = [view.chunk(2)[part] for view in given.views]
        method(Views(images, given.id.chunk(2)[part], given.label.chunk(2)[part]))
        embeddings.append(functional.normalize(method.branch(images[0])[1], dim=1).detach())
    method.after_step(Progress(1, 3))
    close(method.bank.rows[given.id], torch.cat(embeddings))


def test_patches_are_shuffled_anew_for_each_image_and_step() -> None:
    """The last layer tells places apart, so one image many times gives as many jigsaws."""
    method = make().eval()
    image = randn(1, 3, 18, 18).expand(5, -1, -1, -1)

    def jigsaws(step: int) -> Tensor:
        method.before_step(Progress(step, 10))
        return method.jigsaw_embedding(image)

    first = jigsaws(0)
    assert torch.cdist(first, first).add(torch.eye(5)).min() > 1e-6
    assert torch.equal(first, jigsaws(0))
    assert not torch.allclose(first, jigsaws(1))


@pytest.mark.parametrize("norm", [False, True])
def test_norm_keeps_the_mean_of_both_heads_at_0(norm: bool) -> None:
    method, given = make(norm=norm), views([0, 1, 2, 3])
    for embedding in (method.branch(given.views[0])[1], method.jigsaw_embedding(given.views[1])):
        assert (embedding.mean(dim=0).norm() < 1e-9).item() is norm


def test_every_part_learns() -> None:
    method = make()
    method(views([0, 1, 2, 3])).loss.backward()
    assert all(p.grad is not None and p.grad.norm() > 0 for p in method.parameters())


# --- what is refused ----------------------------------------------------------------------------------------------


def test_a_bank_needs_the_number_of_images_and_ids_within_it() -> None:
    with pytest.raises(InputError, match="size is not known"):
        build_method(PIRLConfig(), SMALL)
    method = make()
    method.before_step(Progress(0, 3))
    with pytest.raises(InputError, match="has 6 images and an id 6"):
        method(views([0, 6]))


def test_a_mask_of_the_jigsaws_view_is_refused() -> None:
    given = views([0, 1])
    masks = [None, torch.zeros(2, 4, dtype=torch.bool)]
    with pytest.raises(InputError, match="cannot be masked"):
        make()(Views(given.views, given.id, given.label, masks))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"augment": {"views": [{"size": 32}, {"size": 8}]}}, "second of augment.views has 8 pixels"),
        (
            {"backbone": {"name": "vit_tiny"}, "method": {"name": "pirl", "patch_size": 60}},
            "patch_size 60 is not a multiple of backbone.patch 16",
        ),
        (
            {
                "augment": {"views": [{"count": 2, "mask": {}}]},
                "backbone": {"name": "vit_tiny"},
            },
            "give a mask to the first only",
        ),
        ({"augment": {"views": [{"count": 3}]}}, "exactly 2 views for PIRL"),
        ({"method": {"name": "pirl", "lam": 1.5}}, "less than or equal to 1"),
    ],
)
def test_what_cannot_work_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        PretrainConfig.model_validate({"data": "somewhere", "method": {"name": "pirl"}, **changes})
