"""What every data module does: splits, loaders that replay exactly, baselines, preprocessing for prediction."""

from __future__ import annotations

import hashlib
import json
from typing import Any, ClassVar

import numpy as np
import torch
import torch.distributed as dist
from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import Dataset

from data.carriers import cache_dir, write_atomic
from data.errors import DataError
from data.sampler import BatchKey, EpochLoader, EpochSampler

__all__ = ["SPLITS", "DataError", "ZooData", "check_at_least", "check_range", "hash_arrays"]

SPLITS = ("train", "val", "test")


class ZooData(LightningDataModule):
    """Base of all data modules.

    A subclass implements :meth:`load`, which returns one dataset a split; ``dataset[BatchKey]`` gives a whole
    batch as a dict of tensors. All options are keyword-only and equal the keys of ``conf/data/<name>.yaml``.

    Args:
        batch_size: Training samples per step and process.
        eval_batch_size: Samples per step in validation and test.
        num_workers: Worker processes of the loaders; 0 loads in the main process.
        seed: Order of the training samples and augmentation. The split does not depend on it.
        split_seed: Who goes into train, val and test. The same for all seeds of a comparison.
    """

    name: ClassVar[str] = ""
    kind: ClassVar[str] = ""

    def __init__(
        self,
        *,
        batch_size: int = 64,
        eval_batch_size: int = 256,
        num_workers: int = 0,
        seed: int = 0,
        split_seed: int = 0,
    ) -> None:
        super().__init__()
        check_at_least(1, batch_size=batch_size, eval_batch_size=eval_batch_size)
        check_at_least(0, num_workers=num_workers, seed=seed, split_seed=split_seed)
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.split_seed = split_seed
        self._labels: list[str] = []
        self.skipped: dict[str, str] = {}  # file -> why it was left out
        self._datasets: dict[str, Dataset] = {}

    # -- to be implemented -------------------------------------------------------------------------------

    def fetch(self) -> None:
        """Bring the raw data into the cache; runs in one process only. Nothing to do by default."""

    def load(self) -> dict[str, Dataset]:
        """Read the raw data, set ``labels`` and ``skipped``, and return the datasets of all splits."""
        raise NotImplementedError

    def preprocessing(self) -> dict[str, Any]:
        """Everything needed to turn raw input into model input; plain values, stored with the weights."""
        raise NotImplementedError

    def split_ids(self) -> dict[str, list[str]]:
        """Names of the samples of each split, in order."""
        raise NotImplementedError

    def data_hash(self) -> str:
        """Hash of everything that a baseline depends on: samples, targets and split."""
        raise NotImplementedError

    def compute_baselines(self) -> dict[str, dict[str, float]]:
        """Fit trivial and classical models on train (settings chosen on val), score them on test."""
        return {}

    # -- Lightning ---------------------------------------------------------------------------------------

    def prepare_data(self) -> None:
        """Fetch the data; Lightning calls this in one process."""
        self.fetch()

    def setup(self, stage: str | None = None) -> None:
        """Load the data once, whatever the stage."""
        if self._datasets:
            return
        datasets = self.load()
        for split in SPLITS:
            if split not in datasets or len(datasets[split]) == 0:
                raise DataError(f"data {self.name!r}: the {split} split is empty")
        self._datasets = datasets

    def dataset(self, split: str) -> Dataset:
        """The dataset of one split, loading the data if need be."""
        self.setup()
        if split not in self._datasets:
            raise DataError(
                f"data {self.name!r} has no split {split!r}; there are {', '.join(self._datasets)}"
            )
        return self._datasets[split]

    def loader(self, split: str, *, shuffle: bool = False) -> EpochLoader:
        """Loader of a split: in order and complete, or shuffled and augmented as in training."""
        dataset = self.dataset(split)
        parallel = dist.is_available() and dist.is_initialized()
        sampler = EpochSampler(
            len(dataset),
            self.batch_size if shuffle else self.eval_batch_size,
            shuffle=shuffle,
            seed=self.seed,
            drop_last=shuffle and self.drop_last,
            rank=dist.get_rank() if parallel else 0,
            world_size=dist.get_world_size() if parallel else 1,
        )
        return EpochLoader(dataset, sampler, num_workers=self.num_workers)

    @property
    def drop_last(self) -> bool:
        """Whether training leaves out a last, smaller batch."""
        return False

    def train_dataloader(self) -> EpochLoader:
        """Shuffled and augmented training batches."""
        return self.loader("train", shuffle=True)

    def val_dataloader(self) -> EpochLoader:
        """Validation batches, in order."""
        return self.loader("val")

    def test_dataloader(self) -> EpochLoader:
        """Test batches, in order."""
        return self.loader("test")

    def __getstate__(self) -> dict[str, Any]:
        """Workers get the data without the trainer that Lightning attaches."""
        return {**self.__dict__, "trainer": None}

    # -- records -----------------------------------------------------------------------------------------

    @property
    def labels(self) -> list[str]:
        """Class names; the class number is the place in this list."""
        if not self._labels:
            self.setup()
        return self._labels

    @labels.setter
    def labels(self, names: list[str]) -> None:
        self._labels = list(names)

    @property
    def num_classes(self) -> int:
        """Number of labels."""
        return len(self.labels)

    def split_record(self) -> dict[str, Any]:
        """Sizes and hashes of the splits: two runs with equal records used the same samples."""
        ids = self.split_ids()
        return {
            "data": self.name,
            "split_seed": self.split_seed,
            "sizes": {split: len(names) for split, names in ids.items()},
            "sha256": {
                split: hashlib.sha256("\n".join(names).encode()).hexdigest() for split, names in ids.items()
            },
            "skipped": len(self.skipped),
        }

    def baselines(self) -> dict[str, dict[str, float]]:
        """Scores of trivial and classical models on the test split, by name and metric.

        Computed once per data, split and version of the method, then read from the cache.
        """
        self.setup()
        path = cache_dir() / "baselines" / f"{self.name}-{self.data_hash()[:24]}.json"
        if path.is_file():
            try:
                return json.loads(path.read_text())
            except ValueError:  # a damaged cache file is computed again
                pass
        scores = self.compute_baselines()
        try:
            write_atomic(path, json.dumps(scores).encode())
        except OSError:  # a read-only or full cache only costs the time next time
            pass
        return scores


class SplitDataset(Dataset):
    """A split whose batches are made by a function of (key, training or not)."""

    def __init__(self, length: int, batch: Any) -> None:
        self._length = length
        self._batch = batch

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, key: BatchKey) -> dict[str, Tensor]:
        return self._batch(key)


def check_at_least(minimum: float, **values: float) -> None:
    """Raise DataError for the first value below ``minimum``."""
    for name, value in values.items():
        if not value >= minimum:
            raise DataError(f"data.{name}={value} is too small: it must be at least {minimum}")


def check_range(low: float, high: float, **values: float) -> None:
    """Raise DataError for the first value outside [low, high]."""
    for name, value in values.items():
        if not low <= value <= high:
            raise DataError(f"data.{name}={value} is out of range: it must lie between {low} and {high}")


def hash_arrays(*arrays: np.ndarray | Tensor | str) -> str:
    """SHA-256 over shapes, types and contents."""
    digest = hashlib.sha256()
    for item in arrays:
        if isinstance(item, str):
            digest.update(item.encode() + b"\0")
            continue
        array = item.numpy() if isinstance(item, torch.Tensor) else item
        digest.update(f"{array.dtype}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
