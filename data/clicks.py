"""Click-through prediction from an interaction log: Taobao, Tmall, or any log with or without categories.

As in DARE: some of a user's events are positives, and for each, items that the user never touched are drawn by
popularity as negatives; so figures are not comparable with those on shown but unclicked items.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from data import register_data
from data.base import check_at_least
from data.ctr_base import ClickData, ClickLog, Impressions
from data.errors import DataError
from data.rec_formats import read_interactions
from data.rec_log import EventLog, build_log
from data.sampler import derive_seed


@register_data("clicks")
class ClickLogData(ClickData):
    """A user's last event is the test positive, the one before it validation, earlier ones train.

    Args:
        path: The log; required. Layouts: `data.rec_formats`.
        format: "auto" or a name of `data.rec_formats.FORMATS`.
        columns: Column title by role, where the file has its own.
        behaviours: Kinds of events to keep, such as [pv]; None keeps all.
        min_rating: Drop events rated lower; None keeps all.
        min_user_events: Users with fewer events are dropped.
        min_item_events: Items with fewer events are dropped.
        positives: Training positives of each user at most: every `stride`-th event, the latest.
        stride: Events between two training positives.
        negatives: Items drawn for each positive.
        min_history: Behaviours that must come before a positive.
        tie_rule: Order of a user's events with equal times: shuffle (by split_seed), file or item.
        options: Those of `ClickData`.
    """

    def __init__(
        self,
        *,
        path: str | None = None,
        format: str = "auto",
        columns: Mapping[str, str] | None = None,
        behaviours: list[str] | None = None,
        min_rating: float | None = None,
        min_user_events: int = 10,
        min_item_events: int = 1,
        positives: int = 19,
        stride: int = 5,
        negatives: int = 2,
        min_history: int = 3,
        tie_rule: str = "shuffle",
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if path is None:
            raise DataError(
                "data.path is missing: name an interaction log, data=clicks data.path=UserBehavior.csv"
            )
        check_at_least(1, positives=positives, stride=stride, negatives=negatives, min_history=min_history)
        check_at_least(1, min_user_events=min_user_events, min_item_events=min_item_events)
        self.path, self.format, self.columns = path, format, dict(columns or {})
        self.behaviours, self.min_rating = behaviours, min_rating
        self.min_user_events, self.min_item_events = min_user_events, min_item_events
        self.positives, self.stride, self.negatives = positives, stride, negatives
        self.min_history, self.tie_rule = min_history, tie_rule
        self.counted: dict[str, Any] = {}

    def build(self) -> ClickLog:
        log = build_log(
            read_interactions(self.path, self.format, self.columns),
            tie_rule=self.tie_rule,
            tie_seed=self.split_seed,
            min_user_events=self.min_user_events,
            min_item_events=self.min_item_events,
            behaviours=self.behaviours,
            min_rating=self.min_rating,
        )
        counts = log.counts()
        enough = counts >= self.min_history + 3
        self.counted = {**log.notes, "users_too_short": int((~enough).sum())}
        self.skipped = {"users_too_short": str(int((~enough).sum()))} if not enough.all() else {}
        if not enough.any():
            raise DataError(
                f"no user has {self.min_history + 3} events (data.min_history={self.min_history}, one positive a split)"
            )
        rng = np.random.default_rng(derive_seed(self.split_seed, 23))
        users, ends = np.flatnonzero(enough), log.offsets[1:]
        train_user, train_event = [], []
        for user in users:
            events = np.arange(ends[user] - 3, log.offsets[user] + self.min_history - 1, -self.stride)
            events = events[: self.positives]
            train_user.append(np.full(len(events), user))
            train_event.append(events)
        chosen = {
            "train": (np.concatenate(train_user), np.concatenate(train_event)),
            "val": (users, ends[users] - 2),
            "test": (users, ends[users] - 1),
        }
        category = log.category if log.categories else np.r_[0, np.ones(len(log.items), np.int64)]
        splits = {split: self._with_negatives(log, rng, *rows) for split, rows in chosen.items()}
        return ClickLog(log.offsets, log.item, category, splits, log.items)

    def _with_negatives(
        self, log: EventLog, rng: np.random.Generator, user: np.ndarray, event: np.ndarray
    ) -> Impressions:
        """Positives and, after each, its negatives; drawn again while they belong to the user's own items."""
        items = len(log.items)
        owned = np.unique(np.repeat(np.arange(len(log.users)), log.counts()) * (items + 1) + log.item)
        count = np.bincount(log.item, minlength=items + 1).cumsum()
        shape = (len(user), self.negatives)
        drawn = np.searchsorted(count, rng.integers(0, count[-1], shape), side="right")
        for _ in range(100):
            bad = np.isin(user[:, None] * (items + 1) + drawn, owned)
            if not bad.any():
                break
            drawn[bad] = np.searchsorted(count, rng.integers(0, count[-1], bad.sum()), side="right")
        else:
            raise DataError(
                "some users touched nearly every item, so no negatives are left; raise min_item_events"
            )
        rows = np.concatenate((log.item[event][:, None], drawn), 1)
        label = np.zeros(rows.shape, np.float32)
        label[:, 0] = 1
        repeat = 1 + self.negatives
        return Impressions(np.repeat(user, repeat), np.repeat(event, repeat), rows.ravel(), label.ravel())

    def split_record(self) -> dict[str, Any]:
        """The usual record and what the rules dropped."""
        return {**super().split_record(), "tie_rule": self.tie_rule, "counted": self.counted}
