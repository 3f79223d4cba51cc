"""Vision transformers, and what masking does to their patches."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from jem.config import BackboneConfig
from jem.errors import InputError
from jem.models.backbones import build_backbone
from jem.models.vit import Block, ViT, attention, positions


def make(**settings: object) -> ViT:
    """The first three blocks of a ViT-Ti."""
    torch.manual_seed(0)
    vit = build_backbone(BackboneConfig(**{"name": "vit_tiny", "patch": 4, **settings}))
    assert isinstance(vit, ViT)
    vit.blocks = vit.blocks[:3]
    for parameter in vit.parameters():  # biases that are 0 and norms that are 1 would hide mistakes
        nn.init.normal_(parameter, mean=parameter.mean().item(), std=0.05)
    return vit


def masks(images: int, patches: int, hidden: int) -> torch.Tensor:
    return torch.rand(images, patches, generator=torch.Generator().manual_seed(1)).argsort(dim=1) < hidden


def patches_of(images: torch.Tensor, side: int) -> torch.Tensor:
    """(N, patches, 3 * side * side), cut out one by one."""
    height, width = images.shape[2:]
    corners = [(top, left) for top in range(0, height, side) for left in range(0, width, side)]
    return torch.stack([images[:, :, t : t + side, x : x + side].flatten(1) for t, x in corners], dim=1)


def by_torch(vit: ViT, images: torch.Tensor, keep: torch.Tensor | None = None) -> torch.Tensor:
    """The tokens by torch's own encoder layers, of the patches `keep`, int (N, k), only."""
    n, (height, width) = len(images), images.shape[2:]
    x = patches_of(images, vit.patch) @ vit.embed.weight.flatten(1).T + vit.embed.bias
    x = x + positions(height // vit.patch, width // vit.patch, vit.dim)
    if keep is not None:
        x = torch.stack([tokens[kept] for tokens, kept in zip(x, keep, strict=True)])
    x = torch.cat([vit.class_token.view(1, 1, -1).repeat(n, 1, 1), x], dim=1)
    for block in vit.blocks:
        layer = nn.TransformerEncoderLayer(
            vit.dim,
            block.heads,
            4 * vit.dim,
            dropout=0.0,
            activation="gelu",
            layer_norm_eps=1e-6,
            batch_first=True,
            norm_first=True,
        )
        names = {
            "self_attn.in_proj_weight": block.qkv.weight,
            "self_attn.in_proj_bias": block.qkv.bias,
            "self_attn.out_proj.weight": block.out.weight,
            "self_attn.out_proj.bias": block.out.bias,
            "linear1.weight": block.mlp[0].weight,
            "linear1.bias": block.mlp[0].bias,
            "linear2.weight": block.mlp[2].weight,
            "linear2.bias": block.mlp[2].bias,
            **{
                f"norm{i}.{kind}": getattr(getattr(block, f"norm{i}"), kind)
                for i in (1, 2)
                for kind in ("weight", "bias")
            },
        }
        layer.load_state_dict(names)
        x = layer(x)
    return functional.layer_norm(x, (vit.dim,), vit.norm.weight, vit.norm.bias, 1e-6)


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


# --- the network ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width"), [(32, 32), (16, 24)])
def test_tokens_are_those_of_torchs_encoder_layers(height: int, width: int) -> None:
    vit = make().eval()
    images = torch.randn(2, 3, height, width)
    tokens = vit.tokens(images)
    assert tokens.shape == (2, 1 + height * width // 16, 192)
    close(tokens, by_torch(vit, images))
    close(vit.tokens(images.to(memory_format=torch.channels_last)), tokens)


@pytest.mark.parametrize(
    ("name", "dim", "heads", "parameters"),
    [("vit_tiny", 192, 3, 5.5e6), ("vit_small", 384, 6, 21.6e6), ("vit_base", 768, 12, 85.6e6)],
)
def test_sizes_are_the_papers(name: str, dim: int, heads: int, parameters: float) -> None:
    with torch.device("meta"):
        vit = build_backbone(BackboneConfig(name=name, patch=16))
    assert isinstance(vit, ViT)
    assert (vit.dim, len(vit.blocks), vit.blocks[0].heads) == (dim, 12, heads)
    assert sum(p.numel() for p in vit.parameters()) == pytest.approx(parameters, rel=0.01)


def test_the_representation_is_the_class_token_or_the_patches_mean() -> None:
    images = torch.randn(3, 3, 16, 16)
    for pool, expected in (("cls", lambda t: t[:, 0]), ("mean", lambda t: t[:, 1:].mean(dim=1))):
        vit = make(pool=pool).eval()
        close(vit(images), expected(vit.tokens(images)))


def test_blocks_outputs_lead_to_the_tokens() -> None:
    vit, images, mask = make().eval(), torch.randn(2, 3, 16, 16), masks(2, 16, 12)
    outputs = vit.blocks_output(images, mask)
    assert [x.shape for x in outputs] == [(2, 5, 192)] * 3
    close(vit.blocks[2](outputs[1]), outputs[2])
    close(vit.norm(outputs[-1]), vit.tokens(images, mask))


@given(st.integers(1, 9), st.integers(1, 9))
@settings(max_examples=20, deadline=None)
def test_positions_are_sines_and_cosines_of_coordinates_relative_to_the_image(height: int, width: int) -> None:
    made = positions(height, width, 16).numpy()
    for row in range(height):
        for column in range(width):
            expected = []
            for coordinate in ((column + 0.5) / width * 14, (row + 0.5) / height * 14):
                angles = [coordinate / 10000 ** (k / 4) for k in range(4)]
                expected += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
            np.testing.assert_allclose(made[row * width + column], expected, atol=1e-5)


def test_weights_begin_as_moco_v3_draws_them() -> None:
    torch.manual_seed(0)
    vit = build_backbone(BackboneConfig(name="vit_tiny", patch=4, masked="token"))
    assert isinstance(vit, ViT)
    block = vit.blocks[3]
    bounds = {block.qkv: 6 / (192 + 192), block.out: 6 / (192 + 192), vit.embed: 6 / (48 + 192), block.mlp[0]: 6 / 960}
    for layer, square in bounds.items():
        assert layer.weight.abs().max().item() == pytest.approx(math.sqrt(square), rel=0.01)
        assert layer.bias.abs().max() == 0
    assert vit.mask_token is not None
    for token in (vit.class_token, vit.mask_token):
        assert token.std().item() == pytest.approx(0.02, rel=0.2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_on_a_cpu_is_softmax_of_the_scaled_products(dtype: torch.dtype) -> None:
    queries, keys, values = torch.randn(3, 2, 3, 5, 8).to(dtype)
    weights = torch.softmax(queries.double() @ keys.double().transpose(2, 3) / 8**0.5, dim=3)
    made = attention(queries, keys, values)
    assert made.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(made.double(), weights @ values.double(), rtol=tolerance, atol=tolerance)


def test_drop_path_leaves_whole_images_out_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    block = Block(8, 2, drop_path=0.3)
    path = block._path(torch.ones(20000, 3, 8))
    kept = path[:, 0, 0] > 0
    assert kept.float().mean().item() == pytest.approx(0.7, abs=0.02)
    close(path[kept], torch.full_like(path[kept], 1 / 0.7))
    assert (path[~kept] == 0).all()
    assert torch.equal(block.eval()._path(path), path)
    vit = build_backbone(BackboneConfig(name="vit_tiny", drop_path=0.22))
    assert [each.drop_path for each in vit.blocks] == pytest.approx([0.02 * i for i in range(12)])


def test_a_size_that_does_not_divide_into_patches_is_refused_with_the_remedy() -> None:
    with pytest.raises(InputError, match=r"images of 30 x 32 pixels .* patches of 4: set backbone.patch"):
        make()(torch.randn(2, 3, 30, 32))


# --- masks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("images", "hidden"), [(1, 15), (3, 12), (2, 1), (2, 0)])
def test_dropping_is_attending_to_the_patches_that_are_left(images: int, hidden: int) -> None:
    vit = make().eval()
    x, mask = torch.randn(images, 3, 16, 16), torch.rand(images, 16).argsort(dim=1) < hidden
    keep = torch.stack([torch.tensor([i for i in range(16) if not row[i]]) for row in mask.tolist()])
    close(vit.tokens(x, mask), by_torch(vit, x, keep))
    changed = x.clone()
    changed[mask.view(images, 1, 4, 4).repeat_interleave(4, 2).repeat_interleave(4, 3).expand_as(x)] = 9.0
    assert torch.equal(vit(changed, mask), vit(x, mask))


def test_a_mask_token_stands_in_place_of_the_embedding() -> None:
    vit, images, mask = make(masked="token").eval(), torch.randn(2, 3, 16, 16), masks(2, 16, 7)
    tokens = vit.tokens(images, mask)
    assert tokens.shape == (2, 17, 192)
    # as if all masked patches had a picture whose embedding is the token
    picture = torch.linalg.lstsq(vit.embed.weight.flatten(1), vit.mask_token - vit.embed.bias).solution
    with torch.no_grad():
        assert vit.mask_token is not None
        vit.mask_token.copy_(vit.embed.weight.flatten(1) @ picture + vit.embed.bias)
    changed = images.clone()
    for image, row in enumerate(mask.tolist()):
        for number in (number for number, hidden in enumerate(row) if hidden):
            top, left = 4 * (number // 4), 4 * (number % 4)
            changed[image, :, top : top + 4, left : left + 4] = picture.view(3, 4, 4)
    close(vit.tokens(images, mask), vit.tokens(changed))


def test_masks_that_cannot_be_dropped_are_refused() -> None:
    vit, images, mask = make(), torch.randn(2, 3, 16, 16), masks(2, 16, 7)
    uneven = mask.clone()
    uneven[0] = True
    with pytest.raises(ValueError, match=r"hide from 7 to 16 patches, .* the same count in every image"):
        vit(images, uneven)
    with pytest.raises(ValueError, match="hide all 16 patches"):
        vit(images, torch.ones(2, 16, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"a mask of \(2, 15\) for \(2, 16\) images and patches"):
        vit(images, mask[:, :15])
    assert make(masked="token").tokens(images, uneven).shape == (2, 17, 192)


@pytest.mark.parametrize("masked", ["drop", "token"])
@pytest.mark.parametrize("pool", ["cls", "mean"])
@pytest.mark.parametrize("hidden", [None, 12])
def test_every_parameter_has_a_gradient(masked: str, pool: str, hidden: int | None) -> None:
    """As DistributedDataParallel demands; also the mask token where nothing is masked."""
    vit = make(masked=masked, pool=pool)
    assert (vit.mask_token is None) == (masked == "drop")
    vit(torch.randn(2, 3, 16, 16), None if hidden is None else masks(2, 16, hidden)).square().sum().backward()
    assert [name for name, p in vit.named_parameters() if p.grad is None] == []


# --- where it runs ----------------------------------------------------------------------------------------------------


def test_in_bfloat16_the_sum_of_the_blocks_stays_in_float32() -> None:
    vit, images, mask = make().eval(), torch.randn(4, 3, 16, 16), masks(4, 16, 4)
    with torch.no_grad():
        exact = vit(images, mask)
        with torch.autocast("cpu", torch.bfloat16):
            half = vit(images, mask)
            assert vit.blocks_output(images, mask)[-1].dtype == torch.float32
    assert functional.cosine_similarity(exact, half.float()).min() > 0.999


@pytest.mark.parametrize("masked", ["drop", "token"])
def test_it_exports_with_a_dynamic_batch(masked: str) -> None:
    vit = make(masked=masked).eval()
    program = torch.export.export(vit, (torch.randn(2, 3, 16, 16),), dynamic_shapes=({0: torch.export.Dim("n")},))
    images = torch.randn(5, 3, 16, 16)
    close(program.module()(images), vit(images))


def test_tokens_are_neither_decayed_nor_scaled_by_lars() -> None:
    """The optimizer decides by the number of dimensions."""
    vit = make(masked="token")
    assert vit.class_token.dim() == 1
    assert vit.mask_token is not None
    assert vit.mask_token.dim() == 1


@pytest.mark.parametrize("masked", ["drop", "token"])
def test_a_compiled_vit_gives_the_same_for_any_mask_without_a_warning(masked: str, caplog) -> None:
    vit = make(masked=masked).eval()
    images = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    wanted = [None, *(masks(4, 16, hidden) for hidden in (4, 9, 12))]
    plain = [vit(images, mask) for mask in wanted]
    try:
        vit.compile(backend="eager")  # torch's tracing alone: a compiler is not what is tested
        for mask, expected in zip(wanted, plain, strict=True):
            torch.testing.assert_close(vit(images, mask), expected)
        assert "Graph break" not in caplog.text
        if masked == "drop":
            with pytest.raises(ValueError, match="masks hide from"):
                vit(images, masks(4, 16, 4) & (torch.arange(4) > 0)[:, None])
    finally:
        torch.compiler.reset()
