"""`jem preview`: a picture of the views that a recipe makes of a data set's images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from jem.errors import InputError
from pipelines.command import main_for

if TYPE_CHECKING:
    from jem.config import PreviewConfig


@dataclass(frozen=True)
class PreviewResult:
    """What was drawn."""

    path: Path
    images: int
    views: int


def preview(config: PreviewConfig) -> PreviewResult:
    """Draw some images of `config.data`, chosen by the seed, and their views, to the PNG file `config.out`.

    Raises:
        InputError: no such data, or OUT exists already or cannot be written.
        RunError: an image that cannot be decoded.
    """
    from jem.augment.preview import preview as draw_preview
    from jem.augment.views import Augment, generator
    from jem.data.index import open_index
    from jem.data.read import read_rows

    out = _writable(config)
    index = open_index(config.data, config.limit)
    count = min(config.images, len(index))
    rows = np.sort(np.random.default_rng(abs(config.seed)).choice(len(index), count, replace=False))
    batch = read_rows(index, rows, config.stream.canvas, config.stream.pixel_limit)
    augment = Augment(config.augment)
    picture = draw_preview(batch, augment, generator(config.seed, 0, 0, 0))

    partial = out.with_name(f".{out.name}.part")
    try:
        picture.save(partial, "PNG")
        partial.replace(out)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise InputError(f"cannot write {out} ({error.strerror}): give another file") from error
    print(f"{out}: {count} of {len(index):,} images, {len(augment.views)} views of each")
    return PreviewResult(out, count, len(augment.views))


def _writable(config: PreviewConfig) -> Path:
    out = Path(config.out).expanduser()
    if out.is_dir():
        raise InputError(f"{out} is a folder: give the name of a PNG file, such as {out / 'views.png'}")
    if out.suffix.lower() != ".png":
        raise InputError(f"{out} is not named as a PNG file: give a name that ends in .png")
    if out.exists() and not config.overwrite:
        raise InputError(f"{out} exists: give another name, or --overwrite to replace it")
    if not out.parent.is_dir():
        raise InputError(f"no folder {out.parent}: make it, or give another name")
    return out


if __name__ == "__main__":
    raise SystemExit(main_for("preview"))
