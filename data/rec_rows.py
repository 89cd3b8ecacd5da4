"""What rows of an interaction log count, and their times in seconds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from data.errors import DataError


def tidy(frame: pd.DataFrame, path: Path, format: str) -> pd.DataFrame:
    """Check columns, turn types, drop unusable rows, and count all of it."""
    for role in ("user", "item"):
        if role not in frame:
            raise DataError(
                f"{path.name} ({format}) has no {role} column; name it with data.columns.{role}=<title>"
            )
    notes = {"format": format, "rows": len(frame), **frame.attrs.get("notes", {})}
    valid = np.ones(len(frame), dtype=bool)
    for role in ("user", "item"):
        ids = frame[role]
        missing = ids.isna().to_numpy() | (ids.astype(str).str.strip() == "").to_numpy()
        numbers = pd.to_numeric(ids, errors="coerce").to_numpy()
        negative = ~missing & (numbers < 0)  # -1 marks a missing id in many logs
        notes[f"missing_{role}"] = int(missing.sum())
        notes[f"negative_{role}"] = int(negative.sum())
        valid &= ~(missing | negative)
    if "time" in frame:
        frame["time"], unit = _seconds(frame["time"])
        if unit:
            notes["time_unit"] = unit
        missing = frame["time"].isna().to_numpy()
        if missing.all():
            frame = frame.drop(columns="time")
        else:
            notes["missing_time"] = int((missing & valid).sum())
            valid &= ~missing
    if "time" not in frame:
        notes["no_time"] = "file order"
    if "rating" in frame:
        frame["rating"] = pd.to_numeric(frame["rating"], errors="coerce")
    frame = frame[valid].reset_index(drop=True)
    if not len(frame):
        raise DataError(f"{path.name} ({format}): no usable row among {notes['rows']}: {notes}")
    for role in ("user", "item", "category", "behaviour"):
        if role in frame:
            frame[role] = frame[role].astype(str).str.strip()
    frame.attrs["notes"] = notes
    return frame


def _seconds(times: pd.Series) -> tuple[pd.Series, str]:
    """Times in seconds and the unit they were in, told from their size: seconds reach 1e11 in the year 5138."""
    if pd.api.types.is_datetime64_any_dtype(times):  # a missing one would become a number, the least of all
        return (pd.to_datetime(times, utc=True) - pd.Timestamp(0, tz="UTC")).dt.total_seconds(), "dates"
    numbers = pd.to_numeric(times, errors="coerce")
    if numbers.isna().all() and not times.isna().all():
        parsed = pd.to_datetime(times, errors="coerce", utc=True)
        return (parsed - pd.Timestamp(0, tz="UTC")).dt.total_seconds(), "text"
    middle = numbers.abs().median()
    for limit, factor, unit in ((1e17, 1e9, "ns"), (1e14, 1e6, "us"), (1e11, 1e3, "ms")):
        if middle > limit:
            return numbers / factor, unit
    return numbers, ""
