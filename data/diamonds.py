"""Diamonds, 53,940 stones (from the carrier ``diamonds``)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from data import carriers, register_data
from data.tabular_pickle import carried_table
from data.tabular_table import TabularData

if TYPE_CHECKING:
    import pandas as pd


@register_data("diamonds")
class DiamondsData(TabularData):
    """Decimal logarithm of the price in dollars, from weight, cut, colour, clarity and measures.

    146 rows occur twice; measures of 0 mm are kept as published.
    """

    def fetch(self) -> None:
        """Bring the carrier into the cache."""
        carriers.fetch("diamonds")

    def read(self) -> pd.DataFrame:
        """The table with log10_price in place of price."""
        frame = carried_table("diamonds")
        frame["log10_price"] = np.log10(frame.pop("price").astype(float))
        return frame

    def target_columns(self) -> list[str]:
        """The logarithm of the price."""
        return ["log10_price"]

    def target_kinds(self) -> Mapping[str, str]:
        """A number."""
        return {"log10_price": "regression"}
