"""Small configurations of every method, for the tests that all of them must pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from jem.batch import Views
from jem.config import (
    BackboneConfig,
    BarlowConfig,
    BYOLConfig,
    Data2vecConfig,
    DeepClusterConfig,
    DenoisingConfig,
    DINOConfig,
    DirectPredConfig,
    JigsawConfig,
    MarginConfig,
    MethodSettings,
    MoCoConfig,
    MoCoV3Config,
    MomentumConfig,
    OBoWConfig,
    PIRLConfig,
    RegulariseConfig,
    RotationConfig,
    SimCLRConfig,
    SimSiamConfig,
    SupervisedConfig,
    SwAVConfig,
    TripletConfig,
    VICRegConfig,
    WMSEConfig,
)
from jem.distributed import rank, world
from jem.methods import Method, Progress, build_method
from jem.models.backbones import Backbone

# half a million parameters: a ResNet-18 has 11 million, and every case is kept for the comparison
SMALL = BackboneConfig(name="timm:test_resnet")
# zero_init would leave most of the gradient zero at the first step
CIFAR = BackboneConfig(stem="cifar", zero_init=False)
STRIDE = BackboneConfig(stem="stride2", zero_init=False)
VIT = BackboneConfig(name="vit_tiny", patch=4)
TOKENS = BackboneConfig(name="vit_tiny", patch=4, masked="token", pool="mean")
BATCH, SIDE, LOCAL_SIDE, STEPS, CLASSES = 12, 8, 6, 3, 4


@dataclass(frozen=True)
class Case:
    """A method's settings, and what it is trained on: `STEPS` steps, each an epoch of one batch of `BATCH` images."""

    config: MethodSettings
    backbone: BackboneConfig = SMALL
    views: int = 2
    local: int = 0
    """Local views, of `LOCAL_SIDE` pixels."""
    side: int = SIDE
    masked: bool = False
    """Half of a ViT's patches are masked in the first view."""
    gradient_at: int = 1
    """The step whose gradient is compared: in the first one the small network's residual branches have none."""
    without_gradient: tuple[str, ...] = ()
    """Beginnings of the names of parameters that this step leaves alone."""

    joint: bool = False
    """As `train.joint_views`."""

    def build(self) -> Method:
        """The method in float64; the same weights each time."""
        torch.manual_seed(0)
        method = build_method(self.config, self.backbone, CLASSES, BATCH).double()  # type: ignore[arg-type]
        for module in method.modules():
            if isinstance(module, Backbone):
                module.joint = module.joint or self.joint
        return method

    def batch(self, step: int) -> Views:
        """The global batch of a step: the same images' ids in another order, other views."""
        generator = torch.Generator().manual_seed(step)

        def view(side: int) -> Tensor:
            return torch.randn(BATCH, 3, side, side, generator=generator, dtype=torch.float64)

        views = [view(self.side) for _ in range(self.views)] + [view(LOCAL_SIDE) for _ in range(self.local)]
        # the labels that are missing (-1) are more on one worker than on the other
        label = torch.arange(BATCH) % CLASSES
        label[:3] = -1
        masks: list[Tensor | None] | None = None
        if self.masked:
            patches = (self.side // self.backbone.patch) ** 2
            order = torch.rand(BATCH, patches, generator=generator).argsort(dim=1)
            masks = [order < patches // 2, *([None] * (len(views) - 1))]
        return Views(views, torch.randperm(BATCH, generator=generator), label, masks)

    def step(self, learner: torch.nn.Module, method: Method, optimizer: torch.optim.Optimizer, step: int) -> Any:
        """One step as the loop makes it, of this worker's part; the output and the gradient of each parameter."""
        progress = Progress(step, STEPS, step, True, 0)
        torch.manual_seed(100 * step + rank())  # what a method draws here would differ between workers
        method.train()
        method.before_step(progress)
        out = learner(part(self.batch(step)))
        out.loss.backward()
        gradient = {
            name: p.grad.clone() if p.grad is not None else torch.zeros_like(p)
            for name, p in method.named_parameters()
            if p.requires_grad
        }
        method.after_backward(progress)
        optimizer.step()
        optimizer.zero_grad()
        method.after_step(Progress(step + 1, STEPS, step, True, 0))
        return out, gradient


def part(whole: Views) -> Views:
    """This worker's part of a global batch."""

    def own(x: Tensor) -> Tensor:
        return x.chunk(world())[rank()]

    masks = None if whole.masks is None else [None if mask is None else own(mask) for mask in whole.masks]
    return Views([own(view) for view in whole.views], own(whole.id), own(whole.label), masks)


CASES: dict[str, Case] = {
    "vicreg": Case(VICRegConfig(expander=(16, 8))),
    "vicreg, embedding wider than the batch": Case(VICRegConfig(expander=(16, 32))),
    "vicreg, separate branches": Case(VICRegConfig(expander=(16, 8), branches="separate")),
    "vicreg, two architectures": Case(VICRegConfig(expander=(16, 8), branches=(STRIDE, CIFAR))),
    # a batch norm in the head takes out the bias of a ViT's last norm, which leaves it no gradient to compare
    "vicreg, masked ViT and a ResNet": Case(
        VICRegConfig(lam=1.0, mu=1.0, nu=0.04, expander=(8,), branches=(TOKENS, STRIDE)), backbone=TOKENS, masked=True
    ),
    "vicreg, hinge on the variance": Case(VICRegConfig(expander=(16, 8), hinge="variance")),
    "barlow": Case(BarlowConfig(projector=(16, 8), scale=0.1)),
    "barlow, with variance and covariance terms": Case(
        BarlowConfig(projector=(16, 8), regularise=RegulariseConfig(mu=2.0, nu=1.5))
    ),
    "barlow, embedding wider than the batch": Case(BarlowConfig(projector=(16, 32), scale=0.1)),
    "wmse": Case(WMSEConfig(projector=(16, 4), sub_batch=6, partitions=2)),
    "wmse, one sub-batch, multi-crop": Case(WMSEConfig(projector=(16, 4), sub_batch=12, epsilon=0.0), local=2),
    "simclr": Case(SimCLRConfig(projector=(16, 8))),
    "simclr, joint views": Case(SimCLRConfig(projector=(16, 8)), joint=True),
    "simclr, ViT": Case(SimCLRConfig(projector=(8,)), backbone=VIT),
    "simclr, masked ViT": Case(SimCLRConfig(projector=(8,)), backbone=VIT, masked=True),
    "simclr, with variance and covariance terms": Case(
        SimCLRConfig(projector=(16, 8), temperature=0.5, regularise=RegulariseConfig())
    ),
    "moco": Case(MoCoConfig(projector=(16, 8), queue=24, norm_groups=2)),
    "moco, symmetric, two groups each": Case(
        MoCoConfig(projector=(16, 8), queue=48, symmetric=True, norm_groups=4, regularise=RegulariseConfig())
    ),
    "moco, v1's head, not shuffled": Case(MoCoConfig(projector=(8,), queue=12, norm_groups=1)),
    "moco, m = 0": Case(
        MoCoConfig(projector=(16, 8), queue=24, norm_groups=2, momentum=MomentumConfig(tau=0.0, schedule="constant"))
    ),
    "moco, symmetric, masked": Case(
        # a norm in the projector would take out the backbone's last bias, and leave it without a gradient
        MoCoConfig(projector=(8,), queue=24, symmetric=True, norm_groups=2),
        TOKENS,
        masked=True,
    ),
    "moco, memory bank": Case(MoCoConfig(projector=(16, 8), queue=24, norm_groups=2, momentum=None)),
    "moco, memory bank, not shuffled": Case(MoCoConfig(projector=(16, 8), queue=24, norm_groups=1, momentum=None)),
    "mocov3": Case(MoCoV3Config(projector=(16, 8), predictor=(16,))),
    "pirl": Case(PIRLConfig(projector=(8,), patch_size=5, negatives=20), side=18),
    "pirl, heads that end in a batch norm": Case(
        PIRLConfig(projector=(8,), norm=True, patch_size=5, negatives=20), side=18
    ),
    "pirl, heads of two layers, patches resized": Case(
        PIRLConfig(projector=(16, 8), patch_size=6, negatives=5, lam=0.3, bank_momentum=0.0), side=18
    ),
    "swav": Case(SwAVConfig(projector=(16, 8), prototypes=6)),
    "swav, multi-crop": Case(SwAVConfig(projector=(16, 8), prototypes=6, freeze_epochs=0), local=2),
    "swav, queue": Case(SwAVConfig(projector=(16, 8), prototypes=20, queue=24, queue_from_epoch=1), gradient_at=2),
    "swav, without Sinkhorn": Case(SwAVConfig(projector=(16, 8), prototypes=6, iterations=0)),
    "swav, with variance and covariance terms": Case(
        SwAVConfig(projector=(16, 8), prototypes=6, regularise=RegulariseConfig()), local=1
    ),
    "deepcluster": Case(DeepClusterConfig(projector=(16, 8), prototypes=(3, 5)), gradient_at=2),
    "deepcluster, multi-crop": Case(DeepClusterConfig(projector=(16, 8), prototypes=(4,)), local=2, gradient_at=2),
    "deepcluster, original": Case(
        DeepClusterConfig(projector=(16, 8), prototypes=(3, 5), alternation="original"), gradient_at=2
    ),
    "obow": Case(OBoWConfig(words=24, generator=16), backbone=CIFAR, side=16),
    "obow, multi-crop": Case(OBoWConfig(words=12, generator=16), backbone=CIFAR, local=2, gradient_at=1),
    "byol": Case(BYOLConfig(projector=(16, 8), predictor=(16,))),
    "byol, no predictor, with variance and covariance terms": Case(
        BYOLConfig(projector=(16, 8), predictor=None, norm=False, regularise=RegulariseConfig(mu=2.0, nu=1.5))
    ),
    "byol, without stop-gradient": Case(BYOLConfig(projector=(16, 8), predictor=(), stop_gradient=False)),
    "byol, scaled target": Case(BYOLConfig(projector=(16, 8), predictor=(16,), target="scaled", scale=0.5)),
    "byol, tau = 0": Case(
        BYOLConfig(projector=(16, 8), predictor=(16,), momentum=MomentumConfig(tau=0.0, schedule="constant"))
    ),
    "byol, tau = 1": Case(
        BYOLConfig(projector=(16, 8), predictor=(16,), momentum=MomentumConfig(tau=1.0, schedule="constant"))
    ),
    "simsiam": Case(SimSiamConfig(projector=(16, 8, 8), predictor=5)),
    "simsiam, no predictor, with variance and covariance terms": Case(
        SimSiamConfig(projector=(16, 8), predictor=None, norm=False, regularise=RegulariseConfig())
    ),
    "simsiam, without stop-gradient": Case(SimSiamConfig(projector=(16, 16, 8), predictor=4, stop_gradient=False)),
    "directpred": Case(DirectPredConfig(projector=(16, 8)), gradient_at=2),
    "directpred, no momentum": Case(DirectPredConfig(projector=(16, 8), momentum=None, every=2), gradient_at=2),
    "directpred, with variance and covariance terms": Case(
        DirectPredConfig(projector=(16, 8), regularise=RegulariseConfig())
    ),
    "dino": Case(DINOConfig(projector=(16, 8), prototypes=10, warmup_epochs=2), local=2),
    "dino, joint views": Case(DINOConfig(projector=(16, 8), prototypes=10), local=2, joint=True, gradient_at=1),
    "dino, batch norm, no centring, the student's encoder": Case(
        DINOConfig(projector=(16, 8), prototypes=10, norm=True, centring=False, freeze_epochs=0, encoder="student"),
        gradient_at=2,
    ),
    "dino, with variance and covariance terms": Case(
        DINOConfig(projector=(16, 8), prototypes=10, regularise=RegulariseConfig()), local=1, gradient_at=1
    ),
    "data2vec": Case(Data2vecConfig(top=3), backbone=TOKENS, views=1, masked=True),
    "data2vec, squared, with variance and covariance terms": Case(
        Data2vecConfig(top=2, loss="l2", regularise=RegulariseConfig()), backbone=TOKENS, views=1, masked=True
    ),
    "supervised": Case(SupervisedConfig(label_smoothing=0.1)),
    "denoising": Case(DenoisingConfig(decoder=(16, 8)), views=1),
    "jigsaw": Case(JigsawConfig(permutations=8, patch=6, classifier=(16,)), views=1, side=18),
    "jigsaw, patches as they are": Case(
        JigsawConfig(permutations=8, patch=5, normalise=False, classifier=()), views=1, side=18
    ),
    "rotation": Case(RotationConfig(), views=1),
    "rotation, a random one": Case(RotationConfig(rotations="random"), views=1),
    "triplet": Case(TripletConfig(projector=(16, 8))),
    "triplet, hardest, euclidean": Case(TripletConfig(projector=(16, 8), distance="euclidean", negatives="hardest")),
    "margin": Case(MarginConfig(projector=(16, 8))),
    "margin, embeddings as they are": Case(MarginConfig(projector=(16, 8), margin=3.0, normalise=False)),
}
