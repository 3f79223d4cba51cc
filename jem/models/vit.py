"""Vision transformers, whose patches can be masked.

Dosovitskiy et al., "An image is worth 16x16 words", 2021, with the fixed sine-cosine position embedding and the initial
weights of Chen, Xie, He, "An empirical study of training self-supervised vision transformers" (MoCo v3), 2021.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from jem.errors import InputError
from jem.models.backbones import Backbone

if TYPE_CHECKING:
    from jem.config import BackboneConfig

SIZES = {"vit_tiny": (192, 3), "vit_small": (384, 6), "vit_base": (768, 12)}
"""Width and heads."""
DEPTH = 12
REFERENCE = 14
"""Patches along a side of the image that positions are counted in: those of 224 pixels in patches of 16."""


def positions(height: int, width: int, dim: int, device: torch.device | None = None) -> Tensor:
    """Sine-cosine embedding of each patch's centre, float32 (height * width, dim), row by row.

    A quarter of the dimensions each: sines and cosines of x, sines and cosines of y, at the frequencies 10000^(-4 k /
    dim), k = 0 ... dim / 4 - 1. Coordinates are relative to the image, from 0 to `REFERENCE`, whatever its size: a
    local crop's patches are further apart than a global view's.
    """
    frequencies = 10000 ** -(torch.arange(dim // 4, device=device) / (dim // 4))
    y, x = ((torch.arange(n, device=device) + 0.5) / n * REFERENCE for n in (height, width))
    angles_y, angles_x = y[:, None] * frequencies, x[:, None] * frequencies
    rows = torch.cat([angles_y.sin(), angles_y.cos()], dim=1)[:, None].expand(height, width, dim // 2)
    columns = torch.cat([angles_x.sin(), angles_x.cos()], dim=1).expand(height, width, dim // 2)
    return torch.cat([columns, rows], dim=2).flatten(0, 1)


def attention(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(c)) v; (N, heads, T, c) each, to the same shape."""
    if queries.device.type == "cpu" and queries.dtype == torch.bfloat16:
        # forward and backward of 17 tokens in 27 us for an image, where the fused operation takes 194; of 197, 588
        # and 1925 (one core; in float32 they are alike)
        scores = queries @ keys.transpose(2, 3) / math.sqrt(queries.shape[3])
        return scores.softmax(dim=3).to(values.dtype) @ values
    return functional.scaled_dot_product_attention(queries, keys, values)


class Block(nn.Module):
    """Pre-norm transformer block: attention and a two-layer MLP, each added to its input.

    Args:
        dim: of the tokens.
        heads: of the attention; divides `dim`.
        drop_path: probability that one image's attention, or MLP, is left out of the sum (Huang et al., "Deep networks
            with stochastic depth", 2016); what is kept is divided by 1 - drop_path.
    """

    def __init__(self, dim: int, heads: int, drop_path: float = 0.0) -> None:
        super().__init__()
        self.heads, self.drop_path = heads, drop_path
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (N, T, dim) to the same shape."""
        x = x + self._path(self._attention(self.norm1(x)))
        return x + self._path(self.mlp(self.norm2(x)))

    def _attention(self, x: Tensor) -> Tensor:
        queries, keys, values = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = attention(queries, keys, values)
        return cast("Tensor", self.out(mixed.transpose(1, 2).flatten(2)))

    def _path(self, x: Tensor) -> Tensor:
        if not self.training or self.drop_path == 0:
            return x
        kept = torch.rand(x.shape[0], 1, 1, device=x.device) >= self.drop_path
        return x * kept / max(1 - self.drop_path, 1e-6)


class ViT(Backbone):
    """Patches and a class token through `DEPTH` pre-norm blocks and a final norm.

    Images may have any size that is a multiple of the patch. A mask, bool (N, patches), is True where a patch is
    hidden, patches counted row by row. `config.masked` says how: "drop" leaves the patch out, which saves its
    computation and needs the same count for every image; "token" puts a learned token in place of its embedding, before
    the position is added.
    """

    mask_token: nn.Parameter | None

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.config = config
        self.dim, heads = SIZES[config.name]
        self.patch = config.patch
        self.embed = nn.Conv2d(3, self.dim, self.patch, stride=self.patch)
        self.class_token = nn.Parameter(torch.empty(self.dim))  # of one dimension: not decayed, as biases are not
        self.register_parameter("mask_token", None)
        if config.masked == "token":
            self.mask_token = nn.Parameter(torch.empty(self.dim))
        rates = [config.drop_path * i / (DEPTH - 1) for i in range(DEPTH)]
        self.blocks = nn.ModuleList(Block(self.dim, heads, rate) for rate in rates)
        self.norm = nn.LayerNorm(self.dim, eps=1e-6)
        self._visible = _visible
        self._initialise()

    def compile(self, *args: Any, **options: Any) -> None:
        """As any module's; but not what reads from the mask how many patches are left.

        A decorator would import torch's compiler, for 2 seconds, where nothing is compiled.
        """
        self._visible = torch.compiler.disable(_visible)  # type: ignore[no-untyped-call]
        super().compile(*args, **options)

    def _initialise(self) -> None:
        """Xavier uniform (queries, keys and values each on their own), biases 0, tokens of deviation 0.02."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                outputs, inputs = module.weight.flatten(1).shape
                bound = math.sqrt(6 / (inputs + (outputs // 3 if name.endswith("qkv") else outputs)))
                nn.init.uniform_(module.weight, -bound, bound)
                nn.init.zeros_(cast("Tensor", module.bias))
        nn.init.normal_(self.class_token, std=0.02)
        if self.mask_token is not None:
            nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, images: Tensor, mask: Tensor | None = None) -> Tensor:
        """Images, float (N, 3, H, W), to the representation, (N, dim); arguments and errors as those of `tokens`.

        With `pool: mean` it is the mean of the patches that are there: masked ones count if a token stands for them.
        """
        tokens = self.tokens(images, mask)
        return tokens[:, 0] if self.config.pool == "cls" else tokens[:, 1:].mean(dim=1)

    def tokens(self, images: Tensor, mask: Tensor | None = None) -> Tensor:
        """The class token and the patches after the final norm.

        Args:
            images: float (N, 3, H, W).
            mask: bool (N, patches), True where a patch is hidden; None for none. Where patches are dropped, its count
                is looked at, which waits for the device.

        Returns:
            (N, 1 + patches, dim); with dropped patches (N, 1 + those that are left, dim), in their order.

        Raises:
            InputError: a side of the images is not a multiple of the patch.
            ValueError: the mask has another shape, hides everything, or hides more in one image than in another and
                patches are dropped.
        """
        x = self._embedded(images, mask)
        for block in self.blocks:
            x = block(x)
        return cast("Tensor", self.norm(x))

    def blocks_output(self, images: Tensor, mask: Tensor | None = None) -> list[Tensor]:
        """Each block's output before any final norm, (N, 1 + patches, dim); arguments and errors as `tokens`."""
        x = self._embedded(images, mask)
        outputs: list[Tensor] = []
        for block in self.blocks:
            x = block(x)
            outputs.append(x)
        return outputs

    def _embedded(self, images: Tensor, mask: Tensor | None) -> Tensor:
        height, width = images.shape[2:]
        if height % self.patch or width % self.patch:
            raise InputError(
                f"images of {height} x {width} pixels do not divide into patches of {self.patch}: set backbone.patch "
                "to a divisor of the views' size (4 for 32 px, 8 for 64 to 96, 16 for 224)"
            )
        x = self.embed(images).flatten(2).transpose(1, 2)
        if mask is not None and mask.shape != x.shape[:2]:
            raise ValueError(f"a mask of {tuple(mask.shape)} for {tuple(x.shape[:2])} images and patches")
        if self.mask_token is not None:
            if mask is None and self.training:  # so that the token has a gradient, 0, which DDP waits for
                mask = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
            if mask is not None:
                x = torch.where(mask[:, :, None], self.mask_token.to(x.dtype), x)
        # in the weights' type: under autocast the sum, and so what all blocks add to, is float32
        x = x + positions(height // self.patch, width // self.patch, self.dim, x.device).to(self.class_token.dtype)
        if self.mask_token is None and mask is not None:
            x = torch.take_along_dim(x, self._visible(mask)[:, :, None], dim=1)
        return torch.cat([self.class_token.to(x.dtype).expand(x.shape[0], 1, -1), x], dim=1)


def _visible(mask: Tensor) -> Tensor:
    """Indices of the patches that are not masked, int64 (N, left), ascending."""
    counts = mask.sum(dim=1)
    least, most = (int(x) for x in counts.aminmax())
    if least != most:
        raise ValueError(
            f"masks hide from {least} to {most} patches, and to drop them it must be the same count in every image: "
            "set backbone.masked to token"
        )
    if most == mask.shape[1]:
        raise ValueError(f"masks hide all {most} patches")
    return mask.to(torch.uint8).argsort(dim=1, stable=True)[:, : mask.shape[1] - most]
