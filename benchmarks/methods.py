"""Every method with its CPU recipe on 10,000 CIFAR-10 images: what it gains over the random encoder.

    python benchmarks/methods.py [--data FOLDER] [--only simclr moco] [--table]

The same backbone and epochs for all (a ViT where the recipe's name says so, with three seeds), one core each, two at a
time. Resumable: finished rows are kept in benchmarks/methods.jsonl.
"""

from __future__ import annotations

import statistics
from typing import Any

from trials import Trial, options, selected

from jem.config import METHODS, PretrainConfig
from pipelines.settings import load_config, recipe_names

SUFFIX = "-cifar10-cpu"
SEEDS_OF_A_VIT = 3
HEADER = (
    *("recipe", "method", "backbone", "kNN random", "kNN", "gain", "linear random", "linear", "embedding std"),
    *("RankMe", "images/s", "CPU minutes"),
)


def trials() -> list[Trial]:
    """One for each CPU recipe, in the order of the methods' table."""
    order = list(METHODS)
    found = []
    for name in recipe_names():
        if name.endswith(SUFFIX):
            config = load_config(PretrainConfig, ["--recipe", name, "--data", "somewhere"])
            seeds = SEEDS_OF_A_VIT if config.backbone.is_vit else 1
            title = name.removesuffix(SUFFIX)
            found += [(order.index(config.method.name), Trial(title, name, seed=seed)) for seed in range(seeds)]
    return [trial for _, trial in sorted(found, key=lambda each: (each[0], each[1].name, each[1].seed))]


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown; several seeds are one line, mean and range."""
    lines = [f"| {' | '.join(HEADER)} |", f"|{' --- |' * len(HEADER)}"]
    for name in dict.fromkeys(row["name"] for row in rows):
        seeds = [row for row in rows if row["name"] == name]

        def percent(values: list[float]) -> str:
            spread = f" ({100 * min(values):.1f}-{100 * max(values):.1f})" if len(values) > 1 else ""
            return f"{100 * statistics.mean(values):.1f}{spread}"

        first = seeds[0]
        gains = [row["trained"]["knn"] - row["random"]["knn"] for row in seeds]
        cells = [
            name,
            METHODS[first["method"]].traits.title,
            first["backbone"],
            percent([row["random"]["knn"] for row in seeds]),
            percent([row["trained"]["knn"] for row in seeds]),
            f"+{percent(gains)}" if min(gains) > 0 else percent(gains),
            percent([row["random"]["linear"] for row in seeds]),
            percent([row["trained"]["linear"] for row in seeds]),
            f"{statistics.mean(row['embedding']['std'] for row in seeds):.2g}",
            f"{statistics.mean(row['trained']['rankme'] for row in seeds):.0f}",
            f"{statistics.mean(row['images_per_second'] for row in seeds):.0f}",
            f"{statistics.mean(row['seconds'] for row in seeds) / 60:.1f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(selected(trials(), options("Every method with its CPU recipe", "methods.jsonl"))))
