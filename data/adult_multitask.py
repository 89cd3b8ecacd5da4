"""Adult census with two questions at once: income, and whether a person never married."""

from __future__ import annotations

from typing import Any

from data import register_data
from data.adult import AdultData


@register_data("adult_multitask")
class AdultMultitaskData(AdultData):
    """As ``adult`` with both targets and without the two columns that give the second away.

    Args:
        target: "income", "never_married" or "both".
        batch_size: Training rows per step and process.
        common: Options of :class:`data.adult.AdultData`.
    """

    def __init__(self, *, target: str = "both", batch_size: int = 512, **common: Any) -> None:
        super().__init__(target=target, batch_size=batch_size, **common)
