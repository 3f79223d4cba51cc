"""From a batch of decoded images to normalised views, on the batch's device.

Parameters are drawn on the CPU and every selection of images is made there, so that a GPU is never waited for.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch

from jem.ahead import Ahead, precedence
from jem.augment import fused, ops
from jem.augment.params import HUE, ViewParams, draw, generator
from jem.batch import Batch, Views
from jem.device import put

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from contextlib import AbstractContextManager
    from typing import TypeAlias

    from torch import Generator, Tensor

    from jem.config import AugmentConfig, ViewConfig

    Draws: TypeAlias = Generator | Sequence[Generator]

__all__ = ["Augment", "augment_view", "centre_view", "generator", "prefetched"]

SOLARIZE_FROM = 0.5
# What a CPU works on at once should stay in its caches, and not go back to the system when it is freed (224 px, one
# core: 298 two-view images/s in parts of 4 M numbers, 356 of 1 M, 305 of 256 k).
CHUNK_FLOATS = 1 << 20


class Augment:
    """Makes the views of a batch as `config` describes them. Holds no state but the configuration."""

    def __init__(self, config: AugmentConfig) -> None:
        self.config = config
        self.views: list[ViewConfig] = [view for view in config.views for _ in range(view.count)]

    def __call__(self, batch: Batch, generator: Draws, dtype: torch.dtype = torch.float32) -> Views:
        """Draw the parameters and make the views on the device of `batch.image`.

        `batch.size` should be on the CPU, where the parameters are drawn; from elsewhere it is fetched, which waits.
        """
        params, device = self.draw(batch.size, generator), batch.image.device
        masks = [None if drawn.mask is None else put(drawn.mask, device) for drawn in params]
        masked = any(mask is not None for mask in masks)
        return Views(self.apply(batch, params, dtype), batch.id, batch.label, masks if masked else None)

    def draw(self, size: Tensor, generator: Draws) -> list[ViewParams]:
        """The parameters of each view, for images whose original height and width are `size` (N, 2).

        Of several generators each draws for its equal share of the images, in order.
        """
        size = size.cpu()
        if not isinstance(generator, torch.Generator):
            shares = zip(size.chunk(len(generator)), generator, strict=True)
            parts = [self.draw(share, each) for share, each in shares]
            return [ViewParams.joined(drawn) for drawn in zip(*parts, strict=True)]
        return [draw(view, size, generator) for view in self.views]

    def apply(self, batch: Batch, params: list[ViewParams], dtype: torch.dtype = torch.float32) -> list[Tensor]:
        """Make one view for each of `params`: `dtype` (N, 3, s, s), normalised, channels_last.

        Float32 inside, whatever `dtype` and autocast say. On a GPU where Triton works, by `fused.make_views`.
        """
        count, channels, height, width = batch.image.shape
        device, size = batch.image.device, batch.size.cpu()
        if fused.available(device):
            return fused.make_views(
                batch.image,
                [on_canvas(drawn.boxes, size, height, width) for drawn in params],
                self.views,
                params,
                mean=self.config.mean,
                std=self.config.std,
                solarize_from=SOLARIZE_FROM,
                dtype=dtype,
            )
        made = [
            torch.empty(
                (count, channels, view.size, view.size),
                dtype=dtype,
                device=device,
                memory_format=torch.channels_last,
            )
            for view in self.views
        ]
        pixels = max(height * width, *(view.size**2 for view in self.views))
        chunk = max(1, CHUNK_FLOATS // (channels * pixels)) if device.type == "cpu" else max(1, count)
        for start in range(0, count, chunk):
            part = slice(start, start + chunk)
            images = batch.image[part].to(torch.float32)
            if batch.image.dtype == torch.uint8:
                images.div_(255)
            for view, drawn, out in zip(self.views, params, made, strict=True):
                augmented = augment_view(images, size[part], view, drawn.rows(part))
                ops.normalize(augmented, self.config.mean, self.config.std, out[part])
        return made


def augment_view(images: Tensor, size: Tensor, view: ViewConfig, drawn: ViewParams) -> Tensor:
    """One view of each image, not yet normalised: crop, flip, jitter, greyscale, blur, solarize, in this order.

    Args:
        images: float32 (N, 3, H, W) in [0, 1], whole images, squashed to one shape; contiguous or channels_last.
        size: integer (N, 2), height and width before they were squashed, on the CPU.
        view: says which operations there are, the size of the result, and the blur's kernel.
        drawn: the parameters of the N images.

    Returns:
        float32 (N, 3, s, s) in [0, 1]; contiguous, or (on a CPU) its transpose is.
    """
    device = images.device
    boxes = on_canvas(drawn.boxes, size, images.shape[2], images.shape[3])
    cropped = ops.resized_crop(images, put(boxes, device), view.size, put(drawn.flip, device))
    # rows and columns are alike to every operation that follows: each works on the image as it lies in memory
    out = cropped if cropped.is_contiguous() else cropped.transpose(2, 3)
    if view.jitter is not None:
        weights = put(ops.blend_weights(drawn.order, drawn.factors), device)
        for step in range(4):
            out = ops.blend(out, *weights[step])
            chosen = (drawn.order[:, step] == HUE) & (drawn.factors[:, HUE] != 0)
            _change(out, chosen, ops.adjust_hue, drawn.factors[:, HUE])
    _change(out, drawn.grey, ops.greyscale)
    if view.blur is not None:
        kernel = view.blur.kernel
        _change(out, drawn.sigma > 0, lambda x, sigma: ops.gaussian_blur(x, sigma, kernel), drawn.sigma)
    _change(out, drawn.solarize, lambda x: ops.solarize(x, SOLARIZE_FROM))
    return out if cropped.is_contiguous() else out.transpose(2, 3)


def centre_view(images: Tensor, sizes: Tensor | None, out_size: int) -> Tensor:
    """The view used for evaluation: the central square of each original, resized with antialiasing.

    Args:
        images: uint8 in 0..255, or float in [0, 1], (N, 3, H, W): whole images, squashed to one shape.
        sizes: integer (N, 2), height and width before they were squashed; None if they were not.
        out_size: side of the result in pixels.

    Returns:
        float32 (N, 3, out_size, out_size) in [0, 1], contiguous, not normalised.
    """
    count, _, height, width = images.shape
    if sizes is None:
        # filled, not copied from a tensor of two numbers: that would wait for the device
        sizes = torch.stack([torch.full((count,), side, device=images.device) for side in (height, width)], dim=1)
    sizes = sizes.to(images.device, torch.float64)
    side = sizes.amin(dim=1, keepdim=True)
    boxes = torch.cat([(sizes - side) / 2, side, side], dim=1)
    return ops.resized_crop(images, on_canvas(boxes, sizes, height, width), out_size)


def on_canvas(boxes: Tensor, size: Tensor, height: int, width: int) -> Tensor:
    """Boxes (N, 4) in pixels of originals of `size` (N, 2), in pixels of the height x width canvas of each."""
    vertical, horizontal = height / size[:, 0].to(torch.float64), width / size[:, 1].to(torch.float64)
    return boxes * torch.stack([vertical, horizontal, vertical, horizontal], dim=1)


def prefetched(
    batches: Iterable[Batch],
    generators: Iterable[Draws],
    augment: Augment,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    phase: Callable[[str], AbstractContextManager[object]] = nullcontext,
) -> Iterator[tuple[Batch, Views]]:
    """The views of each batch, on `device`, beside the batch as it came.

    On CUDA a thread of its own takes, copies and augments the next batches on a side stream while the caller's step on
    this one runs, in the caller's gaps (`jem.ahead.gap`); the caller's stream waits for the views, the host does not
    wait for the device. On a CPU there is nothing to overlap with: the step has all cores.

    Args:
        batches: from the stream, on the CPU.
        generators: one, or several for equal shares, for each batch, see `generator`; may be endless.
        augment: makes the views.
        device: where the views are made and used.
        dtype: of the views.
        phase: "copy" and "augment" run in what it makes of their names, to be measured.
    """

    def made(batch: Batch, drawn_from: Draws) -> Views:
        with phase("copy"):
            moved = _moved(batch, device)
        with phase("augment"):
            return augment(moved, drawn_from, dtype)

    pairs = zip(batches, generators, strict=False)
    if device.type != "cuda":
        for batch, drawn_from in pairs:
            yield batch, made(batch, drawn_from)
        return
    side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def beside() -> Iterator[tuple[Batch, Views, torch.cuda.Event]]:
        with torch.cuda.stream(side):
            for batch, drawn_from in pairs:
                yield batch, made(batch, drawn_from), side.record_event()

    with precedence(), Ahead(beside, 1, "jem-augment") as ahead:
        while (item := ahead.take()) is not None:
            yield _handed_over(*item)


def _moved(batch: Batch, device: torch.device) -> Batch:
    """`size` stays on the CPU, where it is needed."""
    return Batch(put(batch.image, device), batch.size, put(batch.id, device), put(batch.label, device))


def _handed_over(batch: Batch, views: Views, done: torch.cuda.Event) -> tuple[Batch, Views]:
    """Views made on a side stream, for use on the current one."""
    current = torch.cuda.current_stream(views.id.device)
    current.wait_event(done)
    masks = [mask for mask in views.masks or () if mask is not None]
    for tensor in (*views.views, *masks, views.id, views.label):
        tensor.record_stream(current)  # or their memory could be reused by the side stream too early
    return batch, views


def _change(images: Tensor, chosen: Tensor, operation: Callable[..., Tensor], parameter: Tensor | None = None) -> None:
    """Put the result of `operation` in place of the `chosen` images; `chosen`, `parameter`: (N,), on the CPU."""
    rows = chosen.nonzero()[:, 0]
    if rows.shape[0]:
        index = put(rows, images.device)
        arguments = () if parameter is None else (put(parameter[rows], images.device),)
        images.index_copy_(0, index, operation(images.index_select(0, index), *arguments))
