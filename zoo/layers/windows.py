"""Maps of large pictures from overlapping windows of the size that a model was trained on."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.errors import ConfigError


def sliding_window(
    score: Callable[[Tensor], Tensor],
    images: Tensor,
    window: tuple[int, int],
    *,
    overlap: float = 1 / 3,
    batch: int = 32,
) -> Tensor:
    """Class probabilities of every pixel, averaged over the windows that see it.

    Windows lie on a regular raster whose last row and column are moved inwards, so that all of them are full; only
    pictures smaller than a window are padded (with zeros).

    Args:
        score: From images [n, C, h, w] of the window's size to logits [n, K, h, w].
        images: [B, C, H, W].
        window: Height and width of the windows.
        overlap: Share of a window that the next one sees again, at least, [0, 1).
        batch: Windows scored at a time.

    Returns:
        [B, K, H, W]; each pixel's values sum to one.
    """
    if min(window) < 1 or not 0 <= overlap < 1:
        raise ConfigError(f"window={tuple(window)} must be positive and overlap={overlap} must lie in [0, 1)")
    height, width = images.shape[-2:]
    images = F.pad(images, (0, max(0, window[1] - width), 0, max(0, window[0] - height)))
    full = images.shape[-2:]
    places = [
        (b, y, x)
        for b in range(len(images))
        for y in _starts(full[0], window[0], overlap)
        for x in _starts(full[1], window[1], overlap)
    ]
    total: Tensor | None = None
    seen = images.new_zeros(len(images), 1, *full)
    for at in range(0, len(places), batch):
        group = places[at : at + batch]
        cuts = torch.stack([images[b, :, y : y + window[0], x : x + window[1]] for b, y, x in group])
        for (b, y, x), found in zip(group, score(cuts).softmax(1), strict=True):
            if total is None:
                total = found.new_zeros(len(images), len(found), *full)
            total[b, :, y : y + window[0], x : x + window[1]] += found
            seen[b, :, y : y + window[0], x : x + window[1]] += 1
    return (total / seen)[..., :height, :width]


def _starts(length: int, window: int, overlap: float) -> list[int]:
    """Where windows begin on one axis."""
    stride = max(1, round(window * (1 - overlap)))
    return sorted({min(start, length - window) for start in range(0, length - window + stride, stride)})
