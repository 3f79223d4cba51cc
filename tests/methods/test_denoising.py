"""The denoising autoencoder: its noise, its decoder, and what it is asked to give back."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from jem.batch import Views
from jem.config import BackboneConfig, DenoisingConfig, PretrainConfig
from jem.methods import Progress, build_method
from jem.methods.denoising import Decoder, Denoising, add_noise

SMALL = BackboneConfig(stem="stride2")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_gaussian_noise_has_its_deviation_in_every_channel() -> None:
    images = torch.randn(64, 3, 20, 20, generator=seeded(1))
    noise = add_noise(images, 0.3, 0.0, seeded()) - images
    assert noise.std(dim=(0, 2, 3)).tolist() == pytest.approx([0.3] * 3, rel=0.03)
    assert noise.mean(dim=(0, 2, 3)).tolist() == pytest.approx([0.0] * 3, abs=0.01)
    assert torch.corrcoef(noise.transpose(0, 1).flatten(1)).fill_diagonal_(0).abs().max() < 0.03


def test_masking_noise_takes_whole_pixels_and_leaves_the_others_alone() -> None:
    images = torch.randn(64, 3, 20, 20, generator=seeded(1))
    noisy = add_noise(images, 0.0, 0.25, seeded())
    hidden = (noisy == 0).all(dim=1)
    assert hidden.float().mean().item() == pytest.approx(0.25, abs=0.01)
    assert torch.equal(noisy, images * ~hidden[:, None])
    assert not torch.equal(hidden[0], hidden[1])
    assert (add_noise(images, 0.5, 0.25, seeded()) == 0).any(dim=1).float().mean().item() == pytest.approx(
        0.25, abs=0.01
    ), "what is masked is not noisy"


@settings(max_examples=20, deadline=None)
@given(height=st.integers(4, 40), width=st.integers(4, 40), stages=st.integers(1, 4))
def test_decoder_gives_images_of_any_size(height: int, width: int, stages: int) -> None:
    decoder = Decoder(5, (8,) * stages)
    assert decoder(torch.randn(2, 5), height, width).shape == (2, 3, height, width)


def batch(n: int = 8, side: int = 16) -> Views:
    return Views([torch.randn(n, 3, side, side, generator=seeded())], torch.arange(n), torch.full((n,), -1))


def make(**fields: object) -> Denoising:
    torch.manual_seed(0)
    method = build_method(DenoisingConfig(**{"decoder": (16, 8), **fields}), SMALL)
    assert isinstance(method, Denoising)
    return method


def test_loss_is_the_squared_error_to_the_view_without_its_noise() -> None:
    method, given = make(sigma=0.4, mask=0.3), batch()
    method.before_step(Progress(step=2, total=9))
    out = method(given)
    noisy = add_noise(given.views[0], 0.4, 0.3, Progress(step=2, total=9).generator())
    representation = method.backbone(noisy)
    decoded = method.decoder(representation, 16, 16)
    error = sum(((a - b) ** 2).sum().item() for a, b in zip(decoded, given.views[0], strict=True))
    assert out.loss.item() == pytest.approx(error / given.views[0].numel(), rel=1e-5)
    assert torch.equal(out.representation, representation)
    assert torch.equal(out.embedding, representation)


def test_it_learns_to_remove_the_noise_of_its_batch() -> None:
    method = make()
    x, y = torch.meshgrid(torch.linspace(-1, 1, 8), torch.linspace(-1, 1, 8), indexing="ij")
    images = torch.stack([torch.stack([k * x, k * y, -k * x]) for k in torch.linspace(-2, 2, 16)])
    given = Views([images], torch.arange(16), torch.full((16,), -1))
    optimizer = torch.optim.Adam(method.parameters(), lr=1e-2)
    losses = []
    for step in range(12):
        method.before_step(Progress(step, 12))
        optimizer.zero_grad()
        loss = method(given).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"sigma": 0, "mask": 0}, "no noise to remove: raise one of them"),
        ({"mask": 1}, "leaves no pixel to see: lower it"),
    ],
)
def test_noise_that_is_none_or_everything_is_refused(fields: dict, words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        PretrainConfig.model_validate(
            {"data": "x", "augment": {"views": [{"size": 32}]}, "method": {"name": "denoising", **fields}}
        )


@pytest.mark.parametrize("name", ["denoising", "jigsaw", "rotation"])
def test_a_second_view_is_refused(name: str) -> None:
    with pytest.raises(ValidationError, match=r"augment.views makes 2 views, and .* takes 1: lower count"):
        PretrainConfig.model_validate({"data": "x", "method": {"name": name}})
