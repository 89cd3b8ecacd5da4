"""COCO's polygons and run lengths as pixels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

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
    canvas = Image.new("1", (size[1], size[0]))
    draw = ImageDraw.Draw(canvas)
    for polygon in segment:
        if len(polygon) < 6 or len(polygon) % 2:
            raise DataError(f"a polygon needs three or more x, y pairs, got {len(polygon)} numbers")
        # COCO counts from pixel corners, PIL from pixel centres.
        draw.polygon([float(v) - 0.5 for v in polygon], fill=1, outline=0)
    return np.array(canvas)


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
