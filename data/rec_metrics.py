"""Ranking and click metrics in which equal scores are counted fairly.

Where other items share the target's score, every order among them is equally likely; the metrics are the expected
values over these orders. A scorer that gives every item the same score thus gets chance level.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from data.errors import DataError

CUTOFFS = (5, 10, 20)


def count_above(scores: Tensor, target: Tensor, excluded: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """How many items are ahead of each target, and how many others share its score.

    Args:
        scores: [B, I], column = item.
        target: The right item, int [B].
        excluded: Items that are not ranked, int [B, S], -1 = none; the target itself is always ranked.

    Returns:
        Items with a higher score [B], other items with the same score [B].

    Raises:
        DataError: A score is not a number.
    """
    if torch.isnan(scores).any():
        raise DataError("scores contain NaN: nothing can be ranked")
    right = scores.gather(1, target[:, None])
    ranked = torch.ones_like(scores, dtype=torch.bool)
    if excluded is not None and excluded.shape[1]:
        # An item may be listed twice, and -1 points at a column of its own.
        ranked = torch.cat((ranked, ranked[:, :1]), 1).scatter_(1, excluded % (scores.shape[1] + 1), False)[
            :, :-1
        ]
        ranked = ranked.scatter(1, target[:, None], True)
    above = ((scores > right) & ranked).sum(1)
    tied = ((scores == right) & ranked).sum(1) - 1
    return above, tied


def ranking_metrics(above: Tensor, tied: Tensor, cutoffs: Sequence[int] = CUTOFFS) -> dict[str, Tensor]:
    """Expected HR, NDCG and MRR at each cutoff, one value per row.

    Args:
        above: Items ahead of the target, int [B].
        tied: Other items with its score, int [B]; the rank is uniform on above + 1 .. above + tied + 1.
        cutoffs: Lengths of the list.

    Returns:
        `hr_at_10`, `ndcg_at_10`, `mrr_at_10` ..., float64 [B].
    """
    deepest = max(cutoffs)
    ranks = torch.arange(1, deepest + 1, dtype=torch.float64, device=above.device)
    zero = ranks.new_zeros(1)
    gains = {
        "hr": torch.ones_like(ranks),
        "ndcg": 1 / torch.log2(ranks + 1),
        "mrr": 1 / ranks,
    }
    out = {}
    for name, gain in gains.items():
        total = torch.cat((zero, gain.cumsum(0)))  # total[r] = gain of ranks 1 .. r
        for k in cutoffs:
            first, last = above.clamp(max=k), (above + tied + 1).clamp(max=k)
            out[f"{name}_at_{k}"] = (total[last] - total[first]) / (tied + 1)
    return out


def midranks(scores: np.ndarray) -> np.ndarray:
    """Ranks from 1; equal scores share the mean of their ranks, so that a tied pair counts one half in the AUC."""
    order = np.argsort(scores, kind="stable")
    ordered = scores[order]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
    ends = np.r_[starts[1:], len(ordered)]
    ranks = np.empty(len(scores))
    ranks[order] = np.repeat((starts + ends + 1) / 2, ends - starts)
    return ranks


def auc(scores: np.ndarray, labels: np.ndarray) -> float:
    """Area under the ROC curve with ties counted half; NaN when only one class is there.

    Args:
        scores: [N].
        labels: 0 or 1, [N].
    """
    scores, labels = np.asarray(scores, np.float64), np.asarray(labels) > 0
    if np.isnan(scores).any():
        raise DataError("scores contain NaN: nothing can be ranked")
    positive = int(labels.sum())
    negative = len(labels) - positive
    if not positive or not negative:
        return float("nan")
    rank_sum = midranks(scores)[labels].sum()
    return float((rank_sum - positive * (positive + 1) / 2) / (positive * negative))


def grouped_auc(
    scores: np.ndarray, labels: np.ndarray, groups: np.ndarray, weights: str = "impressions"
) -> tuple[float, int]:
    """Mean of the groups' AUCs, and how many groups were left out because they hold one class only.

    Args:
        scores: [N].
        labels: 0 or 1, [N].
        groups: Group (user) of each sample, int [N].
        weights: "impressions" weighs a group by its samples, "clicks" by its positives.
    """
    if weights not in ("impressions", "clicks"):
        raise DataError(f"gauc weights {weights!r}: choose impressions or clicks")
    scores, labels = np.asarray(scores, np.float64), np.asarray(labels) > 0
    order = np.argsort(groups, kind="stable")
    bounds = np.flatnonzero(np.r_[True, np.diff(np.asarray(groups)[order]) != 0, True])
    total = weight = 0.0
    skipped = 0
    for start, end in zip(bounds[:-1], bounds[1:], strict=True):
        rows = order[start:end]
        value = auc(scores[rows], labels[rows])
        if np.isnan(value):
            skipped += 1
            continue
        w = end - start if weights == "impressions" else int(labels[rows].sum())
        total, weight = total + w * value, weight + w
    return (total / weight if weight else float("nan")), skipped


def log_loss(logits: np.ndarray, labels: np.ndarray) -> float:
    """Mean negative log-likelihood of labels 0 or 1 under the logits, stable for large ones."""
    logits, labels = np.asarray(logits, np.float64), np.asarray(labels, np.float64)
    return float(np.mean(np.logaddexp(0, logits) - labels * logits))
