"""What each method's safeguard is for: the papers' ablations on 5,000 CIFAR-10 images, and what jem says of them.

    python benchmarks/ablations.py [--data FOLDER] [--only byol] [--table]

The CPU recipes with one setting changed, for 156 steps of 128 images. The second part is VICReg's tables 4 and 5 in
small: its variance and covariance terms on other methods without their safeguards, and branches that share nothing.
Resumable as benchmarks/methods.py.
"""

from __future__ import annotations

from typing import Any

from trials import Trial, options, selected

from jem.config import METHODS

SHORT = (
    *("--limit", "5000", "--train.batch_size", "128", "--train.epochs", "4", "--evaluation.probe", "null"),
    *("--train.health_every", "20"),
)
HEADER = (
    *("method", "change", "kNN random", "kNN", "gain", "embedding std", "spread", "correlation", "rank of features"),
    "jem says",
)
DINO = (
    *("--method.norm", "false", "--method.momentum", '{"tau": 0.97, "schedule": "constant"}', "--train.epochs", "6"),
)
"""As the paper's head, without batch norm, and with a teacher that has followed by the end of so short a training."""
REGULARISE = ("--method.regularise", '{"mu": 1.0, "nu": 0.04}')
KINDS = {0: "not collapsed", 1: "collapse, type 1", 2: "collapse, type 2"}


def trial(method: str, change: str, *settings: str, recipe: str | None = None) -> Trial:
    """`change` is what the table calls it."""
    name = f"{method}: {change}"
    return Trial(name, recipe or f"{method}-cifar10-cpu", (*SHORT, *settings))


ABLATIONS = (
    trial("vicreg", "as it is"),
    trial("vicreg", "without variance term (μ = 0)", "--method.mu", "0"),
    trial("vicreg", "hinge on the variance, not its root", "--method.hinge", "variance"),
    trial("vicreg", "without covariance term (ν = 0)", "--method.nu", "0"),
    trial("byol", "as it is"),
    trial("byol", "without predictor", "--method.predictor", "null"),
    trial("byol", "without stop-gradient", "--method.stop_gradient", "false"),
    trial("byol", "τ = 0", "--method.momentum", '{"tau": 0.0, "schedule": "constant"}'),
    trial("byol", "τ = 1", "--method.momentum", '{"tau": 1.0, "schedule": "constant"}'),
    trial("simsiam", "as it is"),
    trial("simsiam", "without stop-gradient", "--method.stop_gradient", "false"),
    trial("dino", "as it is", *DINO),
    trial(
        *("dino", "centring alone", *DINO, "--method.teacher_temperature", "0.1"),
        *("--method.first_teacher_temperature", "0.1"),
    ),
    trial("dino", "sharpening alone", *DINO, "--method.centring", "false"),
    trial("moco", "as it is"),
    trial("moco", "m = 0", "--method.momentum", '{"tau": 0.0, "schedule": "constant"}'),
    trial("moco", "no momentum network (memory bank)", "--method.momentum", "null"),
    trial("swav", "as it is"),
    trial("swav", "without Sinkhorn", "--method.iterations", "0"),
)
RESCUES = (
    trial("byol", "without predictor, with variance and covariance", "--method.predictor", "null", *REGULARISE),
    trial("byol", "without stop-gradient, with both", "--method.stop_gradient", "false", *REGULARISE),
    trial("simsiam", "without predictor", "--method.predictor", "null"),
    trial("simsiam", "without predictor, with both", "--method.predictor", "null", *REGULARISE),
    trial("simsiam", "without stop-gradient, with both", "--method.stop_gradient", "false", *REGULARISE),
    trial("vicreg", "separate weights", "--method.branches", "separate"),
    trial(
        *("vicreg", "a ResNet-18 against a ViT-Ti branch", "--method.branches"),
        '[{"name": "resnet18"}, {"name": "vit_tiny", "patch": 8}]',
    ),
)


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [f"| {' | '.join(HEADER)} |", f"|{' --- |' * len(HEADER)}"]
    for row in rows:
        method, _, change = row["name"].partition(": ")
        found, before, after = row["embedding"], row["random"], row["trained"]
        cells = [
            METHODS[method].traits.title,
            change,
            f"{100 * before['knn']:.1f}",
            f"{100 * after['knn']:.1f}",
            f"{100 * (after['knn'] - before['knn']):+.1f}",
            f"{found['std']:.2g}",
            f"{found['spread']:.2f}",
            f"{found['correlation']:.2f}",
            f"{after['rankme']:.0f}",
            KINDS[found["collapse"]],
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(selected((*ABLATIONS, *RESCUES), options("The papers' ablations", "ablations.jsonl"))))
