"""What the differences in a leaderboard mean: ranks with critical difference, paired bootstrap, one index over tasks.

Scores are oriented: larger is better. A block is a task (with its data); the score of a variant in it is the mean over its seeds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.stats import friedmanchisquare, rankdata, studentized_range

Scores = dict[str, dict[str, float]]  # block -> variant -> oriented score


@dataclass(frozen=True)
class Ranking:
    """Friedman test and Nemenyi's critical difference over the blocks in which every compared variant has a score.

    Attributes:
        ranks: Mean rank by variant, 1 is best; ties share.
        blocks: Number of blocks.
        p: Friedman's p; None with fewer than 3 variants or 2 blocks.
        critical: Difference of mean ranks beyond which two variants differ at 5 %; None where p is.
    """

    ranks: dict[str, float]
    blocks: int
    p: float | None
    critical: float | None

    @property
    def tied_with_best(self) -> list[str]:
        """Variants that the data cannot tell from the best one."""
        if self.critical is None:
            return list(self.ranks)
        best = min(self.ranks.values())
        return [v for v, r in self.ranks.items() if r - best < self.critical]


def rank(scores: Scores) -> Ranking | None:
    """Rank the variants that have a score in every block (Demsar, JMLR 2006); None if fewer than two have."""
    blocks = list(scores.values())
    variants = [v for v in blocks[0] if all(v in b for b in blocks)] if blocks else []
    if len(variants) < 2:
        return None
    table = np.array([[b[v] for v in variants] for b in blocks])
    ranks = rankdata(-table, axis=1).mean(0)
    p = critical = None
    k, n = len(variants), len(blocks)
    if k >= 3 and n >= 2:
        statistic = friedmanchisquare(*table.T)
        p = float(statistic.pvalue) if math.isfinite(statistic.pvalue) else 1.0  # all tied
        critical = float(
            studentized_range.ppf(0.95, k, np.inf) / math.sqrt(2) * math.sqrt(k * (k + 1) / (6 * n))
        )
    order = np.argsort(ranks, kind="stable")
    return Ranking({variants[i]: float(ranks[i]) for i in order}, n, p, critical)


def paired_bootstrap(
    ours: dict[int, float], theirs: dict[int, float], draws: int = 10_000
) -> tuple[float, float, float] | None:
    """Mean difference over the seeds that both have, with a 95 % bootstrap interval; None with fewer than 3 seeds."""
    seeds = sorted(ours.keys() & theirs.keys())
    if len(seeds) < 3:
        return None
    difference = np.array([ours[s] - theirs[s] for s in seeds])
    picks = np.random.default_rng(0).integers(len(seeds), size=(draws, len(seeds)))
    low, high = np.quantile(difference[picks].mean(1), (0.025, 0.975))
    return float(difference.mean()), float(low), float(high)


def compositional_index(metrics: dict[str, Scores]) -> dict[str, tuple[float, int]]:
    """CAB's index (arXiv:2210.07661): z-scores across variants per metric, mean over a task's metrics, mean over tasks.

    Args:
        metrics: task -> metric -> variant -> oriented score; deviations are those of the population.

    Returns:
        Index and number of tasks by variant, best first; tasks with a single variant say nothing and are left out.
    """
    per_task: dict[str, list[float]] = {}
    for of_task in metrics.values():
        z: dict[str, list[float]] = {}
        for scores in of_task.values():
            values = np.array(list(scores.values()))
            if len(values) < 2:
                continue
            deviation = values.std()
            for variant, value in scores.items():
                z.setdefault(variant, []).append((value - values.mean()) / deviation if deviation else 0.0)
        for variant, values in z.items():
            per_task.setdefault(variant, []).append(float(np.mean(values)))
    found = {v: (float(np.mean(z)), len(z)) for v, z in per_task.items()}
    return dict(sorted(found.items(), key=lambda item: -item[1][0]))
