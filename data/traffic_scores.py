"""Forecast errors from sums over a whole split; the metric names of the traffic task."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric


class HorizonErrors(Metric):
    """MAE, RMSE and MAPE at chosen steps ahead and over all steps, from sums and counts, never from batch means.

    Args:
        horizon: Q, number of forecast steps.
        steps: Steps ahead, counted from 1, that get their own figures.
        mape_min: Only readings of at least this size count for MAPE.
    """

    full_state_update = False

    def __init__(self, horizon: int, steps: tuple[int, ...], mape_min: float) -> None:
        super().__init__()
        self.steps, self.mape_min = tuple(s for s in steps if s <= horizon), mape_min
        for name in ("absolute", "squared", "count", "relative", "relative_count"):
            self.add_state(name, torch.zeros(horizon, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, prediction: Tensor, target: Tensor, seen: Tensor) -> None:
        """Add a batch.

        Args:
            prediction: [B, Q, N] in the unit of the readings.
            target: [B, Q, N].
            seen: Cells that count, bool [B, Q, N].
        """
        error = (prediction.double() - target.double()).abs().masked_fill(~seen, 0.0)
        large = seen & (target.abs() >= self.mape_min) & (target != 0)
        share = error / target.double().abs().masked_fill(~large, 1.0)
        for state, cells in (
            ("absolute", error),
            ("squared", error.square()),
            ("count", seen),
            ("relative", share.masked_fill(~large, 0.0)),
            ("relative_count", large),
        ):
            total = getattr(self, state)
            total += cells.sum(dim=(0, 2)).to(total.dtype)

    def compute(self) -> dict[str, float]:
        """mae, rmse, mape over all steps, and mae_h<k>, rmse_h<k>, mape_h<k>; mape in per cent, NaN without cells."""
        return horizon_scores(
            self.steps, self.absolute, self.squared, self.count, self.relative, self.relative_count
        )


def horizon_scores(
    steps: tuple[int, ...],
    absolute: Tensor,
    squared: Tensor,
    count: Tensor,
    relative: Tensor,
    relative_count: Tensor,
) -> dict[str, float]:
    """Figures from the sums of each step ahead, [Q] each."""

    def figures(part: slice, suffix: str) -> dict[str, float]:
        cells, large = float(count[part].sum()), float(relative_count[part].sum())
        nan = float("nan")
        return {
            f"mae{suffix}": float(absolute[part].sum()) / cells if cells else nan,
            f"rmse{suffix}": (float(squared[part].sum()) / cells) ** 0.5 if cells else nan,
            f"mape{suffix}": 100 * float(relative[part].sum()) / large if large else nan,
        }

    scores = figures(slice(None), "")
    for step in steps:
        scores |= figures(slice(step - 1, step), f"_h{step}")
    return scores


def score(
    prediction: np.ndarray, target: np.ndarray, steps: tuple[int, ...], mape_min: float
) -> dict[str, float]:
    """The figures of forecasts [S, Q, N] against readings [S, Q, N], NaN where missing."""
    metric = HorizonErrors(target.shape[1], steps, mape_min)
    for part in range(0, len(target), 4096):
        truth = torch.from_numpy(np.ascontiguousarray(target[part : part + 4096]))
        seen = ~truth.isnan()
        metric.update(
            torch.from_numpy(np.ascontiguousarray(prediction[part : part + 4096])), truth.nan_to_num(), seen
        )
    return metric.compute()
