"""Tables to predictions: every row gets one, from the columns that the weights were trained with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from zoo.errors import DataError
from zoo.predict import Predictor
from zoo.tabular.columns import MISSING_WORDS, read_table
from zoo.tabular.outputs import readings
from zoo.tabular.preprocess import Preprocessor

if TYPE_CHECKING:
    import pandas as pd

SUFFIXES = (".csv", ".tsv", ".txt", ".parquet", ".pq", ".csv.gz", ".tsv.gz")
ROWS_AT_ONCE = 4096
SHOWN = 10


class TaskPredictor(Predictor):
    """Predicts the rows of a table given as a path, a DataFrame or one row as a mapping.

    The columns are found by name: their order is of no importance, further columns are ignored, a missing one is an
    error that names it.
    """

    suffixes = SUFFIXES

    def __init__(self, model: nn.Module, card: dict[str, Any]) -> None:
        super().__init__(model, card)
        content = {k: v for k, v in self.preprocessing.items() if k not in ("kind", "features")}
        self.preprocessor = Preprocessor.from_dict(content)
        self.targets = self.preprocessor.schema.targets

    def preprocess(self, raw: Any) -> dict[str, Tensor]:
        """Numbers [N, Fn], codes [N, Fc] and missing [N, Fn] of all rows."""
        arrays = self.preprocessor.encode(self._frame(raw))
        return {k: torch.from_numpy(arrays[k]) for k in ("numerical", "categorical", "missing")}

    def _frame(self, raw: Any) -> pd.DataFrame:
        import pandas as pd

        if isinstance(raw, str | Path):
            return read_table(raw, missing_words=self.preprocessing.get("missing_words", MISSING_WORDS))
        if isinstance(raw, Mapping):
            return pd.DataFrame([dict(raw)])
        if isinstance(raw, pd.DataFrame):
            if raw.columns.duplicated().any():
                name = raw.columns[raw.columns.duplicated()][0]
                raise DataError(f"column name {name!r} occurs more than once; rename")
            if not len(raw):
                raise DataError("the table has no rows")
            return raw
        raise DataError(f"give a path, a DataFrame or one row as a mapping, not {type(raw).__name__}")

    @torch.no_grad()
    def arrays(self, raw: Any) -> list[np.ndarray]:
        """Per target: probability of the second class [N], class probabilities [N, K], or values [N]."""
        inputs = self.preprocess(raw)
        parts = []
        for start in range(0, len(inputs["numerical"]), ROWS_AT_ONCE):
            piece = {k: v[start : start + ROWS_AT_ONCE] for k, v in inputs.items()}
            out = self.model(piece["numerical"], piece["categorical"], piece["missing"])
            parts.append([r.numpy() for r in readings(out, self.targets)])
        return [np.concatenate(p) for p in zip(*parts, strict=True)]

    def predict(self, raw: Any) -> dict[str, Any]:
        """`{"rows": n, "predictions": {target: [...]}, "probability": {target: [...]}}`, plain values."""
        found: dict[str, Any] = {"rows": 0, "predictions": {}, "probability": {}}
        for target, values in zip(self.targets, self.arrays(raw), strict=True):
            found["rows"] = len(values)
            if target.kind == "regression":
                found["predictions"][target.name] = [float(v) for v in values]
                continue
            p = np.stack((1 - values, values), 1) if target.kind == "binary" else values
            best = p.argmax(1)
            found["predictions"][target.name] = [target.classes[i] for i in best]
            found["probability"][target.name] = [round(float(v), 4) for v in p[np.arange(len(p)), best]]
        return found

    def rows(self, prediction: dict[str, Any]) -> list[dict[str, Any]]:
        """One row per row of the table."""
        columns = dict(prediction["predictions"])
        columns |= {f"{name}_probability": values for name, values in prediction["probability"].items()}
        return [
            {"row": n, **dict(zip(columns, cells, strict=True))}
            for n, cells in enumerate(zip(*columns.values(), strict=True))
        ]

    def format(self, raw: Any, prediction: dict[str, Any]) -> str:
        """The first rows, one a line."""
        lines = [f"{raw}: {prediction['rows']} rows"]
        for row in range(min(SHOWN, prediction["rows"])):
            parts = []
            for name, values in prediction["predictions"].items():
                sure = prediction["probability"].get(name)
                value = values[row] if sure else f"{values[row]:.6g}"
                parts.append(f"{name} {value}" + (f" ({sure[row]:.3f})" if sure else ""))
            lines.append(f"  row {row}: {', '.join(parts)}")
        if prediction["rows"] > SHOWN:
            lines.append(f"  ... {prediction['rows'] - SHOWN} more")
        return "\n".join(lines)
