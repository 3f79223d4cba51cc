"""InfoNCE, which SimCLR and MoCo have in common.

van den Oord, Li, Vinyals, "Representation learning with contrastive predictive coding", 2018. With beta = 1 / T and
h_0 the positive among the candidates h_n of an anchor h:

    -log(exp(beta sim(h, h_0)) / sum_n exp(beta sim(h, h_n))) = -beta sim(h, h_0) + log sum_n exp(beta sim(h, h_n))
"""

from __future__ import annotations

from torch import Tensor


def info_nce(logits: Tensor, positives: Tensor) -> tuple[Tensor, Tensor]:
    """The two terms of the energy, averaged over the anchors; their sum is the cross entropy.

    Args:
        logits: beta times the cosine similarity of each anchor to its candidates, (n, C); -inf for what is none.
        positives: column of each anchor's positive, int64 (n,).

    Returns:
        Attraction and repulsion: -beta sim of the positive pairs, and the logarithm of the sum over all candidates, the
        positive among them.
    """
    return -logits.gather(1, positives[:, None]).mean(), logits.logsumexp(dim=1).mean()
