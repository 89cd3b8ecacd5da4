"""What a solver's users look at: fields beside reference and error, loss terms and weights over the steps."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data.problems.baselines import centred


def draw(task: Any, folder: Path) -> list[Path]:
    """Write fields.png, and history.png where the run left a metrics.csv; returns the files."""
    import matplotlib

    matplotlib.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    whole = math.prod(task.data.grid_shape)
    # A run that was told to look at a few batches only has no whole grid to draw.
    if getattr(task, "_test_fields", None) is not None and len(task._test_fields[0]) == whole:
        files.append(_fields(task, folder / "fields.png"))
    table = folder.parent / "metrics.csv"
    if table.is_file():
        files += _history(table, folder / "history.png")
    return files


def _fields(task: Any, path: Path) -> Path:
    import matplotlib.pyplot as plt

    found, true = (t.numpy() for t in task._test_fields)
    p, shape = task.problem, task.data.grid_shape
    names = p.report_fields
    figure, axes = plt.subplots(
        len(names), 3, figsize=(12, 3.2 * len(names)), squeeze=False, layout="constrained"
    )
    for row, name in enumerate(names):
        a, b = found[:, row], true[:, row]
        if name in p.free_constant:
            times = p.times(task.data.grid)
            a, b = (centred(torch.from_numpy(v), times).numpy() for v in (a, b))
        a, b = (_slice(v, shape) for v in (a, b))
        low, high = float(b.min()), float(b.max())
        for axis, image, title, limits in zip(
            axes[row],
            (b, a, np.abs(a - b)),
            (f"{name}: reference", f"{name}: network", f"{name}: |error|"),
            ((low, high), (low, high), (None, None)),
            strict=True,
        ):
            if image.ndim == 1:
                axis.plot(image)
            else:
                drawn = axis.imshow(
                    image.T,
                    origin="lower",
                    aspect="auto",
                    vmin=limits[0],
                    vmax=limits[1],
                    extent=(p.lower[0], p.upper[0], p.lower[1], p.upper[1]),
                )
                figure.colorbar(drawn, ax=axis)
                axis.set_xlabel(p.coordinates[0])
                axis.set_ylabel(p.coordinates[1])
            axis.set_title(title)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def _slice(values: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """First two axes; of the others (time) the last entry. Scattered points stay a curve."""
    if len(shape) < 2:
        return values
    grid = values.reshape(shape)
    while grid.ndim > 2:
        grid = grid[..., -1]
    return grid


def _history(table: Path, path: Path) -> list[Path]:
    import matplotlib.pyplot as plt

    with table.open() as file:
        rows = list(csv.DictReader(file))
    groups = {"train/": "loss terms", "weight/": "weights", "unknown/": "unknowns"}
    columns = {g: [c for c in (rows[0] if rows else {}) if c.startswith(g)] for g in groups}
    shown = [g for g in groups if columns[g]]
    if not shown:
        return []
    figure, axes = plt.subplots(
        1, len(shown), figsize=(5 * len(shown), 3.4), squeeze=False, layout="constrained"
    )
    for axis, group in zip(axes[0], shown, strict=True):
        for column in columns[group]:
            points = [
                (int(float(r["step"])), float(r[column])) for r in rows if r.get(column) and r.get("step")
            ]
            if points:
                axis.plot(*zip(*points, strict=True), label=column.removeprefix(group), linewidth=0.8)
        if group != "unknown/":
            axis.set_yscale("log")
        axis.set_title(groups[group])
        axis.set_xlabel("step")
        axis.legend(fontsize=7)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return [path]
