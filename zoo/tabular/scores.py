"""Scores of predictions, one definition for models and baselines alike."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Array = np.ndarray
MAIN = {"binary": ("auc", "max"), "multiclass": ("accuracy", "max"), "regression": ("rmse", "min")}
"""Score by which a target's model is chosen, and which way is better."""


def auc(score: Array, positive: Array) -> float:
    """Area under the ROC curve, ties counted half; NaN where one class is absent.

    Args:
        score: Larger means more likely positive, [N].
        positive: bool [N].
    """
    positive = positive.astype(bool)
    n_pos = int(positive.sum())
    n_neg = len(positive) - n_pos
    if not n_pos or not n_neg:
        return float("nan")
    _, inverse, counts = np.unique(score, return_inverse=True, return_counts=True)
    rank = np.cumsum(counts) - (counts - 1) / 2
    return float((rank[inverse][positive].sum() - n_pos * (n_pos + 1) / 2) / (n_pos * n_neg))


def average_precision(score: Array, positive: Array) -> float:
    """Area under the precision-recall curve by steps, tied scores together; NaN without positives."""
    positive = positive.astype(bool)
    if not positive.any():
        return float("nan")
    order = np.argsort(-score, kind="stable")
    hits = np.cumsum(positive[order])
    last = np.append(np.diff(score[order]) != 0, True)
    precision = (hits / np.arange(1, len(score) + 1))[last]
    recall = hits[last] / hits[-1]
    return float((np.diff(recall, prepend=0.0) * precision).sum())


def score_target(kind: str, prediction: Array, truth: Array) -> dict[str, float]:
    """All scores of one target.

    Args:
        kind: "binary", "multiclass" or "regression".
        prediction: Probability of the second class [N], class probabilities [N, K], or values [N].
        truth: Class numbers [N] or values [N].

    Returns:
        auc, ap, accuracy, log_loss; accuracy, f1_macro, auc, log_loss; or rmse, mae, r2.
    """
    prediction, truth = np.asarray(prediction, dtype=np.float64), np.asarray(truth)
    if kind == "regression":
        error = prediction - truth
        spread = float(((truth - truth.mean()) ** 2).sum())
        return {
            "rmse": float(np.sqrt((error**2).mean())),
            "mae": float(np.abs(error).mean()),
            "r2": 1.0 - float((error**2).sum()) / spread if spread else float("nan"),
        }
    truth = truth.astype(int)
    if kind == "binary":
        p = prediction.clip(1e-7, 1 - 1e-7)
        return {
            "auc": auc(prediction, truth == 1),
            "ap": average_precision(prediction, truth == 1),
            "accuracy": float(((prediction > 0.5) == truth).mean()),
            "log_loss": float(-np.where(truth == 1, np.log(p), np.log1p(-p)).mean()),
        }
    chosen = prediction.argmax(1)
    own = prediction[np.arange(len(truth)), truth].clip(1e-7)
    f1, areas = [], []
    for k in np.unique(truth):
        hit = ((chosen == k) & (truth == k)).sum()
        f1.append(2 * hit / max(1, (chosen == k).sum() + (truth == k).sum()))
        areas.append(auc(prediction[:, k], truth == k))
    return {
        "accuracy": float((chosen == truth).mean()),
        "f1_macro": float(np.mean(f1)),
        "auc": float(np.nanmean(areas)) if not np.isnan(areas).all() else float("nan"),
        "log_loss": float(-np.log(own).mean()),
    }


def interval(
    kind: str, prediction: Array, truth: Array, *, repeats: int = 200, level: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Bootstrap interval over rows of a target's main score (`MAIN`): its two percentiles."""
    prediction, truth = np.asarray(prediction, dtype=np.float64), np.asarray(truth)
    main: dict[str, Callable[[Array, Array], float]] = {
        "binary": lambda p, y: auc(p, y == 1),
        "multiclass": lambda p, y: float((p.argmax(1) == y).mean()),
        "regression": lambda p, y: float(np.sqrt(((p - y) ** 2).mean())),
    }
    draw = np.random.default_rng(seed)
    values = []
    for _ in range(repeats):
        rows = draw.integers(0, len(truth), len(truth))
        values.append(main[kind](prediction[rows], truth[rows]))
    tail = (1 - level) / 2
    low, high = np.nanquantile(values, [tail, 1 - tail])
    return float(low), float(high)
