"""Memories of embeddings: a queue of the latest, and a bank with one row for each image.

Both are buffers, so a checkpoint holds them, and every worker holds the whole of them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from jem.errors import InputError


class Queue(nn.Module):
    """The latest `size` rows, first in, first out; `size` is a multiple of what is put in at a time."""

    rows: Tensor
    """(size, dim); the oldest is at `place`."""
    place: Tensor
    """int64 scalar, where the next rows go."""
    filled: Tensor
    """int64 scalar, how many rows were put in, at most `size`."""

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("rows", torch.zeros(size, dim))
        self.register_buffer("place", torch.zeros((), dtype=torch.int64))
        self.register_buffer("filled", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def put(self, rows: Tensor) -> None:
        """Replace the oldest rows by `rows`, (n, dim), the global batch's; n divides `size`."""
        size, count = self.rows.shape[0], rows.shape[0]
        if size % count:
            raise ValueError(f"a queue of {size} rows takes a divisor of it at a time, not {count}")
        where = (self.place + torch.arange(count, device=self.rows.device)) % size
        self.rows[where] = rows.detach().to(self.rows.dtype)
        self.place.copy_((self.place + count) % size)
        self.filled.copy_((self.filled + count).clamp(max=size))


class Bank(nn.Module):
    """One row for each image of the data set, found by its id."""

    rows: Tensor
    """(images, dim)."""
    seen: Tensor
    """bool (images,), whether a row was ever put there."""

    def __init__(self, images: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("rows", torch.zeros(images, dim))
        self.register_buffer("seen", torch.zeros(images, dtype=torch.bool))

    def check(self, ids: Tensor) -> None:
        """Refuse ids that have no row; waits for the device.

        Raises:
            InputError: an id is negative, or not less than the number of images.
        """
        low, high = (int(x) for x in ids.aminmax())
        if low < 0 or high >= len(self.rows):
            raise InputError(
                f"the data set has {len(self.rows)} images and an id {high if low >= 0 else low}: this method keeps a "
                "row for each id, so they must be 0 ... images - 1; ingest the data set again (jem ingest)"
            )

    @torch.no_grad()
    def put(self, ids: Tensor, rows: Tensor) -> None:
        """Put `rows`, (n, dim), at `ids`, (n,), the global batch's; an id that comes twice gets one of its rows."""
        self.rows[ids] = rows.detach().to(self.rows.dtype)
        self.seen[ids] = True
