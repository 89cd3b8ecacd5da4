"""From a table of interactions to users' sequences with a fixed split.

Rules, all counted in `EventLog.notes`: exact duplicates are dropped; users and items below a number of events are
dropped together until none is left; within a user, events are ordered by time, and events of the same time by the
tie rule. Item numbers start at 1, in the order of the items' names; 0 is padding.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from data.errors import DataError
from data.sampler import derive_seed

TIE_RULES = ("shuffle", "file", "item")
SPLITS = ("leave_one_out", "temporal_global")


@dataclass
class EventLog:
    """All users' sequences, one after the other.

    Attributes:
        users: Users' ids, by number from 0.
        items: Items' ids; item number i is `items[i - 1]`.
        offsets: User u's events are [offsets[u], offsets[u + 1]), int64 [U + 1].
        item: Item number of each event, int64 [E].
        time: Seconds, float64 [E]; the place in the file where the log has no times.
        category: Category number from 1 of each item number, int64 [I + 1]; 0 unknown.
        categories: Categories' names.
        notes: What was dropped or changed, by rule.
    """

    users: list[str]
    items: list[str]
    offsets: np.ndarray
    item: np.ndarray
    time: np.ndarray
    category: np.ndarray
    categories: list[str]
    notes: dict[str, int | str] = field(default_factory=dict)

    def counts(self) -> np.ndarray:
        """Events of each user, int64 [U]."""
        return np.diff(self.offsets)


@dataclass
class LogSplit:
    """What is trained on and what is asked.

    Attributes:
        train_end: User u trains on events [offsets[u], train_end[u]), int64 [U].
        samples: Index of the event to predict, by split "val" and "test", int64 [S]; its history is what the same
            user did before it.
        notes: What could not be asked, by rule.
    """

    train_end: np.ndarray
    samples: dict[str, np.ndarray]
    notes: dict[str, int | str] = field(default_factory=dict)


def build_log(
    frame: pd.DataFrame,
    *,
    tie_rule: str = "shuffle",
    tie_seed: int = 0,
    min_user_events: int = 1,
    min_item_events: int = 1,
    behaviours: list[str] | None = None,
    min_rating: float | None = None,
    drop_duplicates: bool = True,
) -> EventLog:
    """Clean, number and order a table of interactions.

    Args:
        frame: As `data.rec_formats.read_interactions` returns it.
        tie_rule: Order of a user's events with equal times: "shuffle" by `tie_seed`, "file", or "item" (by id).
        tie_seed: Seed of the shuffle.
        min_user_events: Users with fewer events are dropped.
        min_item_events: Items with fewer events are dropped; both rules repeat until neither applies.
        behaviours: Kinds of events to keep; None keeps all.
        min_rating: Drop events rated lower.
        drop_duplicates: Drop repeated rows of equal user, item and time.

    Raises:
        DataError: Nothing is left, or an option needs a column that the log lacks.
    """
    if tie_rule not in TIE_RULES:
        raise DataError(f"data.tie_rule={tie_rule!r}: choose {', '.join(TIE_RULES)}")
    notes: dict[str, int | str] = dict(frame.attrs.get("notes", {}))
    keep = np.ones(len(frame), dtype=bool)
    if behaviours:
        if "behaviour" not in frame:
            raise DataError("data.behaviours is set, but the log has no behaviour column")
        keep &= frame["behaviour"].isin(behaviours).to_numpy()
        if not keep.any():
            kinds = ", ".join(sorted(frame["behaviour"].unique())[:10])
            raise DataError(f"no event is one of data.behaviours={list(behaviours)}; the log has: {kinds}")
    if min_rating is not None:
        if "rating" not in frame:
            raise DataError("data.min_rating is set, but the log has no rating column")
        keep &= (frame["rating"] >= min_rating).to_numpy()
    notes["filtered"] = int((~keep).sum())
    frame = frame[keep]
    has_time = "time" in frame
    if drop_duplicates and has_time:
        repeated = frame.duplicated(["user", "item", "time"]).to_numpy()
        notes["duplicates"] = int(repeated.sum())
        frame = frame[~repeated]
    user, users = pd.factorize(frame["user"], sort=True)
    item, items = pd.factorize(frame["item"], sort=True)
    time = frame["time"].to_numpy(np.float64) if has_time else np.arange(len(frame), dtype=np.float64)
    rows = _core(user, item, min_user_events, min_item_events)
    notes["rare"] = len(user) - len(rows)
    if not len(rows):
        raise DataError(
            f"no event is left with min_user_events={min_user_events} and min_item_events={min_item_events}"
        )
    names = frame["category"].to_numpy()[rows] if "category" in frame else None
    user, users = _renumber(user[rows], users)
    item, items = _renumber(item[rows], items)
    time = time[rows]
    if tie_rule == "shuffle":
        tie = np.random.default_rng(derive_seed(tie_seed)).permutation(len(user))
    else:
        tie = item if tie_rule == "item" else np.arange(len(user))
    order = np.lexsort((tie, time, user))
    same = (np.diff(time[order]) == 0) & (np.diff(user[order]) == 0)
    notes["tied_times"] = int(same.sum())
    category, categories = np.zeros(len(items) + 1, np.int64), []
    if names is not None:
        numbers, found = pd.factorize(pd.Series(names), sort=True)
        category[item[::-1] + 1] = numbers[::-1] + 1  # the first row of an item decides
        categories = [str(c) for c in found]
    return EventLog(
        users=[str(u) for u in users],
        items=[str(i) for i in items],
        offsets=np.r_[0, np.cumsum(np.bincount(user, minlength=len(users)))],
        item=item[order] + 1,
        time=time[order],
        category=category,
        categories=categories,
        notes=notes,
    )


def _core(user: np.ndarray, item: np.ndarray, min_user: int, min_item: int) -> np.ndarray:
    rows = np.arange(len(user))
    while True:
        few = np.bincount(user[rows], minlength=1)[user[rows]] < min_user
        few |= np.bincount(item[rows], minlength=1)[item[rows]] < min_item
        if not few.any():
            return rows
        rows = rows[~few]
        if not len(rows):
            return rows


def _renumber(codes: np.ndarray, names: pd.Index) -> tuple[np.ndarray, pd.Index]:
    used, fresh = np.unique(codes, return_inverse=True)
    return fresh, names[used]


def split_log(log: EventLog, rule: str, *, val_fraction: float = 0.1, test_fraction: float = 0.1) -> LogSplit:
    """Decide what is trained on and what is asked.

    Args:
        log: The sequences.
        rule: "leave_one_out": a user's last event is the test, the one before it the validation; users with fewer
            than three events only train. "temporal_global": two moments divide the whole log; a user's first event
            after a moment is asked, given all before it, so that nothing trained on is later than what is asked.
        val_fraction: Share of all events between the two moments (temporal_global).
        test_fraction: Share of all events after the second moment (temporal_global).

    Raises:
        DataError: Unknown rule, a log without times for temporal_global, or nobody to ask.
    """
    starts, ends = log.offsets[:-1], log.offsets[1:]
    if rule == "leave_one_out":
        asked = ends - starts >= 3
        train_end = np.where(asked, ends - 2, ends)
        samples = {"val": ends[asked] - 2, "test": ends[asked] - 1}
        notes = {"users_too_short": int((~asked).sum())}
    elif rule == "temporal_global":
        if log.notes.get("no_time"):
            raise DataError("data.split=temporal_global needs times, which this log lacks; use leave_one_out")
        cuts = np.quantile(log.time, [1 - val_fraction - test_fraction, 1 - test_fraction])
        user = np.repeat(np.arange(len(log.users)), log.counts())
        # Within a user times rise, so the number of events before a moment is where its later events begin.
        first = [starts + np.bincount(user[log.time < cut], minlength=len(log.users)) for cut in cuts]
        train_end = first[0]
        known = [train_end > starts, first[1] > starts]
        exists = [train_end < first[1], first[1] < ends]
        samples = {
            "val": first[0][known[0] & exists[0]],
            "test": first[1][known[1] & exists[1]],
        }
        notes = {
            "val_users_without_history": int((~known[0] & exists[0]).sum()),
            "test_users_without_history": int((~known[1] & exists[1]).sum()),
            "val_from": float(cuts[0]),
            "test_from": float(cuts[1]),
        }
    else:
        raise DataError(f"data.split={rule!r}: choose {', '.join(SPLITS)}")
    for name, chosen in samples.items():
        if not len(chosen):
            raise DataError(f"data.split={rule!r} leaves no user to ask in the {name} split")
    in_train = np.zeros(len(log.items) + 1, dtype=bool)
    in_train[log.item[ranges(starts, train_end)]] = True
    for name, chosen in samples.items():
        notes[f"{name}_targets_unseen_in_train"] = int((~in_train[log.item[chosen]]).sum())
    return LogSplit(train_end, samples, notes)


def ranges(starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """All indices of the ranges [starts, ends), one after the other."""
    lengths = ends - starts
    begin = np.repeat(starts - np.r_[0, np.cumsum(lengths)[:-1]], lengths)
    return begin + np.arange(lengths.sum())
