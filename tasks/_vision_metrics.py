"""Metrics of segmentation and detection over whole data sets, as torchmetrics."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from data.detection_base import confusion_scores


class SegmentationScores(Metric):
    """Data-set level scores from one confusion matrix; pixels whose target is `ignore_index` do not count.

    Args:
        classes: Number of classes K.
        has_background: Class 0 is background and left out of `miou_foreground`.
        ignore_index: Target of void pixels.
    """

    full_state_update = False

    def __init__(self, classes: int, *, has_background: bool, ignore_index: int = 255) -> None:
        super().__init__()
        self.classes, self.has_background, self.ignore_index = classes, has_background, ignore_index
        self.add_state(
            "counts", torch.zeros(classes, classes, dtype=torch.int64), dist_reduce_fx="sum", persistent=False
        )

    def update(self, predicted: Tensor, target: Tensor) -> None:
        """Count pixels: predicted classes and targets, int64 of one shape."""
        keep = target != self.ignore_index
        pairs = target[keep] * self.classes + predicted[keep]
        self.counts += torch.bincount(pairs, minlength=self.classes**2).view(self.classes, self.classes)

    def compute(self) -> dict[str, Tensor]:
        scores = confusion_scores(self.counts.cpu().numpy(), self.has_background)
        return {k: torch.tensor(v) for k, v in scores.items()}


class CocoScores(Metric):
    """COCO's average precision family over all images seen.

    Attributes:
        ground_truth: Gives the COCO dictionary of the split; set it before `compute`.
    """

    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        self.ground_truth: Callable[[], dict[str, Any]] | None = None
        self.add_state("detections", [], dist_reduce_fx="cat", persistent=False)
        self.add_state("images", [], dist_reduce_fx="cat", persistent=False)

    def update(
        self, index: Tensor, boxes: Sequence[Tensor], scores: Sequence[Tensor], labels: Sequence[Tensor]
    ) -> None:
        """Add detections.

        Args:
            index: Image ids of the batch, int64 [B].
            boxes: Per image corners in pixels of the original image, [n, 4].
            scores: Per image, [n].
            labels: Per image class numbers, [n].
        """
        self.images.append(index.double())
        for i, own, score, label in zip(index, boxes, scores, labels, strict=True):
            rows = torch.cat(
                (
                    i.expand(len(own), 1).double(),
                    own.double(),
                    score[:, None].double(),
                    label[:, None].double(),
                ),
                1,
            )
            self.detections.append(rows)

    def compute(self) -> dict[str, Tensor]:
        from data.detection_eval import coco_scores

        if self.ground_truth is None:
            raise RuntimeError("CocoScores.ground_truth must be set before compute()")
        ids = sorted({int(i) for i in self.index().tolist()})
        scores = coco_scores(self.ground_truth(), self.rows().cpu().double().numpy(), ids)
        return {k: torch.tensor(v) for k, v in scores.items()}

    def index(self) -> Tensor:
        """Ids of the images seen."""
        if isinstance(self.images, Tensor):
            return self.images
        return torch.cat(self.images) if self.images else torch.zeros(0)

    def rows(self) -> Tensor:
        """Image id, corners, score and class of every detection, [n, 7]."""
        if isinstance(self.detections, Tensor):
            return self.detections
        return torch.cat(self.detections) if self.detections else torch.zeros(0, 7)
