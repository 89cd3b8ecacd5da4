"""Tables of covariates to treatment effects."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zoo.errors import DataError
from zoo.predict import Predictor
from zoo.predict.tabular import SUFFIXES
from zoo.tabular.columns import as_numbers, read_table


class TaskPredictor(Predictor):
    """Expected outcome without and with treatment of every row of a table or array; columns in training order."""

    suffixes = SUFFIXES

    def preprocess(self, raw: Any) -> Tensor:
        """A path, DataFrame or array [N, M] to standardised covariates [N, M]."""
        if isinstance(raw, str | Path):
            if not str(raw).lower().endswith(SUFFIXES):
                raise DataError(f"{raw}: give a .csv, .tsv or .parquet file with one column per covariate")
            raw = read_table(raw)
        if hasattr(raw, "columns"):
            raw = np.stack([as_numbers(raw[c]) for c in raw.columns], 1)
        x, mean = np.asarray(raw, dtype=np.float64), np.array(self.preprocessing["mean"])
        if x.ndim != 2 or x.shape[1] != len(mean):
            raise DataError(
                f"the weights need {len(mean)} covariates per row, got an array of shape {x.shape}"
            )
        if not np.isfinite(x).all():
            raise DataError("covariates hold empty or infinite values; fill them as the training data were")
        return torch.from_numpy((x - mean) / np.array(self.preprocessing["std"])).float()

    @torch.no_grad()
    def predict(self, raw: Any) -> dict[str, Any]:
        """`{"rows": n, "untreated": [...], "treated": [...], "effect": [...], "mean_effect": x}`."""
        context = self.model.encode(self.preprocess(raw))
        p = self.preprocessing
        both = [
            (
                self.model.outcome(context, torch.full((len(context),), t)).double() * p["outcome_std"]
                + p["outcome_mean"]
            )
            for t in (0, 1)
        ]
        effect = both[1] - both[0]
        return {
            "rows": len(effect),
            "untreated": both[0].tolist(),
            "treated": both[1].tolist(),
            "effect": effect.tolist(),
            "mean_effect": float(effect.mean()),
        }

    def rows(self, prediction: dict[str, Any]) -> list[dict[str, Any]]:
        """One row per row of the table."""
        names = ("untreated", "treated", "effect")
        return [
            {"row": n, **dict(zip(names, cells, strict=True))}
            for n, cells in enumerate(zip(*(prediction[k] for k in names), strict=True))
        ]

    def format(self, raw: Any, prediction: dict[str, Any]) -> str:
        return f"{raw}: {prediction['rows']} rows, mean effect {prediction['mean_effect']:.4g}"
