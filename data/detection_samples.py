"""One annotated picture as a network sees it: distorted in training, scaled to fit a square, padded at the right and the bottom."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from data.detection_base import VOID

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def prepare(
    image: Tensor, boxes: Tensor, labels: Tensor, mask: Tensor | None, *, side: int, steps: list[Any]
) -> dict[str, Tensor]:
    """A picture with its boxes and classes per pixel, kept in step.

    Args:
        image: Pixels, uint8 [3, H, W].
        boxes: Corners in pixels, [n, 4].
        labels: Class numbers, [n].
        mask: Class of every pixel, uint8 [H, W]; None for none.
        side: Of the square.
        steps: torchvision's transforms to go through first, see `augmentations`.

    Returns:
        image float32 [3, side, side], normalised; boxes [m, 4], labels [m] (those that still have an area), size [2] of the part that is
        no padding, mask int64 [side, side] where one is given.
    """
    from torchvision import tv_tensors
    from torchvision.transforms import v2

    frame = tuple(image.shape[-2:])
    item: dict[str, Any] = {
        "image": tv_tensors.Image(image),
        "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=frame),
        "labels": labels,
    }
    if mask is not None:
        item["mask"] = tv_tensors.Mask(mask)
    if steps:
        item = v2.Compose(steps)(item)
    height, width = item["image"].shape[-2:]
    factor = side / max(height, width)
    size = (max(1, round(height * factor)), max(1, round(width * factor)))
    item = v2.Resize(size, antialias=True)(item)
    pixels = item["image"].as_subclass(Tensor).float() / 255
    pixels = (pixels - torch.tensor(MEAN).view(-1, 1, 1)) / torch.tensor(STD).view(-1, 1, 1)
    pad = (0, side - size[1], 0, side - size[0])
    left = item["boxes"].as_subclass(Tensor)
    keep = ((left[:, 2:] - left[:, :2]) > 0).all(1)
    out = {
        "image": F.pad(pixels, pad),
        "boxes": left[keep],
        "labels": item["labels"][keep],
        "size": torch.tensor(size),
    }
    if mask is not None:
        out["mask"] = F.pad(item["mask"].as_subclass(Tensor).long(), pad, value=VOID)
    return out


def augmentations(*, flip: float, crop: bool, photometric: bool, boxes: bool) -> list[Any]:
    """Torchvision's transforms of a training picture.

    Args:
        flip: Probability of mirroring it.
        crop: Cut a random window that keeps objects (SSD's IoU crop).
        photometric: Change brightness, contrast and colour.
        boxes: It has boxes; those that a crop empties are dropped.
    """
    from torchvision.transforms import v2

    steps: list[Any] = [v2.RandomPhotometricDistort()] if photometric else []
    steps += [v2.RandomIoUCrop()] if crop else []
    steps += [v2.RandomHorizontalFlip(flip)] if flip else []
    return steps + [v2.SanitizeBoundingBoxes(min_size=1)] if boxes else steps
