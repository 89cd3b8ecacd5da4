"""Simulated clicks whose true attention is known.

Every item has a category and, independently of it, a style. A user has a taste in styles for each category, which
drifts. Whether a candidate is clicked depends on how well its style fits the styles of behaviours in its category
(and, less, in the one related to it), recent ones counting more. So which behaviours matter is decided by category
and age, and what they say by style: a model has to keep the two apart, as DARE does with two tables.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from data import register_data
from data.base import check_at_least, check_range, hash_arrays
from data.ctr_base import ClickData, ClickLog, Impressions, click_metrics
from data.sampler import derive_seed

STYLE_DIM = 4


@register_data("ctr_simulator")
class ClickSimulator(ClickData):
    """Clicks of simulated users.

    Args:
        users: Number of users.
        items: Number of items.
        categories: Number of categories, even: 2i and 2i + 1 are related.
        behaviours: Events of each user before the first impression.
        impressions: Impressions of each user; the last two are test, the two before validation.
        memory: Events after which a behaviour's weight has fallen by a factor e.
        related: Weight of a behaviour of the related category over one of the same category.
        strength: Factor from fit of style to the logit of a click.
        options: Those of `ClickData`.
    """

    source = "simulated"
    licence = "generated"

    def __init__(
        self,
        *,
        users: int = 15_000,
        items: int = 1000,
        categories: int = 40,
        behaviours: int = 100,
        impressions: int = 24,
        memory: float = 30.0,
        related: float = 0.3,
        strength: float = 6.0,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        check_at_least(10, users=users, behaviours=behaviours)
        check_at_least(6, impressions=impressions)
        check_range(2, items // 2, categories=categories)
        check_range(0.0, 1.0, related=related)
        check_range(1e-3, 1e9, memory=memory, strength=strength)
        self.users, self.items, self.categories = users, items, categories
        self.behaviours, self.impressions = behaviours, impressions
        self.memory, self.related, self.strength = memory, related, strength

    def build(self) -> ClickLog:
        rng = np.random.default_rng(derive_seed(self.split_seed, 11))
        category = np.r_[0, rng.permutation(np.arange(self.items) % self.categories) + 1]
        style = rng.standard_normal((self.items + 1, STYLE_DIM))
        self._style = style / np.linalg.norm(style, axis=1, keepdims=True)
        self._relate = np.arange(self.categories + 2)
        pairs = (np.arange(self.categories) ^ 1) + 1
        self._relate[1 : self.categories + 1] = np.where(
            pairs <= self.categories, pairs, np.arange(1, self.categories + 1)
        )
        by_category = [np.flatnonzero(category == c) for c in range(self.categories + 1)]
        users, length = self.users, self.behaviours
        events = np.empty((users, length), np.int64)
        # Few favourite categories for each user, so that most candidates have a history.
        favourites = rng.gamma(0.15, size=(users, self.categories)) + 1e-4
        favourites /= favourites.sum(1, keepdims=True)
        bounds = favourites.cumsum(1)
        taste = rng.standard_normal((users, self.categories, STYLE_DIM))
        for step in range(length):
            chosen = self._draw_category(rng, bounds)
            events[:, step] = self._draw_item(rng, chosen, taste, by_category)
            # The taste in the category just used wanders: what was liked long ago says less.
            rows = np.arange(users)
            drift = rng.standard_normal((users, STYLE_DIM))
            taste[rows, chosen - 1] = 0.9 * taste[rows, chosen - 1] + np.sqrt(1 - 0.81) * drift
        asked = np.empty((users, self.impressions), np.int64)
        for step in range(self.impressions):
            chosen = self._draw_category(rng, bounds)
            random = rng.integers(1, self.categories + 1, users)
            chosen = np.where(rng.random(users) < 0.8, chosen, random)
            asked[:, step] = self._draw_item(rng, chosen, None, by_category)
        user = np.repeat(np.arange(users), self.impressions)
        rows = Impressions(user, (user + 1) * length, asked.ravel(), np.zeros(len(user), np.float32))
        self.log = ClickLog(np.arange(users + 1) * length, events.ravel(), category, {})
        probability = np.concatenate(
            [self._truth(_take(rows, part), length)[0] for part in np.array_split(np.arange(len(rows)), 50)]
        )
        rows.label = (rng.random(len(rows)) < probability).astype(np.float32)
        place = np.tile(np.arange(self.impressions), users)
        self.log.splits = {
            "train": _take(rows, np.flatnonzero(place < self.impressions - 4)),
            "val": _take(
                rows, np.flatnonzero((place >= self.impressions - 4) & (place < self.impressions - 2))
            ),
            "test": _take(rows, np.flatnonzero(place >= self.impressions - 2)),
        }
        return self.log

    def _draw_category(self, rng: np.random.Generator, bounds: np.ndarray) -> np.ndarray:
        drawn = rng.random((len(bounds), 1))
        return np.minimum((bounds < drawn).sum(1), self.categories - 1) + 1

    def _draw_item(
        self,
        rng: np.random.Generator,
        category: np.ndarray,
        taste: np.ndarray | None,
        by_category: list[np.ndarray],
    ) -> np.ndarray:
        """One item of each row's category: the best of four by taste, or any."""
        sizes = np.array([max(1, len(group)) for group in by_category])
        starts = np.r_[0, np.cumsum([len(group) for group in by_category])]
        flat = np.concatenate(by_category)
        count = 1 if taste is None else 4
        picks = flat[
            starts[category][:, None]
            + (rng.random((len(category), count)) * sizes[category][:, None]).astype(int)
        ]
        if taste is None:
            return picks[:, 0]
        fit = np.einsum("bcs,bs->bc", self._style[picks], taste[np.arange(len(category)), category - 1])
        return picks[np.arange(len(picks)), fit.argmax(1)]

    def _truth(self, rows: Impressions, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Click probability [B] and weight of each of the last `length` behaviours [B, length]."""
        place = rows.end[:, None] - length + np.arange(length)
        real = place >= self.log.offsets[rows.user][:, None]
        items = np.where(real, self.log.item[np.where(real, place, 0)], 0)
        return self._judge(rows, items)

    def _judge(self, rows: Impressions, items: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        own = self.log.category[rows.item][:, None]
        theirs = self.log.category[items]
        ages = np.arange(items.shape[1], 0, -1)
        weight = np.where(theirs == own, 1.0, np.where(theirs == self._relate[own], self.related, 0.0))
        weight = weight * (items > 0) * np.exp(-ages / self.memory)
        fit = np.einsum("bmd,bd->bm", self._style[items], self._style[rows.item])
        # One unit of weight from a neutral event keeps a single old behaviour from deciding.
        said = (weight * fit).sum(1) / (weight.sum(1) + 0.2)
        return 1 / (1 + np.exp(-(self.strength * said - 0.5))), weight

    def truth(self, rows: Impressions, items: np.ndarray) -> dict[str, np.ndarray]:
        """The weights by which the simulator decided, and the probability of a click."""
        if self.max_length >= self.behaviours:
            probability, weight = self._judge(rows, items)
        else:
            probability, _ = self._truth(rows, self.behaviours)
            _, weight = self._judge(rows, items)
        return {"relevance": weight.astype(np.float32), "probability": probability.astype(np.float32)}

    def data_hash(self) -> str:
        """The simulation's settings besides its outcome."""
        return hash_arrays(super().data_hash(), repr((self.memory, self.related, self.strength)))

    def compute_baselines(self) -> dict[str, dict[str, float]]:
        """The usual controls, and the true probability as the ceiling of any model."""
        test = self.log.splits["test"]
        probability, _ = self._truth(test, self.behaviours)
        ceiling = click_metrics(np.log(probability / (1 - probability)), test)
        return {**super().compute_baselines(), "true_probability": ceiling}


def _take(rows: Impressions, index: np.ndarray) -> Impressions:
    return Impressions(*(array[index] for array in vars(rows).values()))
