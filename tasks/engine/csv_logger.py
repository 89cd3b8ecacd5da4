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
    """Writes one row per step and split to <folder>/metrics.csv.

    Args:
        folder: Run folder.
        flush_every: Rows kept in memory between writes.
    """

    def __init__(self, folder: str | Path, flush_every: int = 50) -> None:
        super().__init__()
        self.path = Path(folder) / "metrics.csv"
        self.flush_every = flush_every
        self._rows: list[dict[str, Any]] = []
        self._columns: list[str] = ["step"]
        self._unsaved = 0
        if self.path.exists():
            with open(self.path, newline="") as file:
                self._rows = [{k: v for k, v in row.items() if v} for row in csv.DictReader(file)]
            for row in self._rows:
                self._columns += [k for k in row if k not in self._columns]

    @property
    def name(self) -> str:
        return "csv"

    @property
    def version(self) -> str:
        return "0"

    @property
    def save_dir(self) -> str:
        return str(self.path.parent)

    def rewind(self, step: int) -> None:
        """Forget rows after `step`: the run continues from there."""
        self._rows = [row for row in self._rows if int(row["step"]) < step]
        self._unsaved += 1
        self.save()

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self._rows.append({"step": step, **metrics})
        self._columns += [k for k in metrics if k not in self._columns]
        self._unsaved += 1
        if self._unsaved >= self.flush_every:
            self.save()

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        pass  # The run folder holds the resolved configuration.

    @rank_zero_only
    def save(self) -> None:
        if not self._unsaved:
            return
        text = io.StringIO()
        writer = csv.DictWriter(text, self._columns, restval="")
        writer.writeheader()
        writer.writerows(self._rows)
        write_atomic(self.path, lambda p: p.write_text(text.getvalue()))
        self._unsaved = 0

    @rank_zero_only
    def finalize(self, status: str) -> None:
        self.save()
