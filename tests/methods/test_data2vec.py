"""data2vec's targets and loss, and what it needs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from jem.batch import Views
from jem.config import BackboneConfig, Data2vecConfig, MomentumConfig, PretrainConfig
from jem.errors import InputError
from jem.methods import Progress, build_method
from jem.methods.data2vec import Data2vec, contextual_target, masked_loss

SMALL = BackboneConfig(name="vit_tiny", patch=4, masked="token", pool="mean")


def views(seed: int = 0) -> Views:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.tensor([[True, True, False, False], [False, True, False, True], [True, True, True, False]])
    return Views([torch.randn(3, 3, 8, 8, generator=generator)], torch.arange(3), torch.full((3,), -1), [mask])


def make(**changes: object) -> Data2vec:
    torch.manual_seed(0)
    method = build_method(Data2vecConfig(**{"top": 2, **changes}), SMALL)
    assert isinstance(method, Data2vec)
    return method


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 4), p=st.integers(1, 5), d=st.integers(2, 8), top=st.integers(1, 4), seed=st.integers(0, 99))
def test_target_is_the_mean_of_the_last_blocks_each_normalised(n: int, p: int, d: int, top: int, seed: int) -> None:
    blocks = np.random.default_rng(seed).normal(size=(4, n, p, d)) * 3 + 1
    expected = np.zeros((n, p, d))
    for block in blocks[4 - top :]:
        for i in range(n):
            for j in range(p):
                a = block[i, j]
                expected[i, j] += (a - a.mean()) / np.sqrt(a.var() + 1e-5) / top
    found = contextual_target([torch.from_numpy(block) for block in blocks], top)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-9, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 4),
    p=st.integers(1, 5),
    d=st.integers(1, 6),
    beta=st.floats(0.1, 3),
    squared=st.booleans(),
    seed=st.integers(0, 99),
)
def test_loss_counts_the_masked_patches_alone(n: int, p: int, d: int, beta: float, squared: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    f, y, mask = rng.normal(size=(n, p, d)) * 2, rng.normal(size=(n, p, d)), rng.random((n, p)) < 0.5
    expected = 0.0
    for i, j in zip(*np.nonzero(mask), strict=True):
        for x in np.abs(f[i, j] - y[i, j]):
            quadratic = x * x if squared else x * x / 2 / beta
            expected += (quadratic if squared or x <= beta else x - beta / 2) / d
    to = torch.from_numpy
    found = masked_loss(to(f), to(y), to(mask), "l2" if squared else "smooth_l1", beta)
    assert found.item() == pytest.approx(expected, rel=1e-10, abs=1e-12)


def test_student_sees_the_masked_image_and_the_teacher_the_whole() -> None:
    method, given = make(beta=0.5), views()
    ((images, mask),) = given
    assert mask is not None
    out = method(given)
    prediction = method.head(method.student.tokens(images, mask)[:, 1:])
    target = contextual_target([tokens[:, 1:] for tokens in method.teacher.blocks_output(images)], 2)
    expected = masked_loss(prediction, target, mask, "smooth_l1", 0.5) / 7
    assert out.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(out.embedding, target.mean(dim=1))
    assert out.representation.shape == (3, 192)


def test_gradient_reaches_every_parameter_of_the_student_and_none_of_the_teacher() -> None:
    method = make()
    method(views()).loss.backward()
    assert [name for name, p in method.named_parameters() if p.requires_grad and p.grad is None] == []
    assert all(parameter.grad is None for parameter in method.teacher.parameters())


def test_pixels_under_the_mask_do_not_reach_the_prediction() -> None:
    method, given = make(), views()
    hidden = given.views[0].clone()
    hidden[0, :, :4] = 7  # its first row of patches, which is masked
    ((images, mask),) = given
    shown: Tensor = method.student.tokens(images, mask)
    torch.testing.assert_close(method.student.tokens(hidden, mask), shown)
    assert not torch.allclose(method.student.tokens(hidden)[0], method.student.tokens(images)[0])


def test_teacher_follows_with_a_decay_that_rises_linearly_and_then_stays() -> None:
    method = make(momentum=MomentumConfig(tau=0.5, final=0.9, schedule="linear", over=0.5))
    for step, tau in ((25, 0.7), (50, 0.9), (80, 0.9)):
        old = method.teacher.class_token.clone()
        with torch.no_grad():
            method.student.class_token += 1
        method.after_step(Progress(step, 100))
        torch.testing.assert_close(method.teacher.class_token, tau * old + (1 - tau) * method.student.class_token)


@pytest.mark.parametrize(
    ("backbone", "view", "message"),
    [
        ({"name": "resnet18"}, {"size": 32}, r"data2vec needs a ViT, whose patches can be masked, not resnet18"),
        (
            {"name": "vit_tiny", "patch": 8},
            {"size": 32, "mask": {"patch": 8}},
            r"must not be dropped: set backbone.masked to token",
        ),
        ({"name": "vit_tiny", "patch": 8}, {"size": 32}, r"give the view in augment.views a mask"),
        (
            {"name": "vit_tiny", "patch": 8, "masked": "token"},
            {"size": 32, "count": 2, "mask": {"patch": 8}},
            r"makes 2 views, and data2vec takes 1",
        ),
    ],
)
def test_what_cannot_work_is_refused(backbone: dict[str, object], view: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        PretrainConfig(data="x", method={"name": "data2vec"}, backbone=backbone, augment={"views": [view]})


def test_networks_and_views_that_come_without_a_check_are_refused_too() -> None:
    with pytest.raises(InputError, match="needs a ViT"):
        build_method(Data2vecConfig(), BackboneConfig())
    given = views()
    with pytest.raises(InputError, match="the view has none"):
        make()(Views(given.views, given.id, given.label))
