"""OBoW: predict the bag of visual words that a momentum teacher sees in an image, from other views of it.

Gidaris, Bursuc, Puy, Komodakis, Cord, Perez, "OBoW: Online Bag-of-Visual-Words Generation for Self-Supervised
Learning", CVPR 2021. For each of two levels, the maps of the network's last two stages, with words v_1, v_2, ...:

    q_k(u) = softmax_k(-|f(u) - v_k|^2 / delta)     soft assignment of the teacher's feature f at the position u
    bag_k  = max_u q_k(u), divided by its sum over k
    p      = softmax_k(kappa y . G(v_k))            by the student, from its representation y of another view
    loss   = mean over levels, views and images of  -sum_k bag_k log p_k

The temperature delta is `config.delta` times the mean squared distance of a feature to its closest word, a moving
average. G makes unit-norm weights of unit-norm words, so new words need no new weights. The words are a queue: in each
step one feature per image, averaged over 3 x 3 positions, takes the place of the oldest. They begin at random, as the
published code's, max(0, normal): features come from a ReLU. After words / batch steps all are features.

The teacher sees the first view alone, which may be a mild one, and the student all others; they do not change roles. As
in the published code, a map's border is left out (where at least 3 x 3 positions remain; small images have fewer). It
adds up the mean losses of the crops of each size, where this takes the mean over all crops (a rate that was tuned for
two sizes is to be doubled). Its moving average (0.99) begins at 0.5, this forgets its beginning faster.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from jem.device import put
from jem.distributed import all_reduce_mean, world
from jem.errors import InputError
from jem.methods.base import Method, Progress, StepOutput, at_least_float32, everyones, mine
from jem.models.backbones import Backbone, ResNet, build_backbone
from jem.models.heads import mlp
from jem.models.memory import Queue
from jem.models.momentum import decay, follow, momentum_copy

if TYPE_CHECKING:
    from jem.batch import Views
    from jem.config import BackboneConfig, OBoWConfig

STAGES = ("third", "last")


def inner(maps: Tensor) -> Tensor:
    """Feature maps (n, c, h, w) without their border, which sees the padding, if 3 x 3 positions are left."""
    return maps[:, :, 1:-1, 1:-1] if min(maps.shape[2:]) >= 5 else maps


def local_means(maps: Tensor) -> Tensor:
    """Features that can become words, (n, positions, c): means over 3 x 3 of (n, c, h, w), or what there is."""
    height, width = maps.shape[2:]
    return functional.avg_pool2d(maps, (min(3, height), min(3, width)), stride=1).flatten(2).transpose(1, 2)


def distances(features: Tensor, words: Tensor) -> Tensor:
    """Squared distances of features (n, positions, c) to words (K, c): (n, positions, K)."""
    squares = features.square().sum(dim=2, keepdim=True) + words.square().sum(dim=1)
    return (squares - 2 * features @ words.T).clamp(min=0)


def bag_of_words(distance: Tensor, delta: Tensor) -> Tensor:
    """Bags (n, K), which sum to 1, of the squared distances (n, positions, K) with the temperature `delta`."""
    bag = (-distance / delta).softmax(dim=2).amax(dim=1)
    return bag / bag.sum(dim=1, keepdim=True)


def bag_loss(logits: Tensor, bag: Tensor) -> Tensor:
    """Mean cross entropy of the predicted words, (n, K) logits, with the bags, (n, K)."""
    return -(bag * logits.log_softmax(dim=1)).sum(dim=1).mean()


def perplexity(p: Tensor) -> Tensor:
    """How many words a distribution uses, exp of its entropy: (..., K) to (...)."""
    return cast("Tensor", torch.special.entr(p)).sum(dim=-1).exp()


class Vocabulary(nn.Module):
    """The words of one level, and the mean distance of features to them."""

    distance: Tensor
    """Scalar: moving average of the mean squared distance of a feature to its closest word."""

    def __init__(self, words: int, dim: int) -> None:
        super().__init__()
        self.queue = Queue(words, dim)
        self.queue.rows.normal_().clamp_(min=0)
        self.register_buffer("distance", torch.zeros(()))
        self.pending: list[tuple[Tensor, Tensor]] = []

    def forward(self, maps: Tensor, delta: float, pace: float, generator: torch.Generator) -> Tensor:
        """Bags (n, K) of this worker's teacher maps (n, c, h, w); leaves what `update` needs."""
        maps = inner(at_least_float32(maps))
        distance = distances(maps.flatten(2).transpose(1, 2), self.queue.rows)
        closest = all_reduce_mean(distance.amin(dim=2).mean())
        means = local_means(maps)
        drawn = put(mine(torch.randint(means.shape[1], (len(means) * world(),), generator=generator)), maps.device)
        rows = torch.arange(len(means), device=maps.device)
        self.pending.append((everyones(means[rows, drawn]), closest))
        return bag_of_words(distance, delta * self.distance.lerp(closest, pace))

    @torch.no_grad()
    def update(self, pace: float) -> None:
        """Take the words of the step's forward passes, and their distance with the weight `pace`."""
        words, closest = zip(*self.pending, strict=True)
        self.queue.put(torch.cat(words))
        self.distance.lerp_(torch.stack(closest).mean(), pace)
        self.pending.clear()


class OBoW(Method):
    """Student, momentum teacher, and for each level a vocabulary and the generator of its words' weights."""

    config: OBoWConfig

    def __init__(self, config: OBoWConfig, backbone: BackboneConfig) -> None:
        super().__init__(config)
        student = build_backbone(backbone)
        if not isinstance(student, ResNet):
            raise InputError(f"method obow needs the feature maps of two stages, which {backbone.name} does not have")
        self.student = student
        self.teacher = momentum_copy(student)
        widths = (student.dim // 2, student.dim)
        self.vocabularies = nn.ModuleList(Vocabulary(config.words, width) for width in widths)
        hidden = config.generator or 2 * student.dim
        self.generators = nn.ModuleList(mlp((width, hidden, student.dim)) for width in widths)
        self._pace = 1.0

    @property
    def backbone(self) -> Backbone:
        """The student."""
        return self.student

    def before_step(self, progress: Progress) -> None:
        """Let the average distances forget fast at the beginning, when the words are still random."""
        super().before_step(progress)
        self._pace = max(0.01, 9 / (progress.step + 9))

    def forward(self, views: Views) -> StepOutput:
        """OBoW of the teacher's view, the first, and the student's, all others."""
        teachers, *students = views
        representations = self.student.each(students)
        with torch.no_grad():
            maps = self.teacher.stages(teachers[0])
        terms: dict[str, Tensor] = {}
        losses = []
        with torch.autocast(maps[0].device.type, enabled=False):
            for stage, level, vocabulary, generator in zip(
                STAGES, maps, self.vocabularies, self.generators, strict=True
            ):
                # each worker generates the weights of its part of the words, so that the batch norm sees each once
                words = mine(cast("Vocabulary", vocabulary).queue.rows.clone())
                weights = everyones(functional.normalize(generator(functional.normalize(words, dim=1)), dim=1))
                with torch.no_grad():
                    bag = vocabulary(level, self.config.delta, self._pace, self.generator)
                    terms[f"perplexity_batch_{stage}"] = perplexity(all_reduce_mean(bag.mean(dim=0)))
                    terms[f"perplexity_image_{stage}"] = all_reduce_mean(perplexity(bag).mean())
                losses += [bag_loss(self.config.kappa * at_least_float32(y) @ weights.T, bag) for y in representations]
            # the mean over the workers of each one's images is that over the global batch, and so is its gradient
            loss = all_reduce_mean(torch.stack(losses).mean())
        return self.output(loss, representations, representations[0], {"words": loss} | terms)

    def after_step(self, progress: Progress) -> None:
        """Let the teacher follow, and the batch's words take the place of the oldest."""
        follow(self.teacher, self.student, decay(self.config.momentum, progress.share))
        for vocabulary in self.vocabularies:
            cast("Vocabulary", vocabulary).update(self._pace)
