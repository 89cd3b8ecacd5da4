"""Batches of utterances of like length: two-dimensional buckets, their batch sizes, and an epoch sampler over them.

Paper: "Training and inference efficiency of encoder-decoder speech models", arXiv:2503.05931. Differs from the released
script in: token sub-buckets are cut from their own duration bucket's utterances (the script looks at all longer ones too).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import Sampler

from data.errors import DataError
from data.sampler import BatchKey, generator


@dataclass(frozen=True)
class Bucket:
    """Utterances of like length.

    Args:
        max_duration_s: Longest utterance.
        max_tokens: Longest transcript.
        members: Numbers of the utterances, int64.
    """

    max_duration_s: float
    max_tokens: int
    members: np.ndarray


def equal_shares(values: np.ndarray, parts: int) -> list[np.ndarray]:
    """Cut indices sorted by `values` into up to `parts` runs of equal sums; equal values stay together."""
    order = np.argsort(values, kind="stable")
    cumulative = np.cumsum(values[order], dtype=np.float64)
    wanted = cumulative[-1] * np.arange(1, parts) / parts
    cuts = np.searchsorted(cumulative, wanted)
    # A cut inside a run of equal values moves behind it, so that one length has one bucket.
    cuts = [
        int(np.searchsorted(values[order], values[order[min(c, len(order) - 1)]], side="right")) for c in cuts
    ]
    return [run for run in np.split(order, sorted(set(cuts))) if len(run)]


def make_buckets(
    durations_s: Sequence[float], tokens: Sequence[int], *, buckets: int, token_buckets: int = 1
) -> list[Bucket]:
    """Two-dimensional buckets: equal total duration each, cut again at equal total tokens.

    Duration buckets that fall together (many utterances of one length) leave their share of cuts to the tokens.

    Args:
        durations_s: Length of each utterance.
        tokens: Length of each transcript.
        buckets: Duration buckets wanted, >= 1.
        token_buckets: Token buckets in each, >= 1.
    """
    if buckets < 1 or token_buckets < 1:
        raise DataError(f"buckets={buckets} and token_buckets={token_buckets} must be at least 1")
    durations, counts = np.asarray(durations_s, dtype=np.float64), np.asarray(tokens, dtype=np.int64)
    found = []
    runs = equal_shares(durations, buckets)
    total = durations.sum()
    for run in runs:
        merged = max(1, round(durations[run].sum() / total * buckets)) if total else 1
        for part in equal_shares(np.maximum(counts[run], 1), token_buckets * merged):
            members = run[part]
            found.append(Bucket(float(durations[members].max()), int(counts[members].max()), members))
    return found


def padding_ratio(lengths: Sequence[int] | np.ndarray, batches: Sequence[np.ndarray]) -> float:
    """Share of padding in batches padded to their longest member: 1 - sum of lengths / sum of padded lengths."""
    lengths = np.asarray(lengths)
    real = sum(lengths[b].sum() for b in batches)
    padded = sum(lengths[b].max() * len(b) for b in batches)
    return float(1 - real / padded) if padded else 0.0


def search_batch_size(
    fits: Callable[[int], bool], *, start: int = 32, tolerance: float = 0.05, limit: int = 1 << 20
) -> int:
    """Largest batch size that fits, to within `tolerance`.

    Doubles while it fits, halves while it does not, then bisects.

    Args:
        fits: Runs a step at that batch size; False when memory does not suffice. Monotone.
        start: First size tried.
        tolerance: Relative gap between what fits and what does not at which the search stops.
        limit: Largest size tried.

    Returns:
        A size that fits; 0 when a single sample does not.
    """
    size, good, bad = max(1, min(start, limit)), 0, limit + 1
    while good < size < bad:
        if fits(size):
            good, size = size, min(2 * size, limit)
        else:
            bad, size = size, size // 2
    while bad - good > 1 and bad - good > tolerance * bad:
        middle = (good + bad) // 2
        if fits(middle):
            good = middle
        else:
            bad = middle
    return good


class BucketSampler(Sampler[BatchKey]):
    """Yields batches drawn from one bucket each; all processes draw the same bucket at the same step.

    Has the interface of `data.sampler.EpochSampler`, so an epoch can start at any batch. What a bucket cannot share
    evenly among the processes is left out, a different remainder each epoch.

    Args:
        buckets: From `make_buckets`.
        batch_sizes: Utterances per step and process, one for each bucket.
        seed: Seed of the order.
        rank: This process.
        world_size: Number of processes.
    """

    def __init__(
        self,
        buckets: Sequence[Bucket],
        batch_sizes: Sequence[int],
        *,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if len(buckets) != len(batch_sizes) or min(batch_sizes, default=0) < 1:
            raise DataError("one batch size of at least 1 is needed for each bucket")
        self.buckets, self.batch_sizes = list(buckets), list(batch_sizes)
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.batch_size = max(batch_sizes)
        self.epoch = self.start_batch = 0

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        """Choose the epoch and the first batch of it that the next iteration yields."""
        self.epoch, self.start_batch = epoch, start_batch

    def batches(self) -> list[np.ndarray]:
        """Utterance numbers of all batches of this process in the current epoch, in order."""
        found: list[np.ndarray] = []
        for number, (bucket, size) in enumerate(zip(self.buckets, self.batch_sizes, strict=True)):
            order = torch.randperm(len(bucket.members), generator=generator(self.seed, self.epoch, number))
            members = bucket.members[order.numpy()]
            share = len(members) // self.world_size
            own = members[self.rank : share * self.world_size : self.world_size]
            found += [own[i : i + size] for i in range(0, share, size)]
        order = torch.randperm(len(found), generator=generator(self.seed, self.epoch, 1 << 20))
        return [found[i] for i in order.tolist()]

    def __len__(self) -> int:
        shares = [len(b.members) // self.world_size for b in self.buckets]
        return sum(-(-share // size) for share, size in zip(shares, self.batch_sizes, strict=True))

    def __iter__(self) -> Iterator[BatchKey]:
        epoch = self.epoch
        for i, indices in enumerate(self.batches()):
            if i >= self.start_batch:
                yield BatchKey(indices, epoch, i, self.rank)
