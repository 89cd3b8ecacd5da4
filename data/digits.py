"""Scikit-learn's bundled handwritten digits: 1,797 of 8 x 8, no fetch; for tests and machines without any network."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from data import register_data
from data.images import TensorImages


@register_data("digits")
class DigitsData(TensorImages):
    """1,257 training, 180 validation and 360 test digits.

    Args:
        shift_px: Largest shift either way along each axis, pixels.
        common: Options of :class:`data.images.TensorImages`.
    """

    def __init__(self, *, shift_px: float = 1.0, **common: Any) -> None:
        super().__init__(shift_px=shift_px, **common)

    def read(self) -> tuple[Tensor, Tensor, list[str]]:
        """Load the bundled table; its pixels run from 0 to 16."""
        from sklearn.datasets import load_digits

        table = load_digits()
        images = torch.from_numpy(table.images).float().div(16).unsqueeze(1)
        return images, torch.from_numpy(table.target).long(), [str(name) for name in table.target_names]

    def split_sizes(self, count: int) -> tuple[int, int]:
        """70 % and 10 %."""
        return int(count * 0.7), int(count * 0.1) + 1
