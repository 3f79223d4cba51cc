"""The linear probe: multinomial logistic regression on frozen features, solved to its optimum by L-BFGS.

The weight decay is chosen on a held-out tenth of the training features. Being convex, the result depends on the
features alone and not on rates, schedules or augmentation, as an online probe's does.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from jem.config import ProbeConfig
from jem.errors import InputError
from jem.evaluate.knn import check_features

_LOGITS = 1 << 24
"""How many logits are held at once: 64 MB in float32."""


@dataclass(frozen=True)
class ProbeResult:
    """What the linear probe found."""

    accuracy: float
    """On the test features, in [0, 1]."""
    train_accuracy: float
    """On the training features, in [0, 1]."""
    weight_decay: float
    """The one that was chosen."""
    validation: dict[float, float]
    """Accuracy on the held-out tenth for each weight decay; empty where there was no choice."""
    iterations: int
    """Of L-BFGS, in the final fit."""


def linear_probe(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    config: ProbeConfig | None = None,
    seed: int = 0,
) -> ProbeResult:
    """Fit a linear classifier on frozen features and score it on others.

    Features are standardised with the mean and standard deviation of `train`. The loss is the mean cross entropy plus
    weight_decay / 2 |W|^2, the bias left free: scikit-learn's LogisticRegression with C = 1 / (N weight_decay).

    Args:
        train: float (N, D), N at least 2.
        train_labels: int64 (N,), 0 or greater.
        test: float (M, D).
        test_labels: int64 (M,), 0 or greater; a class that `train` lacks counts as missed.
        config: the weight decays to try, and the limit on iterations.
        seed: of the choice of the held-out tenth.

    Raises:
        InputError: no features, a missing label, or shapes that do not belong together.
        RunError: a feature is not finite.
    """
    config = config or ProbeConfig()
    check_features(train, train_labels, "the training set")
    check_features(test, test_labels, "the test set")
    if train.shape[1] != test.shape[1]:
        raise InputError(
            f"training features have {train.shape[1]} dimensions and test features {test.shape[1]}: "
            "use features of one encoder"
        )
    if len(train) < 2:
        raise InputError("a linear probe needs 2 training images or more: give a larger training set")
    labels = train_labels.to(train.device)
    classes = int(labels.max()) + 1
    train, test = _standardise(train, test)

    weight, bias = train.new_zeros(classes, train.shape[1]), train.new_zeros(classes)
    # From strong to weak decay, each fit starts from the one before: a third fewer iterations than from zero.
    decays = sorted(set(config.weight_decays), reverse=True)
    validation: dict[float, float] = {}
    if len(decays) > 1:
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed)).to(train.device)
        held_out, kept = order[: max(1, len(order) // 10)], order[max(1, len(order) // 10) :]
        fits = {}
        for decay in decays:
            weight, bias, _ = _fit(train[kept], labels[kept], weight, bias, decay, config.max_iterations)
            fits[decay] = weight, bias
            validation[decay] = _accuracy(train[held_out], labels[held_out], weight, bias)
        chosen = max(decays, key=lambda decay: validation[decay])  # the first, and strongest, of equals
        weight, bias = fits[chosen]
    else:
        chosen = decays[0]
    weight, bias, iterations = _fit(train, labels, weight, bias, chosen, config.max_iterations)
    return ProbeResult(
        accuracy=_accuracy(test, test_labels.to(test.device), weight, bias),
        train_accuracy=_accuracy(train, labels, weight, bias),
        weight_decay=chosen,
        validation=validation,
        iterations=iterations,
    )


def _standardise(train: Tensor, test: Tensor) -> tuple[Tensor, Tensor]:
    """Return both with the mean and deviation of `train` taken out; a constant dimension becomes 0."""
    dtype = torch.float64 if train.dtype == torch.float64 else torch.float32
    mean = train.mean(dim=0, dtype=torch.float64)
    std = torch.stack([column.double().std(unbiased=False) for column in train.T])
    # What varies by rounding only must not be blown up to unit variance.
    constant = std <= 1e-6 * mean.abs() + 1e-30
    inverse = torch.where(constant, 0.0, 1 / std.where(~constant, 1.0)).to(dtype)
    shift = mean.to(dtype)
    return (train.to(dtype) - shift) * inverse, (test.to(train.device, dtype) - shift) * inverse


def _fit(
    features: Tensor, labels: Tensor, weight: Tensor, bias: Tensor, decay: float, iterations: int
) -> tuple[Tensor, Tensor, int]:
    """Minimise mean cross entropy + decay / 2 |W|^2 from the given start.

    The gradient is written out, in blocks of rows, so that memory stays bounded with a million images.
    """
    parameters = torch.cat([weight, bias[:, None]], dim=1).requires_grad_()
    rows = max(1, _LOGITS // len(weight))
    optimizer = torch.optim.LBFGS(
        [parameters],
        max_iter=iterations,
        history_size=10,
        line_search_fn="strong_wolfe",
        tolerance_grad=1e-6,
        tolerance_change=1e-9,
    )

    def closure() -> float:
        loss = 0.0
        with torch.no_grad():
            gradient = torch.zeros_like(parameters)
            for start in range(0, len(features), rows):
                x, y = features[start : start + rows], labels[start : start + rows]
                logits = torch.addmm(parameters[:, -1], x, parameters[:, :-1].T)
                loss += float(functional.cross_entropy(logits, y, reduction="sum"))
                error = logits.softmax(dim=1)
                error[torch.arange(len(y), device=y.device), y] -= 1
                gradient[:, :-1] += error.T @ x
                gradient[:, -1] += error.sum(dim=0)
            gradient /= len(features)
            gradient[:, :-1] += decay * parameters[:, :-1]
            parameters.grad = gradient
            return loss / len(features) + decay / 2 * float(parameters[:, :-1].square().sum())

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    steps = int(optimizer.state[parameters]["n_iter"])
    fitted = parameters.detach()
    return fitted[:, :-1].clone(), fitted[:, -1].clone(), steps


def _accuracy(features: Tensor, labels: Tensor, weight: Tensor, bias: Tensor) -> float:
    return float((torch.addmm(bias, features, weight.T).argmax(dim=1) == labels).double().mean())
