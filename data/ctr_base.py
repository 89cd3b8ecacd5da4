"""Data modules for click-through prediction from long behaviour sequences."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from data.base import SPLITS, SplitDataset, ZooData, check_at_least, hash_arrays
from data.rec_metrics import auc, grouped_auc, log_loss
from data.sampler import BatchKey

VERSION = "1"  # part of the cache key of the controls: raise it when one changes


@dataclass
class Impressions:
    """Questions "does this user click on this item?", by row.

    Attributes:
        user: User's number, int64 [S].
        end: The history is the user's events before this index into the log, int64 [S].
        item: Candidate, item number from 1, int64 [S].
        label: 1 = click, float32 [S].
    """

    user: np.ndarray
    end: np.ndarray
    item: np.ndarray
    label: np.ndarray

    def __len__(self) -> int:
        return len(self.user)


@dataclass
class ClickLog:
    """Behaviour of all users and the impressions of each split.

    Attributes:
        offsets: User u's events are [offsets[u], offsets[u + 1]), int64 [U + 1].
        item: Item number from 1 of each event, int64 [E].
        category: Category number from 1 of each item number, int64 [I + 1]; 0 = padding or unknown.
        splits: Impressions by split.
        items: Items' ids in the order of their numbers; none where the numbers are the ids.
    """

    offsets: np.ndarray
    item: np.ndarray
    category: np.ndarray
    splits: dict[str, Impressions]
    items: list[str] = field(default_factory=list)

    @property
    def num_items(self) -> int:
        return len(self.category) - 1

    @property
    def num_categories(self) -> int:
        return int(self.category.max())


class ClickData(ZooData):
    """Impressions with the user's last M behaviours, left-padded with item 0.

    Batches: `item` [B] and `category` [B] of the candidate, `items` and `categories` [B, M] of the behaviours,
    `label` [B], `user` [B]; where the truth is known also `relevance` [B, M], the weight that each behaviour really
    has, and `probability` [B].

    Args:
        max_length: Behaviours M that the model looks back on.
        options: Those of `ZooData`.
    """

    kind: ClassVar[str] = "clicks"

    def __init__(
        self, *, max_length: int = 100, batch_size: int = 1024, eval_batch_size: int = 1024, **options: Any
    ) -> None:
        super().__init__(batch_size=batch_size, eval_batch_size=eval_batch_size, **options)
        check_at_least(1, max_length=max_length)
        self.max_length = max_length
        self.log: ClickLog

    def build(self) -> ClickLog:
        """Read or simulate the log."""
        raise NotImplementedError

    def truth(self, rows: Impressions, items: np.ndarray) -> dict[str, np.ndarray]:
        """What a simulator knows of these impressions, given the behaviours [B, M]; nothing for real logs."""
        return {}

    def load(self) -> dict[str, Dataset]:
        self.log = self.build()
        return {
            split: SplitDataset(len(rows), partial(self._batch, split=split))
            for split, rows in self.log.splits.items()
        }

    @property
    def num_items(self) -> int:
        """Items in the catalogue; numbers run from 1."""
        self.setup()
        return self.log.num_items

    @property
    def num_categories(self) -> int:
        """Categories; numbers run from 1."""
        self.setup()
        return self.log.num_categories

    def preprocessing(self) -> dict[str, Any]:
        """Category of each item number, how histories are cut, and the items' ids where a log has its own."""
        ids = {"items": self.log.items} if self.log.items else {}
        return {"category": self.log.category.tolist(), "max_length": self.max_length, **ids}

    def split_ids(self) -> dict[str, list[str]]:
        """`user:item:label` of every impression."""
        return {
            split: [f"{u}:{i}:{int(y)}" for u, i, y in zip(rows.user, rows.item, rows.label, strict=True)]
            for split, rows in self.log.splits.items()
        }

    def data_hash(self) -> str:
        """Of everything the controls use."""
        parts = [array for s in SPLITS for array in vars(self.log.splits[s]).values()]
        return hash_arrays(VERSION, str(self.max_length), self.log.item, self.log.category, *parts)

    def compute_baselines(self) -> dict[str, dict[str, float]]:
        """Constant, popularity of the candidate, and a logistic regression on hand-made counts."""
        return click_controls(self)

    def _batch(self, key: BatchKey, split: str) -> dict[str, Tensor]:
        every = self.log.splits[split]
        rows = Impressions(*(array[key.indices] for array in vars(every).values()))
        items = self.histories(rows)
        out = {
            "item": rows.item,
            "category": self.log.category[rows.item],
            "items": items,
            "categories": self.log.category[items],
            "label": rows.label,
            "user": rows.user,
        }
        if key.epoch < 0:
            out |= self.truth(rows, items)
        return {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in out.items()}

    def histories(self, rows: Impressions) -> np.ndarray:
        """Last M behaviours before each impression, int64 [B, M], 0 on the left where there are fewer."""
        place = rows.end[:, None] - self.max_length + np.arange(self.max_length)
        real = place >= self.log.offsets[rows.user][:, None]
        return np.where(real, self.log.item[np.where(real, place, 0)], 0)


def click_metrics(logits: np.ndarray, rows: Impressions) -> dict[str, float]:
    """AUC, AUC by user, log-loss."""
    return {
        "auc": auc(logits, rows.label),
        "gauc": float(grouped_auc(logits, rows.label, rows.user)[0]),
        "log_loss": log_loss(logits, rows.label),
    }


def click_controls(data: ClickData) -> dict[str, dict[str, float]]:
    """Controls fitted on train, scored on test."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    log = data.log
    train, test = log.splits["train"], log.splits["test"]
    rate = float(np.clip(train.label.mean(), 1e-6, 1 - 1e-6))
    shown = np.bincount(train.item, minlength=log.num_items + 1)
    clicked = np.bincount(train.item, train.label, minlength=log.num_items + 1)
    smooth = (clicked + 20 * rate) / (shown + 20)
    item_logit = np.log(smooth / (1 - smooth))

    def features(rows: Impressions, leave_out: bool) -> np.ndarray:
        items = data.histories(rows)
        same = log.category[items] == log.category[rows.item][:, None]
        again = items == rows.item[:, None]
        ages = np.arange(data.max_length, 0, -1)
        # A training row's own label must not reach it through the item's click rate.
        own = leave_out * 1.0
        counts = shown[rows.item] - own
        rates = (clicked[rows.item] - own * rows.label + 20 * rate) / (counts + 20)
        columns = [
            np.log(rates / (1 - rates)),
            np.log1p(same.sum(1)),
            (same / np.sqrt(ages)).sum(1),
            np.log1p(again.sum(1)),
        ]
        return np.stack(columns, 1)

    scaler = StandardScaler()
    x = scaler.fit_transform(features(train, True))
    model = LogisticRegression(max_iter=300).fit(x, train.label)
    scores = {
        "constant": np.full(len(test), np.log(rate / (1 - rate))),
        "item_click_rate": item_logit[test.item],
        "logistic_counts": model.decision_function(scaler.transform(features(test, False))),
    }
    return {name: click_metrics(logits, test) for name, logits in scores.items()}
