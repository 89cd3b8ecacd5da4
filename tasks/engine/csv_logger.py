"""metrics.csv that survives a resume.

Lightning's CSVLogger deletes what it finds in its folder. This one keeps the rows up to the step from which a run
continues, so the file reads as if the run had never stopped.
"""

from __future__ import annotations

import csv
import io
from argparse import Namespace
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from tasks.engine.folder import write_atomic


class MetricsCsv(Logger):
    """Writes one row per step and split to <folder>/metrics.csv, each as it comes.

    Args:
        folder: Run folder.
    """

    def __init__(self, folder: str | Path) -> None:
        super().__init__()
        self.path = Path(folder) / "metrics.csv"
        self._rows: list[dict[str, Any]] = []
        self._columns: list[str] = ["step"]
        self._written = 0
        self._header_is_old = True
        if self.path.exists():
            # A killed process may leave half a row at the end: what has no line end does not count.
            whole = [line for line in self.path.read_text().splitlines(keepends=True) if line.endswith("\n")]
            self._rows = [{k: v for k, v in row.items() if v} for row in csv.DictReader(whole)]
            self._extend_columns(*self._rows)

    @property
    def name(self) -> str:
        return "csv"

    @property
    def version(self) -> str:
        return "0"

    @property
    def save_dir(self) -> str:
        return str(self.path.parent)

    def rewind(self, step: int, last: dict[str, float] | None = None) -> None:
        """Forget rows from `step` on: the run continues there.

        Args:
            step: First step that will run again.
            last: Metrics of the step before, which a checkpoint holds because it is saved before they are logged.
        """
        self._rows = [row for row in self._rows if int(row["step"]) < step]
        own = set(last or ()) - {"epoch"}  # validation rows have an epoch as well
        if last and not any(int(row["step"]) == step - 1 and row.keys() & own for row in self._rows):
            self._rows.append({"step": step - 1, **last})
            self._extend_columns(last)
        self._header_is_old = True
        self.save()

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self._rows.append({"step": step, **metrics})
        self._extend_columns(metrics)

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        pass  # The run folder holds the resolved configuration.

    @rank_zero_only
    def save(self) -> None:
        """Append what is new; write the file anew only when a column came up."""
        if self._header_is_old:
            write_atomic(self.path, lambda p: p.write_text(self._text(self._rows, header=True)))
        elif self._written < len(self._rows):
            with open(self.path, "a", newline="") as file:
                file.write(self._text(self._rows[self._written :], header=False))
        self._written, self._header_is_old = len(self._rows), False

    @rank_zero_only
    def finalize(self, status: str) -> None:
        self.save()

    def _extend_columns(self, *rows: dict[str, Any]) -> None:
        for row in rows:
            fresh = [key for key in row if key not in self._columns]
            self._columns += fresh
            self._header_is_old |= bool(fresh)

    def _text(self, rows: list[dict[str, Any]], *, header: bool) -> str:
        text = io.StringIO()
        writer = csv.DictWriter(text, self._columns, restval="")
        if header:
            writer.writeheader()
        writer.writerows(rows)
        return text.getvalue()
