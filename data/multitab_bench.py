"""MultiTab-Bench: simulated regressions that share their inputs to a chosen degree.

Source: "MultiTab: multitask learning on tabular data", arXiv:2511.09970.
Differs from it in: a table has 20,000 rows by default instead of a million; targets are standardised, since otherwise
the highest polynomial dominates the summed error.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from data import register_data
from data.base import DataError, check_at_least
from data.tabular_table import TabularData

if TYPE_CHECKING:
    import pandas as pd


def task_directions(tasks: int, features: int, correlation: float, draw: np.random.RandomState) -> np.ndarray:
    """Unit vectors w_i [tasks, features] with w_i . w_j = correlation for i != j.

    Raises:
        DataError: More tasks than features, or a correlation that no such vectors have.
    """
    if tasks > features:
        raise DataError(f"data: {tasks} tasks need at least as many features, got {features}")
    lowest = -1 / (tasks - 1) if tasks > 1 else -1.0
    if not lowest <= correlation <= 1:
        raise DataError(
            f"data.correlation={correlation} is out of range: {tasks} tasks allow {lowest:.3f} .. 1"
        )
    orthonormal = np.linalg.qr(draw.normal(size=(features, tasks)))[0].T
    wanted = np.full((tasks, tasks), correlation) + (1 - correlation) * np.eye(tasks)
    values, vectors = np.linalg.eigh(wanted)
    return vectors @ np.diag(np.sqrt(values.clip(0))) @ orthonormal


@register_data("multitab_bench")
class MultiTabBenchData(TabularData):
    """y_i = z + z^2 + ... + z^d_i + noise with z = x . w_i, x normal, and directions w_i with a given correlation.

    Args:
        rows: Rows of the table.
        features: Inputs.
        degrees: Polynomial degree of each task.
        correlation: w_i . w_j for i != j.
        noise: Standard deviation of the noise, on the scale of y.
        tasks: Numbers of the tasks to predict; all when left out. Inputs do not depend on it.
        common: Options of :class:`data.tabular_table.TabularData`.
    """

    licence = "generated"

    def __init__(
        self,
        *,
        rows: int = 20_000,
        features: int = 32,
        degrees: Sequence[int] = (1, 3, 2, 3, 4, 2, 3),
        correlation: float = 0.4,
        noise: float = 0.01,
        tasks: Sequence[int] | None = None,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        check_at_least(10, rows=rows)
        check_at_least(0, noise=noise)
        check_at_least(1, features=features, tasks=len(degrees), degree=min(degrees, default=0))
        for task in tasks or ():
            if not 0 <= task < len(degrees):
                raise DataError(f"data.tasks holds {task}; there are tasks 0 .. {len(degrees) - 1}")
        self.rows, self.features, self.degrees = rows, features, list(degrees)
        self.correlation, self.noise = correlation, noise
        self.tasks = list(range(len(degrees))) if tasks is None else list(tasks)

    def read(self) -> pd.DataFrame:
        """Generate from ``split_seed``: the same table for all seeds of a comparison."""
        import pandas as pd

        draw = np.random.RandomState(self.split_seed)
        directions = task_directions(len(self.degrees), self.features, self.correlation, draw)
        x = draw.normal(size=(self.rows, self.features))
        frame = pd.DataFrame(x, columns=[f"x{i}" for i in range(self.features)])
        for i, (w, degree) in enumerate(zip(directions, self.degrees, strict=True)):
            z = x @ w
            noise = self.noise * draw.normal(size=self.rows)
            if i in self.tasks:
                frame[f"y{i}"] = sum(z**power for power in range(1, degree + 1)) + noise
        return frame

    def target_columns(self) -> list[str]:
        """The chosen tasks."""
        return [f"y{i}" for i in self.tasks]

    def target_kinds(self) -> Mapping[str, str]:
        """Numbers."""
        return dict.fromkeys(self.target_columns(), "regression")
