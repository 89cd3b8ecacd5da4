"""Controls for next-item recommendation without any training by gradient.

All fit on the training events alone and, like the model, see the whole history of a user when asked. Settings are
chosen by NDCG@10 on validation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from data.rec_metrics import CUTOFFS, count_above, ranking_metrics
from data.sampler import EpochSampler

if TYPE_CHECKING:
    from data.rec_base import SequenceData

VERSION = "2"  # part of the cache key: raise it when a method changes
DENSE_ITEMS = 20_000  # item-item matrices are dense up to here
EASE_LAMBDA = (100.0, 300.0, 1000.0)
NEIGHBOURS = (20, 50, 100)
MARKOV_WINDOW = (1, 2, 3, 5)
MIX = (1.0, 3.0, 10.0, 30.0)

Scorer = Callable[["History"], Tensor]


class History:
    """One batch of questions.

    Attributes:
        seen: 1 for the items of the history, else 0, float32 [B, I].
        last: Last item of each history, from 0, int64 [B].
        target: The right item, from 0, int64 [B].
        listed: Items of the history from 0, -1 = none, [B, S].
    """

    def __init__(self, batch: dict[str, Tensor], items: int) -> None:
        listed = batch["seen"]
        self.seen = torch.zeros(len(listed), items + 1).scatter_(1, listed, 1.0)[:, 1:]
        self.last = batch["items"][:, -1] - 1
        self.target = batch["target"] - 1
        self.listed = listed - 1


def control_scores(data: SequenceData) -> dict[str, dict[str, float]]:
    """Test metrics of every control, by name."""
    matrix = interaction_matrix(data)
    popularity = torch.from_numpy(np.asarray(matrix.sum(0), np.float32).ravel())
    scores = {"popularity": evaluate(data, "test", lambda h: popularity.expand(len(h.last), -1))}
    scores["markov"], chain = _best(
        data, (markov(data, window) for window in MARKOV_WINDOW), lambda m: lambda h: m[h.last]
    )
    if data.num_items > DENSE_ITEMS:
        return scores
    together = torch.from_numpy((matrix.T @ matrix).toarray())
    scores["item_knn"], _ = _best(
        data, (item_knn(together, k) for k in NEIGHBOURS), lambda m: lambda h: h.seen @ m
    )
    scores["ease"], weights = _best(
        data, (ease(together, penalty) for penalty in EASE_LAMBDA), lambda m: lambda h: h.seen @ m
    )
    scores["ease_markov"], _ = _best(
        data, iter(MIX), lambda f: lambda h: h.seen @ weights + f * chain[h.last]
    )
    order = ("popularity", "item_knn", "ease", "markov", "ease_markov")
    return {name: scores[name] for name in order}


def evaluate(data: SequenceData, split: str, scorer: Scorer) -> dict[str, float]:
    """Mean metrics of a scorer over a split: all of it, also in one of several processes."""
    rows = []
    dataset = data.dataset(split)
    for key in EpochSampler(len(dataset), data.eval_batch_size, shuffle=False):
        history = History(dataset[key], data.num_items)
        excluded = history.listed if data.exclude_seen else None
        above, tied = count_above(scorer(history), history.target, excluded)
        rows.append(ranking_metrics(above, tied, CUTOFFS))
    return {name: float(torch.cat([row[name] for row in rows]).mean()) for name in rows[0]}


def _best(
    data: SequenceData, candidates: Iterator, scorer_of: Callable[[object], Scorer]
) -> tuple[dict[str, float], object]:
    """Test metrics of the candidate that validation prefers, and the candidate."""
    best, chosen = -1.0, None
    for candidate in candidates:
        value = evaluate(data, "val", scorer_of(candidate))["ndcg_at_10"]
        if value > best:
            best, chosen = value, candidate
    return evaluate(data, "test", scorer_of(chosen)), chosen


def interaction_matrix(data: SequenceData) -> sparse.csr_array:
    """Who did what in training, 0 or 1, float32 [U, I]."""
    log = data.log
    user = np.repeat(np.arange(len(log.users)), data.parts.train_end - log.offsets[:-1])
    places = user, data.train_items() - 1
    matrix = sparse.csr_array((np.ones(len(user), np.float32), places), (len(log.users), len(log.items)))
    matrix.data[:] = 1  # repeated events were summed
    return matrix


def item_knn(together: Tensor, neighbours: int) -> Tensor:
    """Cosine similarity of items, the nearest `neighbours` of each kept, [I, I].

    Args:
        together: How many users did both items, [I, I].
        neighbours: How many.
    """
    norm = together.diagonal().sqrt().clamp_min(1e-9)
    similar = (together / norm / norm[:, None]).fill_diagonal_(0)
    if neighbours < len(similar):
        least = similar.topk(neighbours, dim=0).values[-1]
        similar = similar * (similar >= least)
    return similar


def ease(together: Tensor, penalty: float) -> Tensor:
    """Item weights with zero diagonal that reconstruct the users' rows best under a ridge penalty; arguments as `item_knn`.

    Source: Steck, "Embarrassingly shallow autoencoders for sparse data", arXiv:1905.03375, eq. 8.
    """
    gram = together.double()
    inverse = torch.linalg.inv(gram + penalty * torch.eye(len(gram), dtype=torch.float64))
    return (inverse / -inverse.diagonal()).fill_diagonal_(0).float()


def markov(data: SequenceData, window: int) -> Tensor:
    """How likely item j follows within `window` events of item i, nearer ones weighing more, [I, I]."""
    log, ends = data.log, data.parts.train_end
    count = len(log.items)
    total = np.zeros(count * count, np.float32) if count <= DENSE_ITEMS else None
    pairs, weights = [], []
    for start, end in zip(log.offsets[:-1], ends, strict=True):
        sequence = log.item[start:end] - 1
        for step in range(1, window + 1):
            if len(sequence) > step:
                pairs.append(sequence[:-step] * count + sequence[step:])
                weights.append(np.full(len(sequence) - step, 1.0 / step, np.float32))
    pair, weight = np.concatenate(pairs), np.concatenate(weights)
    if total is None:
        keys, inverse = np.unique(pair, return_inverse=True)
        values = np.bincount(inverse, weight)
        rows, columns = keys // count, keys % count
        sums = np.bincount(rows, values, minlength=count)
        indices = torch.from_numpy(np.stack((rows, columns)))
        values = torch.from_numpy((values / sums[rows]).astype(np.float32))
        return _SparseRows(torch.sparse_coo_tensor(indices, values, (count, count)).coalesce())
    np.add.at(total, pair, weight)
    matrix = torch.from_numpy(total.reshape(count, count))
    return matrix / matrix.sum(1, keepdim=True).clamp_min(1e-9)


class _SparseRows:
    """Rows of a sparse matrix as dense tensors."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix

    def __getitem__(self, rows: Tensor) -> Tensor:
        return self.matrix.index_select(0, rows).to_dense()
