"""Your own interaction log for next-item recommendation: MovieLens, RecBole, Taobao, Tmall, Amazon, CSV, Parquet."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from data import register_data
from data.errors import DataError
from data.rec_base import SequenceData
from data.rec_formats import read_interactions


@register_data("interactions")
class InteractionsData(SequenceData):
    """One log file, see `data.rec_formats` for the layouts.

    Args:
        path: The log; required.
        format: "auto" or a name of `data.rec_formats.FORMATS`.
        columns: Column title by role (user, item, time, rating, category, behaviour) where the file has its own.
        behaviours: Kinds of events to keep, such as [pv]; None keeps all.
        min_rating: Drop events rated lower; None keeps all.
        drop_duplicates: Drop rows of equal user, item and time.
        options: Those of `SequenceData`.
    """

    def __init__(
        self,
        *,
        path: str | None = None,
        format: str = "auto",
        columns: Mapping[str, str] | None = None,
        behaviours: list[str] | None = None,
        min_rating: float | None = None,
        drop_duplicates: bool = True,
        min_user_events: int = 5,
        min_item_events: int = 5,
        **options: Any,
    ) -> None:
        super().__init__(min_user_events=min_user_events, min_item_events=min_item_events, **options)
        if path is None:
            raise DataError(
                "data.path is missing: name an interaction log, data=interactions data.path=ratings.csv"
            )
        self.path, self.format, self.columns = path, format, dict(columns or {})
        self.behaviours, self.min_rating, self.drop_duplicates = behaviours, min_rating, drop_duplicates

    def read(self) -> pd.DataFrame:
        """The file as a table."""
        return read_interactions(self.path, self.format, self.columns)

    def filters(self) -> dict[str, Any]:
        """Which rows count."""
        return {
            "behaviours": self.behaviours,
            "min_rating": self.min_rating,
            "drop_duplicates": self.drop_duplicates,
        }
