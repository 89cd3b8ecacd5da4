"""Evaluate a trained solver on a grid or at points and write the fields as .npz, .csv or .vtk.

Inputs: `grid:50x100` (points per coordinate over the trained box), a .csv whose header names the coordinates, or an .npz
with one array per coordinate. `--out FILE` chooses where the fields go: .npz, .csv, or .vtk / .vtu if meshio is there.
"""

from __future__ import annotations

import csv
import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from zoo.errors import ConfigError, DataError, unknown
from zoo.files import read_arrays, write_whole
from zoo.layers.derivatives import Derivatives, derivatives, multi_index
from zoo.predict import COMMON_OPTIONS, Predictor

_SUFFIXES = (".npz", ".csv", ".vtk", ".vtu")
MOST_POINTS = 100_000_000


class TaskPredictor(Predictor):
    """Fields of a trained network at the points asked for."""

    out: Path | None = None

    def options(self, given: dict[str, str]) -> list[str]:
        for name, value in given.items():
            if name != "out":
                raise unknown("option of predict:", f"--{name}", ("--out", *COMMON_OPTIONS))
            self.out = Path(value)
            if self.out.suffix not in _SUFFIXES:
                raise ConfigError(f"--out {value}: choose a file ending in {', '.join(_SUFFIXES)}")
        return []

    @property
    def about(self) -> dict[str, Any]:
        """Names and box of the trained problem."""
        return self.preprocessing

    def inputs(self, arguments: list[str]) -> Any:
        if self.out is not None and len(arguments) > 1:
            raise ConfigError(
                f"--out {self.out} is one file, but there are {len(arguments)} inputs; give one at a time"
            )
        yield from arguments

    def preprocess(self, raw: Any) -> torch.Tensor:
        """`grid:AxB...`, a table's path or an array [N, d] to points [N, d]."""
        names, lower, upper = (self.about[k] for k in ("coordinates", "lower", "upper"))
        if isinstance(raw, str) and raw.startswith("grid:"):
            try:
                counts = [int(c) for c in raw[5:].split("x")]
            except ValueError:
                counts = []
            if len(counts) != len(names) or min(counts, default=0) < 1:
                raise DataError(
                    f"{raw!r}: give one positive number per coordinate, e.g. grid:{'x'.join(['50'] * len(names))}"
                )
            if math.prod(counts) > MOST_POINTS:
                raise DataError(
                    f"{raw!r} has {math.prod(counts):,} points; at most {MOST_POINTS:,} at a time"
                )
            axes = [np.linspace(a, b, n) for a, b, n in zip(lower, upper, counts, strict=True)]
            points = np.stack([m.ravel() for m in np.meshgrid(*axes, indexing="ij")], 1)
        elif isinstance(raw, str):
            points = _read(Path(raw), names)
        else:
            points = np.asarray(raw, float)
        shape = points.ndim == 2 and len(points) > 0 and points.shape[1] == len(names)
        if not shape or not np.isfinite(points).all():
            raise DataError(
                f"points must be finite numbers [N, {len(names)}], N > 0, in the order {', '.join(names)}"
            )
        outside = ((points < np.array(lower) - 1e-9) | (points > np.array(upper) + 1e-9)).any(1)
        if outside.any():
            box = ", ".join(f"{n} in [{a:g}, {b:g}]" for n, a, b in zip(names, lower, upper, strict=True))
            raise DataError(
                f"{int(outside.sum())} of {len(points)} points lie outside the trained box: {box}"
            )
        return torch.from_numpy(points)

    @torch.no_grad()
    def predict(self, raw: Any) -> dict[str, Any]:
        """`{"points", "fields": {name: {min, max, mean}}, "file"}`; the numbers themselves go to `--out`."""
        points = self.preprocess(raw)
        columns = dict(zip(self.about["coordinates"], points.numpy().T, strict=True))
        fields = self.fields(points)
        summary = {
            k: {"min": float(v.min()), "max": float(v.max()), "mean": float(v.mean())}
            for k, v in fields.items()
        }
        file = None
        if self.out is not None:
            file = str(_write(self.out, columns, fields))
        return {"points": len(points), "fields": summary, "file": file}

    @torch.no_grad()
    def fields(self, points: torch.Tensor) -> dict[str, np.ndarray]:
        """Values [N] of each field at points [N, d]."""
        parts = [self._fields(p) for p in points.split(4096)]
        return {name: torch.cat([p[name] for p in parts]).double().numpy() for name in parts[0]}

    def _fields(self, points: torch.Tensor) -> dict[str, torch.Tensor]:
        """The network's fields, and those that its card derives from them (velocities of a stream function)."""
        coordinates, fields = self.about["coordinates"], self.about["fields"]
        reported = self.about.get("reported", {})
        wanted = [multi_index(by, coordinates) for terms in reported.values() for _, _, by in terms]
        points = points.to(next(self.model.parameters()).dtype)
        d = Derivatives(derivatives(self.model, points, wanted, "jvp"), fields, coordinates)
        found = {name: d(name) for name in fields}
        for name, terms in reported.items():
            found.setdefault(name, sum(factor * d(field, by) for factor, field, by in terms))
        return found

    def rows(self, prediction: dict[str, Any]) -> list[dict[str, Any]]:
        """One row per field; the values at the points go to `--out`."""
        return [{"field": name, **values} for name, values in prediction["fields"].items()]

    def format(self, raw: Any, prediction: dict[str, Any]) -> str:
        ranges = ", ".join(f"{k} {v['min']:.4g} .. {v['max']:.4g}" for k, v in prediction["fields"].items())
        where = f", written to {prediction['file']}" if prediction["file"] else ""
        return f"{raw}: {prediction['points']} points, {ranges}{where}"


def _read(path: Path, names: list[str]) -> np.ndarray:
    if not path.is_file():
        raise DataError(f"no file {path}; give a .csv or .npz with {', '.join(names)}, or grid:50x50")
    try:
        if path.suffix == ".npz":
            return np.stack([a.astype(float).ravel() for a in read_arrays(path, *names)], 1)
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        return np.array([[float(row[n]) for n in names] for row in rows]).reshape(-1, len(names))
    except (KeyError, TypeError) as error:
        raise DataError(f"{path}: no column {error}; it needs {', '.join(names)}") from error
    except DataError:
        raise
    except ValueError as error:
        raise DataError(f"{path}: {error}") from error


def _write(path: Path, columns: dict[str, np.ndarray], fields: dict[str, np.ndarray]) -> Path:
    table = {**columns, **fields}
    if path.suffix == ".npz":
        content = io.BytesIO()
        np.savez(content, **table)
        write_whole(path, lambda p: p.write_bytes(content.getvalue()))
    elif path.suffix == ".csv":
        rows, head = np.stack(list(table.values()), 1), ",".join(table)
        write_whole(path, lambda p: np.savetxt(p, rows, delimiter=",", header=head, comments="", fmt="%.10g"))
    else:
        try:
            import meshio
        except ImportError:
            raise ConfigError(
                f"writing {path.suffix} needs meshio (pip install meshio); .npz and .csv need nothing"
            ) from None
        places = np.zeros((len(next(iter(columns.values()))), 3))
        for axis, column in enumerate(list(columns.values())[:3]):
            places[:, axis] = column
        cells = [("vertex", np.arange(len(places))[:, None])]
        meshio.Mesh(places, cells, point_data=fields).write(path)
    return path
