"""MovieLens-100K: 943 users, 1,682 films, 100,000 ratings (from the carrier ``movielens``; research use only)."""

from __future__ import annotations

import io
from typing import Any

import pandas as pd

from data import carriers, register_data
from data.rec_base import SequenceData
from data.rec_formats import read_recbole_table


@register_data("movielens")
class MovieLensData(SequenceData):
    """Every rating is an event, whatever its value.

    Half of the ratings share the second of the user's previous one, so the order within a second is arbitrary; it is
    shuffled once with `split_seed` and kept.
    """

    licence = "MovieLens: research use, no redistribution without permission (GroupLens)"
    source = "movielens"
    private = ("titles",)

    def __init__(self, *, split_seed: int = 7, **options: Any) -> None:
        super().__init__(split_seed=split_seed, **options)

    def fetch(self) -> None:
        """Bring the carrier into the cache."""
        carriers.fetch("movielens")

    def read(self) -> pd.DataFrame:
        """Ratings in file order, film titles beside them."""
        text = carriers.read_member("movielens", "interactions").decode("utf-8")
        frame = read_recbole_table(io.StringIO(text))
        frame = frame.set_axis(["user", "item", "rating", "time"], axis=1)
        for column in ("rating", "time"):
            frame[column] = pd.to_numeric(frame[column])
        films = read_recbole_table(
            io.StringIO(carriers.read_member("movielens", "items").decode("utf-8", "replace"))
        )
        number, title, year, genres = films.columns[:4]
        self.titles = {
            row[number]: f"{row[title]} ({row[year]})"
            for _, row in films.iterrows()
            if isinstance(row[title], str)
        }
        first = films[genres].fillna("unknown").str.split(" ").str[0]
        frame["category"] = frame["item"].map(dict(zip(films[number], first, strict=True)))
        frame.attrs["notes"] = {"rows": len(frame)}
        return frame
