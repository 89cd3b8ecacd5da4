"""Data modules for next-item recommendation: sequences, windows, splits, controls."""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.utils.data import Dataset

from data.base import SplitDataset, ZooData, check_at_least, check_range, hash_arrays
from data.errors import DataError
from data.rec_controls import VERSION, control_scores
from data.rec_log import EventLog, LogSplit, build_log, ranges, split_log
from data.sampler import BatchKey, derive_seed

# Rules of the log and the split that leave something out; the other counts only describe.
DROPPED = (
    "missing_user",
    "missing_item",
    "negative_user",
    "negative_item",
    "missing_time",
    "filtered",
    "duplicates",
    "rare",
    "users_too_short",
    "val_users_without_history",
    "test_users_without_history",
)


class SequenceData(ZooData):
    """Users' item sequences, left-padded with item 0, and one item to predict each in validation and test.

    Training batches: `items` [B, L], `times` [B, L] in seconds since the window's last event (<= 0), `targets`
    [B, L], the item after each (0 = none). Validation and test: `items`, `times`, `target` [B], `seen` [B, S] (items
    of the whole history, 0 = none), `user` [B]. A window ends at a random place of the user's training events.

    Args:
        max_length: Items L that the model looks back on.
        split: "leave_one_out" or "temporal_global", see `data.rec_log.split_log`.
        val_fraction: Share of events for validation (temporal_global).
        test_fraction: Share of events for test (temporal_global).
        tie_rule: Order of a user's events with equal times: shuffle (by split_seed), file or item.
        tie_augment: In training, reorder events of equal time anew each epoch; their order is arbitrary.
        exclude_seen: Items of the user's history are not ranked, unless they are the target.
        min_user_events: Users with fewer events are dropped.
        min_item_events: Items with fewer events are dropped.
        options: Those of `ZooData`.
    """

    kind: ClassVar[str] = "sequences"
    private: ClassVar[tuple[str, ...]] = ()  # preprocessing that packaged weights may not carry

    def __init__(
        self,
        *,
        max_length: int = 50,
        split: str = "leave_one_out",
        val_fraction: float = 0.1,
        test_fraction: float = 0.1,
        tie_rule: str = "shuffle",
        tie_augment: bool = True,
        exclude_seen: bool = True,
        min_user_events: int = 1,
        min_item_events: int = 1,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        check_at_least(1, max_length=max_length, min_user_events=min_user_events)
        check_at_least(1, min_item_events=min_item_events)
        check_range(0.001, 0.8, val_fraction=val_fraction, test_fraction=test_fraction)
        if val_fraction + test_fraction >= 1:
            raise DataError("data.val_fraction and data.test_fraction leave nothing to train on")
        self.max_length, self.split = max_length, split
        self.val_fraction, self.test_fraction = val_fraction, test_fraction
        self.tie_rule, self.tie_augment, self.exclude_seen = tie_rule, tie_augment, exclude_seen
        self.min_user_events, self.min_item_events = min_user_events, min_item_events
        self.titles: dict[str, str] = {}  # item id -> text to show
        self.log: EventLog
        self.parts: LogSplit

    # -- to be implemented -------------------------------------------------------------------------------

    def read(self) -> pd.DataFrame:
        """The table of interactions; may set `titles`."""
        raise NotImplementedError

    def filters(self) -> dict[str, Any]:
        """Further arguments of `build_log`."""
        return {}

    # -- ZooData -----------------------------------------------------------------------------------------

    def load(self) -> dict[str, Dataset]:
        """Read, order, split."""
        self.log = build_log(
            self.read(),
            tie_rule=self.tie_rule,
            tie_seed=self.split_seed,
            min_user_events=self.min_user_events,
            min_item_events=self.min_item_events,
            **self.filters(),
        )
        self.parts = split_log(
            self.log, self.split, val_fraction=self.val_fraction, test_fraction=self.test_fraction
        )
        self.labels = self.log.items
        counted = {**self.log.notes, **self.parts.notes}
        self.skipped = {rule: f"{counted[rule]} events or users" for rule in DROPPED if counted.get(rule)}
        self._windows = self._list_windows()
        return {
            "train": SplitDataset(len(self._windows), self._train_batch),
            "val": SplitDataset(len(self.parts.samples["val"]), partial(self._asked, split="val")),
            "test": SplitDataset(len(self.parts.samples["test"]), partial(self._asked, split="test")),
        }

    @property
    def num_items(self) -> int:
        """Items in the catalogue; numbers run from 1."""
        self.setup()
        return len(self.log.items)

    def train_items(self) -> np.ndarray:
        """Item number of every training event, int64."""
        return self.log.item[ranges(self.log.offsets[:-1], self.parts.train_end)]

    def preprocessing(self) -> dict[str, Any]:
        """Catalogue in the order of the item numbers, and how histories are cut."""
        titles = [self.titles.get(item, "") for item in self.log.items]
        return {
            "items": self.log.items,
            "titles": titles if any(titles) else [],
            "private": list(self.private),
            "max_length": self.max_length,
            "exclude_seen": self.exclude_seen,
        }

    def split_ids(self) -> dict[str, list[str]]:
        """`user:item` of what is asked; training: `user:number of training events`."""
        log, user_of = self.log, self._user_of
        asked = {
            split: [f"{log.users[user_of[e]]}:{log.items[log.item[e] - 1]}" for e in events]
            for split, events in self.parts.samples.items()
        }
        counts = self.parts.train_end - log.offsets[:-1]
        return {"train": [f"{u}:{n}" for u, n in zip(log.users, counts, strict=True) if n], **asked}

    def split_record(self) -> dict[str, Any]:
        """Sizes, hashes and the rules that decide the split."""
        return {
            **super().split_record(),
            "rule": self.split,
            "tie_rule": self.tie_rule,
            "exclude_seen": self.exclude_seen,
            "sequence_sha256": hash_arrays(self.log.item, self.log.offsets),
            "counted": {**self.log.notes, **self.parts.notes},
        }

    def data_hash(self) -> str:
        """Of everything the controls use."""
        log, parts = self.log, self.parts
        text = f"{VERSION} {self.exclude_seen}"
        arrays = (log.offsets, log.item, parts.train_end, parts.samples["val"], parts.samples["test"])
        return hash_arrays(text, *arrays)

    def compute_baselines(self) -> dict[str, dict[str, float]]:
        """Popularity, item-kNN, EASE, Markov chain and EASE + Markov; settings chosen on validation."""
        return control_scores(self)

    # -- batches -----------------------------------------------------------------------------------------

    @property
    def _user_of(self) -> np.ndarray:
        return np.repeat(np.arange(len(self.log.users)), self.log.counts())

    def _list_windows(self) -> np.ndarray:
        """User and number from the end of each training window, int64 [W, 2]."""
        counts = self.parts.train_end - self.log.offsets[:-1]
        windows = np.maximum(0, -(-(counts - 1) // self.max_length))
        user = np.repeat(np.arange(len(counts)), windows)
        number = np.arange(len(user)) - np.repeat(np.cumsum(windows) - windows, windows)
        return np.stack((user, number), 1)

    def _train_batch(self, key: BatchKey) -> dict[str, Tensor]:
        seed = derive_seed(self.seed, key.epoch, key.batch, key.rank)
        rng = np.random.default_rng(seed)
        user, number = self._windows[key.indices].T
        start, stop = self.log.offsets[user], self.parts.train_end[user]
        length = self.max_length
        # Windows tile the history from its end and shift by up to half a window, so that every event gets every place.
        shift = length // 2 - rng.integers(0, length, len(user))
        end = np.minimum(
            stop, np.maximum(stop - number * length + shift, np.minimum(start + length + 1, stop))
        )
        items, times = self._cut(np.maximum(start, end - length - 1), end, length + 1)
        if self.tie_augment:
            real = items > 0
            order = np.lexsort((rng.random(items.shape), np.where(real, times, -np.inf)), axis=1)
            items = np.take_along_axis(items, order, 1)
        inputs, targets = items[:, :-1].copy(), items[:, 1:].copy()
        targets[inputs == 0] = 0
        return {
            "items": torch.from_numpy(inputs),
            "targets": torch.from_numpy(targets),
            "times": torch.from_numpy(_ages(times[:, :-1])),
        }

    def _asked(self, key: BatchKey, split: str) -> dict[str, Tensor]:
        event = self.parts.samples[split][key.indices]
        user = np.searchsorted(self.log.offsets, event, side="right") - 1
        start = self.log.offsets[user]
        items, times = self._cut(np.maximum(start, event - self.max_length), event, self.max_length)
        seen, _ = self._cut(start, event, int((event - start).max()))
        return {
            "items": torch.from_numpy(items),
            "times": torch.from_numpy(_ages(times)),
            "target": torch.from_numpy(self.log.item[event]),
            "seen": torch.from_numpy(seen),
            "user": torch.from_numpy(user),
        }

    def _cut(self, start: np.ndarray, end: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Items and times of events [start, end), left-padded to `length`; the oldest are left out."""
        place = end[:, None] - length + np.arange(length)
        real = place >= start[:, None]
        place = np.where(real, place, 0)
        return np.where(real, self.log.item[place], 0), np.where(real, self.log.time[place], -np.inf)


def _ages(times: np.ndarray) -> np.ndarray:
    """Seconds relative to the row's last event, float32 (<= 0); padding counts as its oldest event."""
    last = times[:, -1:]
    last = np.where(np.isfinite(last), last, 0.0)
    return np.where(np.isfinite(times), times - last, 0.0).astype(np.float32)
