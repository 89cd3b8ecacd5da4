"""`train.py` in this process, and the curve that it wrote."""

import csv
import sys
from pathlib import Path

from hydra.core.global_hydra import GlobalHydra


def run(*overrides: str) -> int:
    """Exit status of `python train.py OVERRIDES`."""
    import train

    GlobalHydra.instance().clear()
    argv, sys.argv = sys.argv, ["train.py", *overrides]
    try:
        return train.entry()
    finally:
        sys.argv = argv


def logged(folder: Path, column: str = "train/loss") -> dict[int, str]:
    """What metrics.csv holds of a column, as written, by step."""
    with (folder / "metrics.csv").open(newline="") as file:
        return {int(row["step"]): row[column] for row in csv.DictReader(file) if row.get(column)}


def losses(folder: Path) -> list[float]:
    """Training losses in order."""
    return [float(value) for value in logged(folder).values()]
