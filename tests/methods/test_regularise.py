"""VICReg's variance and covariance terms beside another method's loss."""

from __future__ import annotations

import pytest
import torch

from jem.batch import Views
from jem.config import BackboneConfig, BarlowConfig, RegulariseConfig, WMSEConfig
from jem.config.methods import JointSettings
from jem.methods import Progress, build_method
from jem.methods.vicreg import covariance, variance

CONFIGS: list[JointSettings] = [
    BarlowConfig(projector=(16, 8)),
    WMSEConfig(projector=(16, 4), sub_batch=6),
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.name)
def test_it_adds_the_mean_of_the_variance_terms_and_the_sum_of_the_covariance_terms(
    config: JointSettings,
) -> None:
    mu, nu = 2.0, 3.0
    generator = torch.Generator().manual_seed(0)
    given = Views([torch.randn(12, 3, 8, 8, generator=generator) for _ in range(2)], torch.arange(12), torch.zeros(12))

    def run(regularise: RegulariseConfig | None):
        torch.manual_seed(0)
        method = build_method(config.model_copy(update={"regularise": regularise}), BackboneConfig(stem="stride2"))
        method.double().before_step(Progress())
        out = method(Views([view.double() for view in given.views], given.id, given.label))
        return method, out

    first, plain = run(None)
    method, out = run(RegulariseConfig(mu=mu, nu=nu))
    z1, z2 = (method.branch(view.double())[1] for view in given.views)
    v, c = (variance(z1) + variance(z2)) / 2, covariance(z1) + covariance(z2)
    torch.testing.assert_close(out.loss, plain.loss + mu * v + nu * c, rtol=1e-12, atol=0)
    assert out.terms.keys() == {*plain.terms, "variance", "covariance"}
    assert out.terms["variance"].item() == pytest.approx(v.item())
    assert out.terms["covariance"].item() == pytest.approx(c.item())

    # its gradient is that of the sum, with respect to a weight that both views go through
    (found,) = torch.autograd.grad(out.loss, method.branch.projector[-1].weight, retain_graph=True)
    (extra,) = torch.autograd.grad(mu * v + nu * c, method.branch.projector[-1].weight)
    (alone,) = torch.autograd.grad(plain.loss, first.branch.projector[-1].weight)
    torch.testing.assert_close(found, alone + extra, rtol=1e-10, atol=1e-14)


def test_it_is_left_out_by_default() -> None:
    assert {config.regularise for config in CONFIGS} == {None}
