"""Ranking and click metrics against brute force on random data with many ties."""

import itertools
import math

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from data.errors import DataError
from data.rec_metrics import auc, count_above, grouped_auc, log_loss, ranking_metrics


def _brute_force(scores: list[int], target: int, allowed: list[int], k: int) -> tuple[float, float, float]:
    """HR, NDCG and MRR averaged over every order that agrees with the scores."""
    sums = np.zeros(3)
    orders = [
        o
        for o in itertools.permutations(allowed)
        if all(scores[a] >= scores[b] for a, b in itertools.pairwise(o))
    ]
    for order in orders:
        rank = order.index(target) + 1
        if rank <= k:
            sums += (1, 1 / math.log2(rank + 1), 1 / rank)
    return tuple(sums / len(orders))


def test_metrics_equal_the_mean_over_all_orders_of_ties() -> None:
    rng = np.random.default_rng(0)
    for _ in range(25):
        scores = rng.integers(0, 3, 6)
        target = int(rng.integers(6))
        excluded = [int(i) for i in rng.choice(6, 2, replace=False)]
        allowed = [i for i in range(6) if i == target or i not in excluded]
        above, tied = count_above(
            torch.tensor(scores[None]).float(),
            torch.tensor([target]),
            torch.tensor([[-1, *excluded, excluded[0]]]),
        )
        values = ranking_metrics(above, tied, (2, 3, 10))
        for k in (2, 3, 10):
            expected = _brute_force(scores.tolist(), target, allowed, k)
            found = [float(values[f"{name}_at_{k}"]) for name in ("hr", "ndcg", "mrr")]
            assert found == pytest.approx(expected)


def test_constant_scorer_gets_chance() -> None:
    items = 40
    above, tied = count_above(torch.zeros(3, items), torch.tensor([0, 7, 39]))
    values = ranking_metrics(above, tied, (5, 10))
    assert values["hr_at_10"].tolist() == pytest.approx([10 / items] * 3)
    assert values["mrr_at_5"][0] == pytest.approx(sum(1 / r for r in range(1, 6)) / items)


def test_batch_of_random_scores_equals_sorting() -> None:
    torch.manual_seed(1)
    scores, target = torch.randn(50, 30), torch.randint(30, (50,))
    above, tied = count_above(scores, target)
    rank = (scores.argsort(1, descending=True) == target[:, None]).nonzero()[:, 1] + 1
    assert tied.max() == 0 and torch.equal(above + 1, rank)
    assert torch.equal(ranking_metrics(above, tied, (10,))["hr_at_10"], (rank <= 10).double())


def test_nan_scores_are_refused() -> None:
    scores = torch.zeros(1, 3)
    scores[0, 2] = float("nan")
    with pytest.raises(DataError, match="NaN"):
        count_above(scores, torch.tensor([0]))
    with pytest.raises(DataError, match="NaN"):
        auc(np.array([0.0, np.nan]), np.array([0, 1]))


@pytest.mark.parametrize("levels", [2, 5, 1000])
def test_auc_equals_pairs_and_scikit(levels: int) -> None:
    rng = np.random.default_rng(levels)
    scores, labels = rng.integers(0, levels, 120).astype(float), rng.integers(0, 2, 120)
    pairs = scores[labels == 1][:, None] - scores[labels == 0][None]
    assert auc(scores, labels) == pytest.approx(((pairs > 0) + 0.5 * (pairs == 0)).mean())
    assert auc(scores, labels) == pytest.approx(roc_auc_score(labels, scores))


def test_auc_of_constant_and_of_one_class() -> None:
    assert auc(np.ones(9), np.arange(9) % 2) == 0.5
    assert math.isnan(auc(np.arange(3.0), np.ones(3)))


@pytest.mark.parametrize("weights", ["impressions", "clicks"])
def test_grouped_auc_equals_a_loop(weights: str) -> None:
    rng = np.random.default_rng(3)
    scores, labels, users = (
        rng.integers(0, 4, 300).astype(float),
        rng.integers(0, 2, 300),
        rng.integers(0, 60, 300),
    )
    total = weight = dropped = 0.0
    for user in np.unique(users):
        rows = users == user
        if labels[rows].min() == labels[rows].max():
            dropped += 1
            continue
        w = rows.sum() if weights == "impressions" else labels[rows].sum()
        total, weight = total + w * roc_auc_score(labels[rows], scores[rows]), weight + w
    value, skipped = grouped_auc(scores, labels, users, weights)
    assert value == pytest.approx(total / weight) and skipped == dropped > 0


def test_log_loss_of_extreme_logits_is_finite() -> None:
    assert log_loss(np.array([1000.0, -1000.0]), np.array([1, 1])) == pytest.approx(500.0)
    assert log_loss(np.zeros(4), np.array([0, 1, 1, 0])) == pytest.approx(math.log(2))
