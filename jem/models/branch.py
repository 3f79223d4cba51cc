"""A branch: the backbone and the head that a method puts on it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from jem.models.backbones import Backbone, build_backbone
from jem.models.heads import mlp

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from jem.config import BackboneConfig


class Branch(nn.Module):
    """Backbone and projector: images, float (N, 3, H, W), to representation (N, D) and embedding (N, d).

    Args:
        backbone: of the representation.
        widths: of the projector's layers, the embedding's last.
        last_bias: as `mlp`'s.
        last_norm: as `mlp`'s.
        norm: as `mlp`'s.
    """

    backbone: Backbone

    def __init__(
        self,
        backbone: BackboneConfig,
        widths: Sequence[int],
        *,
        last_bias: bool = True,
        last_norm: bool = False,
        norm: bool = True,
    ) -> None:
        super().__init__()
        self.backbone = build_backbone(backbone)
        self.projector = mlp((self.backbone.dim, *widths), last_bias=last_bias, last_norm=last_norm, norm=norm)

    def forward(self, images: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Representation (N, D) and embedding (N, d) of one view; `mask` as the backbone's."""
        representation = self.backbone(images, mask)
        return representation, self.projector(representation)

    def each(self, views: Iterable[tuple[Tensor, Tensor | None]]) -> list[tuple[Tensor, Tensor]]:
        """Representation and embedding of each view; the backbone may take them together, the projector does not."""
        return [(representation, self.projector(representation)) for representation in self.backbone.each(views)]
