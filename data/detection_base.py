"""What data sets of boxes and masks share: batch layout, ground truth, baselines by target."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from data.base import DataError, ZooData

VOID = 255


class SceneData(ZooData):
    """Images with labelled boxes, a class per pixel, or both.

    Batches:
        image: float32 [B, C, H, W], normalised; padding is zero.
        boxes: float32 [B, T, 4], corners x1, y1, x2, y2 in pixels of `image`; rows without object are zero.
        labels: int64 [B, T], -1 where there is no object.
        size: int64 [B, 2], height and width of `image` that is no padding.
        index: int64 [B], place in the split.
        mask: int64 [B, H, W], class per pixel in `mask_labels`; VOID (255) where it does not count.
        original_mask: uint8 [h, w] of each image before it was resized; in evaluation, where images are resized.

    Attributes:
        provides: Which targets there are, "boxes" and "masks".
        padded: Whether some images are smaller than the batch, so that padding must be masked.
        has_background: Class 0 of the masks is "background", left out of `miou_foreground`.
    """

    kind: ClassVar[str] = "scenes"
    has_background: bool = True
    padded: bool = False
    in_channels: int = 3

    def __init__(self, *, batch_size: int = 16, eval_batch_size: int = 32, **common: Any) -> None:
        super().__init__(batch_size=batch_size, eval_batch_size=eval_batch_size, **common)
        self.target: str | None = None  # what the task trains on; picks the baselines that are shown

    @property
    def provides(self) -> frozenset[str]:
        return frozenset(("boxes", "masks"))

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the batches' images."""
        raise NotImplementedError

    @property
    def mask_labels(self) -> list[str]:
        """Class names of the masks."""
        return ["background", *self.labels] if self.has_background else list(self.labels)

    def ground_truth(self, split: str) -> dict[str, Any]:
        """Annotations of a split as a COCO dictionary in pixels of the original images.

        Image ids are places in the split, category ids places in `labels`.
        """
        raise NotImplementedError

    def original_size(self, split: str, index: int) -> tuple[int, int]:
        """Height and width of an image before it was resized."""
        return self.image_size

    def require(self, target: str, task: str) -> None:
        """Refuse a task whose targets these data lack.

        Raises:
            DataError: Data without boxes or without masks.
        """
        if target not in self.provides:
            raise DataError(
                f"data {self.name!r} has no {target}, which task {task!r} trains on; it has "
                f"{' and '.join(sorted(self.provides)) or 'nothing'}"
            )
        self.target = target

    def baselines(self) -> dict[str, dict[str, float]]:
        """Scores of trivial and classical methods for the target that the task trains on."""
        prefix = {"boxes": ("ap", "recall"), "masks": ("miou", "dice", "accuracy"), None: ("",)}[self.target]
        rows = {
            name: {k: v for k, v in scores.items() if k.startswith(prefix)}
            for name, scores in super().baselines().items()
        }
        return {name: scores for name, scores in rows.items() if scores}


def coco_dictionary(
    sizes: Sequence[tuple[int, int]],
    boxes: Sequence[np.ndarray],
    labels: Sequence[np.ndarray],
    names: Sequence[str],
    *,
    areas: Sequence[np.ndarray] | None = None,
    crowds: Sequence[np.ndarray] | None = None,
) -> dict[str, Any]:
    """Lists of boxes as a COCO dictionary.

    Args:
        sizes: Height and width of each image.
        boxes: Per image corners x1, y1, x2, y2, [n, 4].
        labels: Per image class numbers, [n].
        names: Class names.
        areas: Per image areas in pixels for the small / medium / large split; box areas when left out.
        crowds: Per image flags of crowd regions; none when left out.
    """
    annotations = []
    for image, (own, classes) in enumerate(zip(boxes, labels, strict=True)):
        for k, (box, label) in enumerate(zip(np.asarray(own, float), classes, strict=True)):
            x1, y1, x2, y2 = (float(v) for v in box)
            area = (x2 - x1) * (y2 - y1) if areas is None else float(areas[image][k])
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image,
                    "category_id": int(label),
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": area,
                    "iscrowd": int(crowds[image][k]) if crowds is not None else 0,
                }
            )
    return {
        "images": [{"id": i, "height": int(h), "width": int(w)} for i, (h, w) in enumerate(sizes)],
        "annotations": annotations,
        "categories": [{"id": i, "name": name} for i, name in enumerate(names)],
    }


def pad_objects(
    boxes: Sequence[Tensor], labels: Sequence[Tensor], rows: int | None = None
) -> tuple[Tensor, Tensor]:
    """Per-image boxes [n, 4] and labels [n] to [B, T, 4] and [B, T]; empty rows are zero and -1."""
    count = max([1, *map(len, labels)]) if rows is None else rows
    out = torch.zeros(len(boxes), count, 4)
    classes = torch.full((len(boxes), count), -1, dtype=torch.int64)
    for i, (own, names) in enumerate(zip(boxes, labels, strict=True)):
        out[i, : len(own)] = own
        classes[i, : len(names)] = names
    return out, classes


def confusion_scores(
    counts: np.ndarray, has_background: bool, names: Sequence[str] = ()
) -> Mapping[str, float]:
    """Data-set level scores from a confusion matrix [true, predicted].

    `miou` and `dice` average over the classes that occur in truth or prediction; `miou_foreground` leaves class 0
    out where it is background.
    """
    counts = np.asarray(counts, dtype=np.float64)
    hit, true, predicted = counts.diagonal(), counts.sum(1), counts.sum(0)
    union = true + predicted - hit
    present = union > 0
    iou = np.divide(hit, union, out=np.full(len(hit), np.nan), where=present)
    dice = np.divide(2 * hit, true + predicted, out=np.full(len(hit), np.nan), where=present)
    scores = {"miou": _mean(iou), "dice": _mean(dice), "accuracy": float(hit.sum() / max(1.0, counts.sum()))}
    if has_background:
        scores = {"miou_foreground": _mean(iou[1:]), **scores, "dice_foreground": _mean(dice[1:])}
    if len(names):
        scores |= {f"iou_{name}": float(v) for name, v in zip(names, iou, strict=True)}
    return scores


def _mean(values: np.ndarray) -> float:
    values = values[~np.isnan(values)]
    return float(values.mean()) if len(values) else 0.0
