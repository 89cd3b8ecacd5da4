"""One annotated image as every format gives it, and what is checked while reading it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor

from data.errors import DataError
from zoo.predict.images import UNREADABLE, flatten_modes


@dataclass
class Record:
    """One image and what is in it, in pixels of the picture as `read_image` gives it.

    Attributes:
        path: Image file.
        size: Height and width.
        boxes: Corners x1, y1, x2, y2, [n, 4].
        labels: Class numbers, [n].
        crowd: Flags of regions that count neither as object nor as mistake, [n].
        area: Pixels of each object, [n].
        segments: Polygons or run lengths of each object, or None.
        mask: File with one class per pixel, or None.
    """

    path: Path
    size: tuple[int, int]
    boxes: np.ndarray = field(default_factory=lambda: np.zeros((0, 4)))
    labels: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    crowd: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=bool))
    area: np.ndarray = field(default_factory=lambda: np.zeros(0))
    segments: list[Any] | None = None
    mask: Path | None = None


def clean_boxes(
    boxes: np.ndarray, size: tuple[int, int], names: Sequence[str], skipped: Mapping[str, str]
) -> tuple[np.ndarray, np.ndarray]:
    """Boxes cut to the image, and which of them have an area; the others are noted in `skipped`.

    Args:
        boxes: Corners in pixels, [n, 4].
        size: Height and width of the image.
        names: What to call each box in `skipped`.
        skipped: Gets a line per box that is left out.
    """
    boxes = np.asarray(boxes, dtype=float).reshape(-1, 4)
    finite = np.isfinite(boxes).all(1)
    limit = np.array([size[1], size[0]] * 2, dtype=float)
    boxes = np.clip(np.nan_to_num(boxes, posinf=0, neginf=0), 0, limit)
    good = finite & (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
    for i in np.flatnonzero(~good):
        skipped[names[i]] = "box without area inside the image" if finite[i] else "box is not a number"
    return boxes, good


def image_size_of(path: Path, *, upright: bool = True) -> tuple[int, int]:
    """Height and width from a file's header: of the picture as it is shown, or of its pixels as they are stored.

    Raises:
        DataError: It cannot be read.
    """
    try:
        with Image.open(path) as file:
            on_its_side = upright and file.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
            return (file.width, file.height) if on_its_side else (file.height, file.width)
    except UNREADABLE as error:
        raise DataError(f"cannot read image {path}: {error}") from None


def read_image(path: Path, size: tuple[int, int] | None = None) -> Tensor:
    """Pixels of a file, uint8 [3, H, W], turned upright as its EXIF orientation says.

    So viewers and annotation tools show it, and so prediction reads it. Libraries that ignore the orientation (torchvision's COCO data
    set) number the stored pixels instead; an annotation tells by its height and width, unless the turn leaves them as they are.

    Args:
        path: The file.
        size: Height and width that the annotation gives. Where only the stored pixels have them, those are returned.

    Raises:
        DataError: It cannot be read.
    """
    try:
        with Image.open(path) as file:
            shown = ImageOps.exif_transpose(file)
            stored = size == (file.height, file.width) != (shown.height, shown.width)
            pixels = np.array(flatten_modes(file if stored else shown).convert("RGB"))
    except UNREADABLE as error:
        raise DataError(f"cannot read image {path}: {error}") from None
    return torch.from_numpy(pixels).permute(2, 0, 1)
