"""`jem methods`: what there is to choose from. The README's table is its output."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jem.config import METHODS

if TYPE_CHECKING:
    from jem.config import MethodsConfig

HEADER = ("method", "title", "family", "prevents collapse by", "needs", "paper")


def list_methods(config: MethodsConfig) -> list[tuple[str, ...]]:
    """Print the table of methods."""
    rows: list[tuple[str, ...]] = [
        (
            name,
            settings.traits.title,
            settings.traits.family,
            settings.traits.prevents,
            ", ".join(settings.traits.needs),
            settings.traits.paper,
        )
        for name, settings in METHODS.items()
    ]
    if config.markdown:
        print(f"| {' | '.join(HEADER)} |")
        print(f"|{' --- |' * len(HEADER)}")
        for name, *others in rows:
            print(f"| {' | '.join([f'`{name}`', *others])} |")
    else:
        widths = [max(len(row[column]) for row in (HEADER, *rows)) for column in range(len(HEADER))]
        for row in (HEADER, *rows):
            print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    return rows
