"""A step of which nothing is told reads nothing from the device: the host runs ahead of it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from jem.config import AdamWConfig, TrainConfig, VICRegConfig
from jem.data.plan import Plan
from jem.methods.base import Method, Progress, StepOutput
from jem.train.loop import _step
from jem.train.optimizers import build_optimizer
from jem.train.watch import Watch
from tests.methods.cases import CASES, STEPS, part

PLAN = Plan([12], seed=0, batch_size=12, world=1)

aten = torch.ops.aten
READS = {
    aten._local_scalar_dense,  # item, tolist, float(), int(), bool()
    aten.is_nonzero,
    aten.equal,
    aten.nonzero,  # the rest have a result whose size depends on the values
    aten.masked_select,
    aten.unique_dim,
    aten.unique_consecutive,
    aten._unique2,
    aten.repeat_interleave,
    aten._linalg_eigh,  # whether they have failed
    aten._linalg_svd,
    aten.linalg_eig,
}
FETCHES = {Tensor.tolist, Tensor.numpy, Tensor.cpu}
"""On a CPU these reach no operation."""
WAITS = {
    # to leave patches out it must be known how many there are
    "simclr, masked ViT": {"_local_scalar_dense"},
    # the eigenvectors of the embeddings' correlation, in every `every` steps
    "directpred": {"_linalg_eigh"},
    "directpred, no momentum": {"_linalg_eigh"},
    "directpred, with variance and covariance terms": {"_linalg_eigh"},
}


class Reads(TorchDispatchMode):
    """Notes each operation for whose result the host would wait, were the tensors on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        masks = [x for x in tree_leaves(args[1:]) if isinstance(x, Tensor) and x.dtype == torch.bool]
        by_mask = masks and func.overloadpacket in {aten.index, aten.index_put, aten.index_put_}
        by_counts = func.overloadpacket != aten.repeat_interleave or isinstance(args[0], Tensor)
        if by_mask or (func.overloadpacket in READS and by_counts):
            self.names.add(func.overloadpacket.__name__)
        return func(*args, **kwargs)


class Fetches(TorchFunctionMode):
    """Notes each tensor that is fetched whole."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in FETCHES:
            self.names.add(func.__name__)
        return func(*args, **(kwargs or {}))


class Silent:
    def metrics(self, values: dict[str, float], step: int) -> None:
        raise AssertionError("nothing was due")

    progress = say = metrics


def step_of(method: Method, views: Any) -> set[str]:
    """What a step in mid-epoch reads, from the forward pass to the note of its terms."""
    train = TrainConfig(precision="fp32", clip_norm=1.0)
    config = SimpleNamespace(train=train)
    optimizer = build_optimizer(method, AdamWConfig(), 0.01)
    watch = Watch(train, cast("Any", Silent()), STEPS, scaled=False)
    before = Progress(STEPS, STEPS + 2, STEPS - 1, False, 0)
    with Reads() as reads, Fetches() as fetches:
        output = _step(method, method, optimizer, views, PLAN, cast("Any", config), torch.device("cpu"), before)
        method.after_step(Progress(STEPS + 1, STEPS + 2, STEPS - 1, False, 0))
        watch.step(output, 12, STEPS, {"lr": 0.1}, last=False)
    return reads.names | fetches.names


@pytest.mark.parametrize("name", list(CASES))
def test_a_step_reads_nothing(name: str) -> None:
    case = CASES[name]
    method = case.build()
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=0.01)
    for step in range(STEPS):  # each an epoch's first, where ids are checked, clusters made and queues found full
        case.step(method, method, optimizer, step)
    assert step_of(method, part(case.batch(STEPS))) == WAITS.get(name, set())


class Curious(Method):
    """A method that looks at its numbers, in one of several ways."""

    def __init__(self, look: Any) -> None:
        super().__init__(VICRegConfig())
        self.layer = torch.nn.Linear(3, 4)
        self.look = look

    @property
    def backbone(self):
        raise AssertionError("not asked for")

    def forward(self, views: Any) -> StepOutput:
        z = self.layer(views.views[0].mean((2, 3)).float())
        self.look(z)
        return StepOutput(z.square().mean(), z.detach(), z.detach(), {})


@pytest.mark.parametrize(
    ("look", "seen"),
    [
        (lambda z: z.sum().item(), "_local_scalar_dense"),
        (lambda z: bool((z > 0).all()), "_local_scalar_dense"),
        (lambda z: z[z > 0], "index"),
        (lambda z: (z > 0).nonzero(), "nonzero"),
        (lambda z: z.masked_select(z > 0), "masked_select"),
        (lambda z: torch.linalg.eigh(z.T @ z), "_linalg_eigh"),
        (lambda z: z.sum().tolist(), "tolist"),
        (lambda z: z.detach().cpu(), "cpu"),
        (lambda z: torch.arange(2).repeat_interleave(torch.tensor([1, 2])), "repeat_interleave"),
    ],
)
def test_a_look_at_the_numbers_is_found(look: Any, seen: str) -> None:
    assert step_of(Curious(look), CASES["vicreg"].batch(0)) >= {seen}
