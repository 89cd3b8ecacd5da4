"""COCO's polygons and run lengths as pixels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from data.errors import DataError

VOID = 255


def decode_runs(counts: Sequence[int] | str | bytes, size: tuple[int, int]) -> np.ndarray:
    """COCO's run-length code as bool [H, W]: lengths alternate between outside and inside, down the columns.

    Args:
        counts: Lengths, or COCO's compressed text: 6 bits a character from "0" on, the lowest 5 of them data and
            the sixth "more follows", signed; from the third length on differences to the length two before.
        size: Height and width.

    Raises:
        DataError: Lengths that do not add up to the image.
    """
    lengths = _uncompress(counts) if isinstance(counts, (str, bytes)) else [int(c) for c in counts]
    height, width = size
    if sum(lengths) != height * width or any(n < 0 for n in lengths):
        raise DataError(f"run lengths add up to {sum(lengths)} pixels, the image has {height} x {width}")
    inside = np.arange(len(lengths)) % 2 == 1
    return np.repeat(inside, lengths).reshape(width, height).T


def _uncompress(text: str | bytes) -> list[int]:
    codes = text.encode("ascii") if isinstance(text, str) else text
    lengths: list[int] = []
    value = shift = 0
    for code in codes:
        bits = code - 48
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            if bits & 16:
                value -= 1 << shift
            if len(lengths) > 2:
                value += lengths[-2]
            lengths.append(value)
            value = shift = 0
    return lengths


def segment_mask(segment: Any, size: tuple[int, int]) -> np.ndarray:
    """One object's polygons or run lengths as bool [H, W]."""
    if isinstance(segment, dict):
        own = tuple(int(v) for v in segment.get("size", size))
        if own != tuple(size):
            raise DataError(f"run lengths of {own[0]} x {own[1]} pixels in an image of {size[0]} x {size[1]}")
        return decode_runs(segment["counts"], size)
    out = np.zeros(size, dtype=bool)
    for polygon in segment:
        if len(polygon) < 6 or len(polygon) % 2:
            raise DataError(f"a polygon needs three or more x, y pairs, got {len(polygon)} numbers")
        out |= _fill(np.asarray(polygon, dtype=float).reshape(-1, 2), size)
    return out


def _fill(corners: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Pixels whose centre lies inside a polygon (even-odd rule), bool [H, W]."""
    out = np.zeros(size, dtype=bool)
    (x1, y1), (x2, y2) = corners.T, np.roll(corners, -1, 0).T
    low, high = max(0, int(np.floor(y1.min()))), min(size[0], int(np.ceil(y1.max())))
    for row in range(low, high):
        y = row + 0.5
        crossing = (y1 <= y) != (y2 <= y)
        if crossing.any():
            at = (y - y1[crossing]) / (y2 - y1)[crossing]
            ends = np.sort(x1[crossing] + at * (x2 - x1)[crossing])
            for start, stop in np.ceil(ends.reshape(-1, 2) - 0.5).astype(int):
                out[row, max(0, start) : max(0, stop)] ^= True
    return out


def paint_segments(
    size: tuple[int, int],
    segments: Sequence[Any] | None,
    labels: np.ndarray,
    crowd: np.ndarray,
    area: np.ndarray,
) -> np.ndarray:
    """Objects as one class per pixel, uint8 [H, W]: 0 background, 1 + label, VOID for crowds; small ones on top."""
    out = np.zeros(size, dtype=np.uint8)
    if segments is None:
        return out
    for i in sorted(range(len(segments)), key=lambda k: (not crowd[k], -area[k])):
        if segments[i]:
            out[segment_mask(segments[i], size)] = VOID if crowd[i] else int(labels[i]) + 1
    return out
