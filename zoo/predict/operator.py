"""Functions on a grid to what the learned operator makes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zoo.errors import DataError
from zoo.files import read_arrays
from zoo.predict import Predictor


class TaskPredictor(Predictor):
    """Maps functions given as a .csv or .npy, one function a line, or as an array [B, N].

    The N values are those at equally spaced nodes 0, 1 / N ... of [0, 1); N may differ from the training's.
    """

    suffixes = (".csv", ".npy")

    def preprocess(self, raw: Any) -> Tensor:
        """A path or array to values [B, N]."""
        if isinstance(raw, (str, Path)):
            raw = _read(raw)
        values = np.atleast_2d(np.asarray(raw, dtype=np.float32))
        if values.ndim != 2 or values.shape[1] < 2 or not np.isfinite(values).all():
            raise DataError(f"functions must be finite numbers [B, N] with N > 1, got {values.shape}")
        return torch.from_numpy(values)

    @torch.no_grad()
    def predict(self, raw: Any) -> dict[str, Any]:
        """`{"functions": count, "nodes": N, "result": [[value at each node] a function]}`."""
        values = self.preprocess(raw)
        n = values.shape[1]
        dtype = next(self.model.parameters()).dtype
        result = self.model(values.to(dtype), torch.arange(n, dtype=dtype) / n)
        return {"functions": len(values), "nodes": n, "result": result.tolist()}

    def rows(self, prediction: dict[str, Any]) -> list[dict[str, Any]]:
        """One row per function and node."""
        n = prediction["nodes"]
        return [
            {"function": i, "x": k / n, "value": value}
            for i, line in enumerate(prediction["result"])
            for k, value in enumerate(line)
        ]

    def format(self, raw: Any, prediction: dict[str, Any]) -> str:
        ends = [f"{min(line):.4g} .. {max(line):.4g}" for line in prediction["result"][:3]]
        return f"{raw}: {prediction['functions']} functions at {prediction['nodes']} nodes, values {'; '.join(ends)}"


def _read(path: str | Path) -> np.ndarray:
    if str(path).endswith(".npy"):
        return read_arrays(path)[0]
    try:
        return np.loadtxt(path, delimiter=",", ndmin=2)
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read functions from {path}: {error}; one line of numbers each") from None
