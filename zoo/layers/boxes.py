"""Boxes: conversions, overlap, and changes relative to a reference box.

`xyxy` are corners x1, y1, x2, y2; `cxcywh` centre, width and height.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

MAX_LOG_SCALE = abs(math.log(16 / 1000))
"""Largest change of log width or height in one refinement, as in Plain-DETR."""


def to_xyxy(boxes: Tensor) -> Tensor:
    """cxcywh [..., 4] to corners."""
    centre, size = boxes[..., :2], boxes[..., 2:]
    return torch.cat((centre - size / 2, centre + size / 2), -1)


def to_cxcywh(boxes: Tensor) -> Tensor:
    """Corners [..., 4] to cxcywh."""
    low, high = boxes[..., :2], boxes[..., 2:]
    return torch.cat(((low + high) / 2, high - low), -1)


def inverse_sigmoid(x: Tensor, eps: float = 1e-4) -> Tensor:
    """log(x / (1 - x)), x kept `eps` away from 0 and 1."""
    x = x.clamp(eps, 1 - eps)
    return (x / (1 - x)).log()


def pairwise_giou(a: Tensor, b: Tensor) -> Tensor:
    """Generalised IoU of every pair of corner boxes: [..., N, 4] and [..., M, 4] to [..., N, M].

    Boxes of no area give -1 .. 0, never NaN. Source: arXiv:1902.09630.
    """
    a, b = a[..., :, None, :], b[..., None, :, :]
    return paired_giou(a, b)


def paired_giou(a: Tensor, b: Tensor) -> Tensor:
    """Generalised IoU of corner boxes of one shape (or broadcastable), [..., 4] to [...]."""
    inner = _overlap(a, b)
    outer = (
        (torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])).clamp(min=0).prod(-1)
    )
    union = _area(a) + _area(b) - inner
    return inner / union.clamp(min=1e-9) - (outer - union) / outer.clamp(min=1e-9)


def paired_iou(a: Tensor, b: Tensor) -> Tensor:
    """IoU of corner boxes of one shape, [..., 4] to [...]."""
    inner = _overlap(a, b)
    return inner / (_area(a) + _area(b) - inner).clamp(min=1e-9)


def _overlap(a: Tensor, b: Tensor) -> Tensor:
    return (
        (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(min=0).prod(-1)
    )


def _area(boxes: Tensor) -> Tensor:
    return (boxes[..., 2:] - boxes[..., :2]).clamp(min=0).prod(-1)


def apply_delta(reference: Tensor, delta: Tensor) -> Tensor:
    """Move and scale boxes: centre by `delta` in units of the reference's size, size by exp(delta).

    Args:
        reference: cxcywh, [..., 4].
        delta: dx, dy, dw, dh, [..., 4]; dw and dh are limited to +-MAX_LOG_SCALE.
    """
    centre = reference[..., :2] + reference[..., 2:] * delta[..., :2]
    size = reference[..., 2:] * delta[..., 2:].clamp(-MAX_LOG_SCALE, MAX_LOG_SCALE).exp()
    return torch.cat((centre, size), -1)


def delta_between(reference: Tensor, boxes: Tensor) -> Tensor:
    """The delta that `apply_delta` needs to turn `reference` into `boxes`, both cxcywh [..., 4] with positive sizes."""
    size = reference[..., 2:].clamp(min=1e-6)
    centre = (boxes[..., :2] - reference[..., :2]) / size
    return torch.cat((centre, (boxes[..., 2:].clamp(min=1e-6) / size).log()), -1)
