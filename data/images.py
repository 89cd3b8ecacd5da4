"""Small image sets that fit in memory: a common data module for MNIST, digits and the like."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from data import baselines
from data.base import SPLITS, SplitDataset, ZooData, check_at_least, check_range, hash_arrays
from data.sampler import BatchKey, generator
from data.transforms import random_affine
from zoo.predict.images import normalise


class TensorImages(ZooData):
    """Images held in memory; whole batches are augmented at once.

    Batches: ``image`` float32 [B, C, H, W] (normalised), ``label`` int64 [B], ``index`` int64 [B] (place in
    the split).

    Args:
        augment: Distort training images at random.
        rotate_deg: Largest rotation either way, degrees.
        shift_px: Largest shift either way along each axis, pixels.
        scale: Largest relative change of size.
        shear: Largest shear either way, as a slope.
        common: Options of :class:`data.base.ZooData`.
    """

    kind = "images"

    def __init__(
        self,
        *,
        augment: bool = True,
        rotate_deg: float = 10.0,
        shift_px: float = 2.0,
        scale: float = 0.1,
        shear: float = 0.1,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        check_range(0, 180, rotate_deg=rotate_deg)
        check_at_least(0, shift_px=shift_px)
        check_range(0, 0.9, scale=scale, shear=shear)
        self.augment = augment
        self.affine = {"rotate_deg": rotate_deg, "shift_px": shift_px, "scale": scale, "shear": shear}
        self._images = self._targets = torch.empty(0)
        self._splits: dict[str, np.ndarray] = {}
        self._mean = self._std = 0.0

    def read(self) -> tuple[Tensor, Tensor, list[str]]:
        """Return images [N, 1, H, W] in 0 .. 1, labels [N] and the label names."""
        raise NotImplementedError

    def split_sizes(self, count: int) -> tuple[int, int]:
        """Sizes of train and val out of ``count`` samples; the rest is test."""
        raise NotImplementedError

    def load(self) -> dict[str, Dataset]:
        """Read, split with ``RandomState(split_seed)``, and take mean and deviation from train."""
        self._images, self._targets, self.labels = self.read()
        order = np.random.RandomState(self.split_seed).permutation(len(self._images))
        train, val = self.split_sizes(len(order))
        self._splits = dict(zip(SPLITS, np.split(order, [train, train + val]), strict=True))
        pixels = self._images[self._splits["train"]]
        self._mean, self._std = float(pixels.mean()), float(pixels.std())
        return {
            split: SplitDataset(len(indices), _Batches(self, indices))
            for split, indices in self._splits.items()
        }

    def batch(self, split_indices: np.ndarray, key: BatchKey) -> dict[str, Tensor]:
        """One batch; augmented when the key belongs to training (epoch >= 0)."""
        index = torch.from_numpy(split_indices[key.indices])
        images = self._images[index]
        if self.augment and key.epoch >= 0:
            images = random_affine(
                images, generator(self.seed, key.epoch, key.batch, key.rank), **self.affine
            )
        return {
            "image": normalise(images, [self._mean], [self._std]),
            "label": self._targets[index],
            "index": torch.from_numpy(key.indices),
        }

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the batches' images."""
        self.setup()
        return tuple(self._images.shape[-2:])

    @property
    def in_channels(self) -> int:
        """Channels of the batches' images."""
        self.setup()
        return self._images.shape[1]

    def preprocessing(self) -> dict[str, Any]:
        """Size, mean and deviation; bright paper with dark ink is inverted."""
        return {
            "kind": "image",
            "channels": self.in_channels,
            "size": list(self.image_size),
            "crop_ratio": 1.0,
            "interpolation": "bilinear",
            "mean": [self._mean],
            "std": [self._std],
            "background": "dark",
        }

    def split_ids(self) -> dict[str, list[str]]:
        """Row numbers of the samples in the source."""
        self.setup()
        return {split: [str(i) for i in indices] for split, indices in self._splits.items()}

    def data_hash(self) -> str:
        """Hash of pixels, labels, split and the version of the baselines."""
        self.setup()
        return hash_arrays(self._images, self._targets, *self._splits.values(), baselines.VERSION)

    def compute_baselines(self) -> dict[str, dict[str, float]]:
        """Majority class, logistic regression and RBF support vectors on pixels."""
        return baselines.classification_baselines(
            *(
                (self._images[indices].flatten(1).numpy(), self._targets[indices].numpy())
                for indices in self._splits.values()
            )
        )


class _Batches:
    """Picklable ``key -> batch`` of one split."""

    def __init__(self, owner: TensorImages, indices: np.ndarray) -> None:
        self.owner = owner
        self.indices = indices

    def __call__(self, key: BatchKey) -> dict[str, Tensor]:
        return self.owner.batch(self.indices, key)
