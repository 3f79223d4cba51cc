"""OBoW: bags of the teacher's words, a vocabulary that is a queue, weights made from the words."""

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
from jem.config import BackboneConfig, MomentumConfig, OBoWConfig, PretrainConfig
from jem.errors import InputError
from jem.methods import Progress, build_method
from jem.methods.obow import OBoW, bag_loss, bag_of_words, distances, inner, local_means, perplexity

SMALL = BackboneConfig(stem="stride2")


def tensor(*shape: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape))


# --- bags and words -----------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 4),
    positions=st.integers(1, 5),
    words=st.integers(1, 6),
    c=st.integers(1, 5),
    seed=st.integers(0, 99),
)
def test_bags_are_the_papers(n: int, positions: int, words: int, c: int, seed: int) -> None:
    features, vocabulary = tensor(n, positions, c, seed=seed), tensor(words, c, seed=seed + 1000)
    distance = distances(features, vocabulary)
    assert distance.shape == (n, positions, words)
    delta = 0.7
    bags = []
    for image in features.numpy():
        bag = [0.0] * words
        for feature in image:
            squared = [sum((feature[i] - word[i]) ** 2 for i in range(c)) for word in vocabulary.numpy()]
            likely = [math.exp(-each / delta) for each in squared]
            bag = [max(b, each / sum(likely)) for b, each in zip(bag, likely, strict=True)]
        bags.append([b / sum(bag) for b in bag])
    found = bag_of_words(distance, torch.tensor(delta, dtype=torch.float64))
    np.testing.assert_allclose(found.numpy(), np.array(bags), rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(found.sum(dim=1), torch.ones(n, dtype=torch.float64))


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 6), words=st.integers(1, 6), seed=st.integers(0, 99))
def test_loss_is_the_cross_entropy_with_the_bag(n: int, words: int, seed: int) -> None:
    logits, bag = tensor(n, words, seed=seed), tensor(n, words, seed=seed + 1).softmax(dim=1)
    total = 0.0
    for row, target in zip(logits.numpy(), bag.numpy(), strict=True):
        log_sum = math.log(sum(math.exp(x) for x in row))
        total -= sum(t * (x - log_sum) for t, x in zip(target, row, strict=True))
    assert bag_loss(logits, bag).item() == pytest.approx(total / n, rel=1e-10, abs=1e-12)


def test_a_low_temperature_counts_the_closest_words_and_a_high_one_all() -> None:
    distance = torch.tensor([[[0.0, 1.0, 2.0], [1.0, 0.0, 2.0]]])
    torch.testing.assert_close(bag_of_words(distance, torch.tensor(1e-3)), torch.tensor([[0.5, 0.5, 0.0]]))
    torch.testing.assert_close(bag_of_words(distance, torch.tensor(1e6)), torch.full((1, 3), 1 / 3))


def test_perplexity_counts_the_words_that_are_used() -> None:
    p = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.5, 0.5, 0.0, 0.0], [0.25, 0.25, 0.25, 0.25]])
    torch.testing.assert_close(perplexity(p), torch.tensor([1.0, 2.0, 4.0]))


@pytest.mark.parametrize(("side", "kept"), [(7, 5), (5, 3), (4, 4), (2, 2), (1, 1)])
def test_a_border_is_left_out_where_enough_remains(side: int, kept: int) -> None:
    maps = tensor(2, 3, side, side)
    cut = (side - kept) // 2
    assert torch.equal(inner(maps), maps[:, :, cut : side - cut, cut : side - cut])


@pytest.mark.parametrize(("side", "positions"), [(5, 9), (3, 1), (2, 1), (1, 1)])
def test_words_are_means_of_three_by_three_positions(side: int, positions: int) -> None:
    maps = tensor(2, 4, side, side)
    means = local_means(maps)
    assert means.shape == (2, positions, 4)
    torch.testing.assert_close(means[:, 0], maps[:, :, :3, :3].mean(dim=(2, 3)))
    torch.testing.assert_close(means[:, -1], maps[:, :, -3:, -3:].mean(dim=(2, 3)))


# --- the module ---------------------------------------------------------------------------------------------------


def views(n: int = 6, seed: int = 0, sides: tuple[int, ...] = (48, 32)) -> Views:
    """With the stride-2 stem, the teacher's view of 48 px has maps of 6 x 6 and 3 x 3."""
    generator = torch.Generator().manual_seed(seed)
    images = [torch.randn(n, 3, side, side, generator=generator) for side in sides]
    return Views(images, torch.arange(n), torch.full((n,), -1))


def make(**kwargs: object) -> OBoW:
    torch.manual_seed(0)
    method = build_method(OBoWConfig(**{"words": 12, "generator": 16, **kwargs}), SMALL)
    assert isinstance(method, OBoW)
    return method


def step(method: OBoW, parts: list[Views], number: int) -> None:
    progress = Progress(number, 10)
    method.before_step(progress)
    for part in parts:
        method(part).loss.backward()
    method.after_backward(progress)
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=0.1)
    optimizer.step()
    optimizer.zero_grad()
    method.after_step(Progress(number + 1, 10))


def teacher_maps(method: OBoW, view: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return [inner(level) for level in method.teacher.stages(view)]


def test_loss_is_of_the_first_views_bags_and_all_other_views_predictions() -> None:
    method, batch = make(delta=0.2, kappa=3.0), views(sides=(48, 32, 16))
    progress = Progress(5, 10)
    for vocabulary in method.vocabularies:
        vocabulary.distance.fill_(40.0)
    method.before_step(progress)
    out = method(batch)
    losses = []
    for level, vocabulary, generator in zip(
        teacher_maps(method, batch.views[0]), method.vocabularies, method.generators, strict=True
    ):
        words = vocabulary.queue.rows
        distance = torch.cdist(level.flatten(2).transpose(1, 2), words) ** 2
        share = max(0.01, 9 / 14)  # the sixth step
        mean = (1 - share) * 40 + share * distance.min(dim=2).values.mean()
        bag = bag_of_words(distance, 0.2 * mean)
        weights = functional.normalize(generator(functional.normalize(words, dim=1)), dim=1)
        losses += [bag_loss(3 * method.student(view) @ weights.T, bag).item() for view in batch.views[1:]]
    assert len(losses) == 2 * 2
    assert out.loss.item() == pytest.approx(np.mean(losses), rel=1e-4)
    assert torch.equal(out.embedding, method.student(batch.views[1]))
    for stage in ("third", "last"):
        image, whole = out.terms[f"perplexity_image_{stage}"], out.terms[f"perplexity_batch_{stage}"]
        assert 1 <= image <= whole + 1e-3
        assert whole <= 12.001


def test_the_teacher_gets_no_gradient_and_the_student_and_generators_do() -> None:
    method = make()
    method(views()).loss.backward()
    assert all(p.grad is None and not p.requires_grad for p in method.teacher.parameters())
    trained = [*method.student.parameters(), *method.generators.parameters()]
    assert all(p.grad is not None for p in trained)
    assert len(trained) == sum(p.requires_grad for p in method.parameters())


def test_the_teacher_follows_the_student_after_the_step() -> None:
    method = make(momentum=MomentumConfig(tau=0.9, schedule="constant"))
    before = [p.detach().clone() for p in method.teacher.parameters()]
    step(method, [views()], 0)
    for target, old, online in zip(method.teacher.parameters(), before, method.student.parameters(), strict=True):
        torch.testing.assert_close(target, 0.9 * old + 0.1 * online.detach())


def test_each_image_gives_one_word_which_takes_the_place_of_the_oldest() -> None:
    method = make()
    before = [vocabulary.queue.rows.clone() for vocabulary in method.vocabularies]
    batch = views()
    candidates = [local_means(level) for level in teacher_maps(method, batch.views[0])]
    step(method, [batch], 0)
    drawn = Progress(0, 10).generator()
    for vocabulary, old, means in zip(method.vocabularies, before, candidates, strict=True):
        picks = torch.randint(means.shape[1], (6,), generator=drawn)
        torch.testing.assert_close(vocabulary.queue.rows[:6], means[torch.arange(6), picks])
        assert torch.equal(vocabulary.queue.rows[6:], old[6:])
    step(method, [views(seed=1)], 1)
    kept = [vocabulary.queue.rows.clone() for vocabulary in method.vocabularies]
    step(method, [views(seed=2)], 2)
    for vocabulary, old in zip(method.vocabularies, kept, strict=True):
        assert not torch.isclose(vocabulary.queue.rows[:6], old[:6]).all(dim=1).any()
        assert torch.equal(vocabulary.queue.rows[6:], old[6:])


def test_the_words_that_it_begins_with_are_random_and_not_negative() -> None:
    for vocabulary in make().vocabularies:
        words = vocabulary.queue.rows
        assert words.min() == 0
        assert (words > 0).double().mean().item() == pytest.approx(0.5, abs=0.05)


def test_the_mean_distance_is_a_moving_average_that_forgets_its_beginning() -> None:
    method, expected = make(), [0.0, 0.0]
    for number in range(3):
        batch = views(seed=number)
        for level, (maps, vocabulary) in enumerate(
            zip(teacher_maps(method, batch.views[0]), method.vocabularies, strict=True)
        ):
            distance = torch.cdist(maps.flatten(2).transpose(1, 2), vocabulary.queue.rows) ** 2
            share = 9 / (number + 9)
            expected[level] += share * (distance.min(dim=2).values.mean().item() - expected[level])
        step(method, [batch], number)
        assert [vocabulary.distance.item() for vocabulary in method.vocabularies] == pytest.approx(expected, rel=1e-4)


def test_several_forward_passes_of_a_step_give_their_words_in_order() -> None:
    method, parts = make(), [views(3, seed=1), views(3, seed=2)]
    candidates = [[local_means(level) for level in teacher_maps(method, part.views[0])] for part in parts]
    step(method, parts, 0)
    drawn = Progress(0, 10).generator()
    for part, levels in enumerate(candidates):
        for means, vocabulary in zip(levels, method.vocabularies, strict=True):
            picks = torch.randint(means.shape[1], (3,), generator=drawn)
            found = vocabulary.queue.rows[3 * part : 3 * part + 3]
            torch.testing.assert_close(found, means[torch.arange(3), picks])


def test_under_autocast_bags_and_loss_are_in_float32() -> None:
    method = make()
    with torch.autocast("cpu", torch.bfloat16):
        out = method(views())
    out.loss.backward()
    assert {out.loss.dtype, *(term.dtype for term in out.terms.values())} == {torch.float32}
    assert {words.dtype for vocabulary in method.vocabularies for words, _ in vocabulary.pending} == {torch.float32}


# --- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vit_tiny", "timm:resnet18"])
def test_a_backbone_without_feature_maps_is_refused(name: str) -> None:
    with pytest.raises(ValidationError, match=f"backbone.name {name} has no feature maps of two stages"):
        PretrainConfig(data="x", method={"name": "obow"}, backbone={"name": name})


def test_a_backbone_without_feature_maps_cannot_be_built_either() -> None:
    with pytest.raises(InputError, match="needs the feature maps of two stages"):
        build_method(OBoWConfig(), BackboneConfig(name="vit_tiny", patch=4))


def test_words_that_a_batch_does_not_divide_are_refused() -> None:
    with pytest.raises(ValidationError, match=r"words 1000 is no multiple of train.batch_size 256.* take 1024"):
        PretrainConfig(data="x", method={"name": "obow", "words": 1000}, train={"batch_size": 256})
