"""Recent readings as CSV to a forecast of the next steps of every sensor."""

from __future__ import annotations

import csv
import math
from datetime import datetime, timedelta, tzinfo
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import torch
from torch import Tensor

from zoo.errors import ConfigError, DataError, unknown
from zoo.predict import COMMON_OPTIONS, Predictor

Readings = dict[datetime, list[float]]


class TaskPredictor(Predictor):
    """Forecasts from a table whose first column is a timestamp and whose other columns are named after sensors.

    The table must hold the last `history_steps` before the forecast, and, where the model looks at earlier days or weeks,
    as many rows as it has; absent rows and empty cells are missing readings. `--at TIME` forecasts from after that row
    instead of from after the last one. Times without an offset are on the clock that the model was trained on; times with one are
    taken there where the model knows its zone, and refused otherwise.
    """

    suffixes = (".csv",)
    at: datetime | None = None

    def options(self, given: dict[str, str]) -> list[str]:
        for name, value in given.items():
            if name != "at":
                raise unknown("option of predict:", f"--{name}", ("--at", *COMMON_OPTIONS))
            try:
                time = datetime.fromisoformat(value)
            except ValueError:
                raise ConfigError(f"--at {value!r} is no time such as 2025-12-31T18:00") from None
            self.at = self._local(time)
        return []

    def preprocess(self, raw: Any) -> dict[str, Tensor]:
        """A path, or readings by time as {datetime: [reading of each sensor]}, to the model's inputs."""
        return self._inputs(self._readings(raw))[0]

    def _readings(self, raw: Any) -> Readings:
        if isinstance(raw, dict):
            return {self._local(time): cells for time, cells in raw.items()}
        return self._read(Path(raw))

    def _local(self, time: datetime) -> datetime:
        """`time` on the model's clock.

        Raises:
            DataError: It has an offset, and whose clock the model reads is not known.
        """
        if time.tzinfo is None:
            return time
        zone = self.preprocessing.get("zone")
        if zone is None:
            raise DataError(
                f"time {time.isoformat()} has an offset, but the data that this model was trained on named no zone; give local times "
                "without an offset"
            )
        return time.astimezone(_zone(zone)).replace(tzinfo=None)

    def _read(self, path: Path) -> Readings:
        sensors = self.preprocessing["sensors"]
        try:
            with path.open(newline="", encoding="utf-8-sig") as stream:
                header, *rows = list(csv.reader(stream))
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise DataError(f"cannot read {path}: {error}") from error
        except ValueError:
            raise DataError(f"{path} is empty; expected a header line and readings") from None
        place = {name.strip(): i for i, name in enumerate(header)}
        absent = [name for name in sensors if name not in place]
        if absent:
            raise DataError(
                f"{path} has no column for {len(absent)} of {len(sensors)} sensors, such as {absent[0]!r}; sensors without "
                "readings need an empty column"
            )
        readings: Readings = {}
        for number, row in enumerate(rows, 2):
            if not row:
                continue
            try:
                time = datetime.fromisoformat(row[0])
                cells = [_number(row[place[name]]) for name in sensors]
            except (ValueError, IndexError) as error:
                raise DataError(f"{path}, line {number}: {error}; expected a time and numbers") from None
            readings[self._local(time)] = cells
        return readings

    def _inputs(self, readings: Readings) -> tuple[dict[str, Tensor], list[datetime]]:
        """Model inputs with a batch of one, and the times that are forecast."""
        p = self.preprocessing
        if not readings:
            raise DataError("there are no readings to forecast from")
        step = timedelta(minutes=p["step_minutes"])
        last = self.at or max(readings)
        history = [last - step * i for i in reversed(range(p["history_steps"]))]
        future = [last + step * (i + 1) for i in range(p["horizon_steps"])]
        if not any(time in readings for time in history):
            raise DataError(
                f"no reading between {history[0]} and {history[-1]} in steps of {p['step_minutes']:g} minutes; do the "
                "times lie on the clock that the model was trained on?"
            )
        first = history[0]
        second = ((first.weekday() * 24 + first.hour) * 60 + first.minute) * 60 + first.second
        inputs = dict(zip(("history", "history_seen"), self._cells(readings, history), strict=True))
        if p.get("missing_as_zero"):
            inputs["history_seen"] = torch.ones_like(inputs["history_seen"])
        inputs["clock"] = torch.tensor([second // round(p["step_minutes"] * 60)])
        if p["lag_steps"]:
            looks = [self._cells(readings, [t - step * lag for t in future]) for lag in p["lag_steps"]]
            inputs["known"] = torch.stack([values for values, _ in looks], dim=1)
            inputs["known_seen"] = torch.stack([seen for _, seen in looks], dim=1)
        return inputs, future

    def _cells(self, readings: Readings, times: list[datetime]) -> tuple[Tensor, Tensor]:
        """Readings [1, T, N], 0 where missing, and where they are not."""
        gap = [math.nan] * len(self.preprocessing["sensors"])
        values = torch.tensor([readings.get(time, gap) for time in times])[None]
        seen = values.isfinite()
        if self.preprocessing["null_value"] == "zero":
            seen &= values != 0
        return values.masked_fill(~seen, 0.0), seen

    @torch.no_grad()
    def predict(self, raw: Any) -> dict[str, Any]:
        """`{"times", "sensors", "forecast": [[reading of each sensor] a step], "unit", "missing"}`."""
        inputs, future = self._inputs(self._readings(raw))
        forecast = self.model(**inputs)[0]
        if self.card.get("nonnegative", True):
            forecast = forecast.clamp_min(0.0)
        return {
            "times": [time.isoformat() for time in future],
            "sensors": self.preprocessing["sensors"],
            "forecast": [[round(v, 3) for v in row] for row in forecast.tolist()],
            "unit": self.preprocessing["unit"],
            "missing": int((~inputs["history_seen"]).sum()),
        }

    def rows(self, prediction: dict[str, Any]) -> list[dict[str, Any]]:
        """One row per step, one column per sensor."""
        return [
            {"time": time, **dict(zip(prediction["sensors"], row, strict=True))}
            for time, row in zip(prediction["times"], prediction["forecast"], strict=True)
        ]

    def format(self, raw: Any, prediction: dict[str, Any]) -> str:
        mean = [sum(row) / len(row) for row in prediction["forecast"]]
        steps = ", ".join(f"{t[5:16]} {m:.4g}" for t, m in zip(prediction["times"], mean, strict=True))
        return (
            f"{raw}: mean of {len(prediction['sensors'])} sensors, {prediction['unit']}: {steps} "
            f"({prediction['missing']} missing readings in the window; --json for every sensor)"
        )


def _zone(name: str) -> tzinfo:
    """The zone of a name such as Pacific/Auckland or an offset such as +12:00."""
    return datetime.fromisoformat(f"2000-01-01T00:00{name}").tzinfo if name[0] in "+-" else ZoneInfo(name)


def _number(text: str) -> float:
    return float(text) if text.strip() else math.nan
