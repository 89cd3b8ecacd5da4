"""Batches whose content depends on (seed, epoch, batch) alone, so that a killed run replays them exactly."""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler


def derive_seed(*parts: int) -> int:
    """Mix integers into one 63-bit seed; near inputs give unrelated seeds."""
    words = np.random.SeedSequence([part & 0xFFFFFFFFFFFFFFFF for part in parts]).generate_state(2, np.uint32)
    return (int(words[0]) << 31) ^ int(words[1])


def generator(*parts: int) -> torch.Generator:
    """A CPU generator seeded from integers such as (seed, epoch, batch)."""
    return torch.Generator().manual_seed(derive_seed(*parts))


@contextmanager
def global_seed(*parts: int) -> Iterator[None]:
    """Seed Python's, NumPy's and torch's global generators inside the block, and put them back after it.

    For libraries whose augmentations draw from the global generators.
    """
    seed = derive_seed(*parts)
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])


@dataclass(frozen=True)
class BatchKey:
    """Names one batch: which samples, and where the batch stands in training.

    Args:
        indices: Sample numbers within the split, int64 [B].
        epoch: Epoch, -1 for evaluation.
        batch: Number of the batch within the epoch.
        rank: Process that asks for it.
    """

    indices: np.ndarray
    epoch: int
    batch: int
    rank: int = 0


class EpochSampler(Sampler[BatchKey]):
    """Yields batch keys; the order is a function of (seed, epoch), and an epoch can start at any batch.

    Training: every process gets the same number of batches; what does not divide evenly among the
    processes is left out, a different remainder each epoch. Evaluation (``shuffle=False``): every sample
    exactly once, in as many batches in every process, as collectives inside a model want.

    Args:
        length: Samples in the split.
        batch_size: Samples per batch and process.
        shuffle: Draw a new order for each epoch.
        seed: Seed of the order.
        drop_last: Leave out a last, smaller batch; kept when it is the only one.
        rank: This process.
        world_size: Number of processes.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        *,
        shuffle: bool,
        seed: int = 0,
        drop_last: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if length < world_size > 1:
            kind = "training" if shuffle else "evaluation"
            raise ValueError(f"{length} {kind} samples cannot be shared among {world_size} processes")
        self.length = length
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.drop_last = drop_last
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0
        self.start_batch = 0

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        """Choose the epoch and the first batch of it that the next iteration yields."""
        self.epoch = epoch
        self.start_batch = start_batch

    def order(self) -> np.ndarray:
        """Sample numbers of this process in the current epoch, int64."""
        if not self.shuffle:
            return np.arange(self.rank, self.length, self.world_size)
        share = self.length // self.world_size
        permutation = torch.randperm(self.length, generator=generator(self.seed, self.epoch)).numpy()
        return permutation[self.rank : share * self.world_size : self.world_size]

    def __len__(self) -> int:
        count = self.length // self.world_size
        if not self.shuffle:
            largest = math.ceil(self.length / self.world_size)
            return min(count, math.ceil(largest / self.batch_size))
        if self.drop_last and count >= self.batch_size:
            return count // self.batch_size
        return math.ceil(count / self.batch_size)

    def __iter__(self) -> Iterator[BatchKey]:
        order, epoch = self.order(), self.epoch if self.shuffle else -1
        size, count = self.batch_size, len(self)
        if self.shuffle or self.world_size == 1:
            pieces = [order[i * size : (i + 1) * size] for i in range(count)]
        else:
            pieces = np.array_split(order, count)
        for batch in range(self.start_batch, count):
            yield BatchKey(pieces[batch], epoch, batch, self.rank)


class EpochLoader:
    """Iterates over the batches of a split and can save and restore its position.

    ``dataset[key]`` returns the whole batch for a :class:`BatchKey`, so workers need no state of their own.
    Lightning finds ``sampler.set_epoch``, ``state_dict`` and ``load_state_dict`` by their names; not being a
    DataLoader keeps it from replacing the sampler.
    """

    batch_sampler = None  # Lightning asks everything that has a sampler for it

    def __init__(self, dataset: Dataset, sampler: EpochSampler, *, num_workers: int = 0) -> None:
        self.sampler = sampler
        self._position = (0, 0)  # epoch, batches of it handed out
        self._resume: dict[str, int] | None = None
        self._inner = DataLoader(
            dataset,
            batch_size=None,  # the key already names a whole batch
            sampler=sampler,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # its own, so that making an iterator leaves the global one alone
        )

    @property
    def batch_size(self) -> int:
        """Samples per batch and process."""
        return self.sampler.batch_size

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration yields."""
        self.sampler.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        # A generator starts at the first next(): Lightning makes the iterator before it sets the epoch.
        start, self._resume = self._start(), None
        epoch = self.sampler.epoch
        self.sampler.set_epoch(epoch, start)
        self._position = (epoch, start)
        try:
            for count, batch in enumerate(self._inner, start + 1):
                self._position = (epoch, count)
                yield batch
        finally:
            self.sampler.start_batch = 0

    def _start(self) -> int:
        state = self._resume
        if state is None or state["epoch"] != self.sampler.epoch:
            return self.sampler.start_batch
        now = self.sampler.batch_size * self.sampler.world_size
        if state["global_batch_size"] != now:
            warnings.warn(
                f"the run was saved with a global batch size of {state['global_batch_size']} and goes on with {now}: "
                "the rest of this epoch does not replay the same batches",
                stacklevel=2,
            )
        return min(state["batch"] * state["global_batch_size"] // now, len(self))

    def state_dict(self) -> dict[str, int]:
        """Position: the epoch and how many of its batches were handed out."""
        return {
            "epoch": self._position[0],
            "batch": self._position[1],
            "global_batch_size": self.sampler.batch_size * self.sampler.world_size,
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on at a saved position; it counts only if the epoch that runs next is the saved one."""
        self._resume = dict(state)
