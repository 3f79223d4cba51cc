"""What flows from the stream through the augmentation to the method."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Decoded images, one uint8 tensor each, as the stream delivers them.

    The canvas is the *whole* image squashed to S x S; `size` keeps the geometry that it had, so a crop can be
    sampled in the original and mapped to the canvas.
    """

    image: Tensor
    """uint8 (N, 3, S, S), RGB."""
    size: Tensor
    """int32 (N, 2), height and width of the image before it was squashed."""
    id: Tensor
    """int64 (N,)."""
    label: Tensor
    """int64 (N,), -1 where the data set has no labels."""

    def __len__(self) -> int:
        return self.image.shape[0]


@dataclass(frozen=True)
class Views:
    """Augmented versions of one batch.

    The two global views come first, local ones (multi-crop) after them; sizes may differ from view to view. Iterating
    gives (images, mask) for each view, which is what a backbone takes.
    """

    views: list[Tensor]
    """V tensors, each float (N, 3, s, s), normalised, channels_last."""
    id: Tensor
    """int64 (N,)."""
    label: Tensor
    """int64 (N,), -1 where the data set has no labels."""
    masks: list[Tensor | None] | None = None
    """For each view bool (N, patches), True where a patch is masked, or None; None if no view is masked."""

    def __len__(self) -> int:
        return self.id.shape[0]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        return zip(self.views, self.masks or [None] * len(self.views), strict=True)
