"""Semantic segmentation: cross-entropy and Dice; data-set level mIoU, Dice and a table per class."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MetricCollection

from data.detection_base import VOID, confusion_scores
from tasks._mask_matching import MaskWeights, mask_set_losses
from tasks._vision_metrics import SegmentationScores
from tasks.base import Batch, ZooTask, full_precision
from zoo.errors import ConfigError, unknown
from zoo.layers.backbones import load_pretrained_backbone
from zoo.layers.seg_heads import resize
from zoo.layers.windows import sliding_window

MASK_LOSSES = ("pixel", "matched")


class Segmentation(ZooTask):
    """One class per pixel.

    Args:
        dice_weight: Factor on the Dice loss beside the cross-entropy, >= 0; "pixel" only.
        label_smoothing: Share of the target spread over all classes, [0, 1); "pixel" only.
        mask_loss: "pixel": cross-entropy and Dice on every pixel's classes; "matched": queries are matched to the
            classes of each image (heads with queries).
        mask_points: Points of a mask that the matched loss looks at.
        window: Side of overlapping windows in which images are read in validation and test; None for whole images.
        pretrained_backbone: Start from timm's published weights of `model.backbone`.
    """

    mode = "max"
    data_kind = "scenes"

    def __init__(
        self,
        model: nn.Module,
        data: Any,
        *,
        dice_weight: float = 1.0,
        label_smoothing: float = 0.0,
        mask_loss: str = "pixel",
        mask_points: int = 1024,
        window: int | None = None,
        pretrained_backbone: bool = False,
        **common: Any,
    ) -> None:
        if mask_loss not in MASK_LOSSES:
            raise unknown("task.mask_loss", mask_loss, MASK_LOSSES)
        if mask_loss == "matched" and not getattr(model, "prefix", 0):
            raise ConfigError("task.mask_loss=matched needs a head with queries: model.head=eomt")
        if mask_loss == "matched" and label_smoothing:
            raise ConfigError(
                f"task.label_smoothing={label_smoothing} belongs to task.mask_loss=pixel, not matched"
            )
        for key, value in (("mask_points", mask_points), ("window", window)):
            if value is not None and value < 1:
                raise ConfigError(f"task.{key}={value} must be at least 1")
        if dice_weight < 0:
            raise ConfigError(f"task.dice_weight={dice_weight} must not be negative")
        if not 0 <= label_smoothing < 1:
            raise ConfigError(f"task.label_smoothing={label_smoothing} is outside [0, 1)")
        data.require("masks", "segmentation")
        self.classes, self.has_background = len(data.mask_labels), data.has_background
        if pretrained_backbone:
            load_pretrained_backbone(model)
        super().__init__(model, data, **common)
        self.dice_weight, self.label_smoothing = dice_weight, label_smoothing
        self.mask_loss, self.mask_points = mask_loss, mask_points
        self.window = window
        self.monitor = "miou_foreground" if self.has_background else "miou"
        self.headline = [
            k for k in ("miou_foreground", "miou", "dice", "accuracy") if self.has_background or "_" not in k
        ]
        self._counts: Tensor | None = None
        self._examples: list[tuple[Tensor, Tensor, Tensor]] = []

    @classmethod
    def model_arguments(cls, data: Any) -> dict[str, Any]:
        return {
            "image_size": data.image_size,
            "in_channels": data.in_channels,
            "num_classes": len(data.mask_labels),
        }

    def make_metrics(self) -> MetricCollection:
        return MetricCollection(
            {
                "scores": SegmentationScores(
                    self.classes, has_background=self.has_background, ignore_index=VOID
                )
            }
        )

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        if getattr(self.model, "masked_queries", False):
            self.model.anneal(self.progress())
        if self.mask_loss == "matched":
            logits, masks = self.model.query_predictions(batch["image"])
            return mask_set_losses(logits, masks, batch["mask"], MaskWeights(), points=self.mask_points)
        return segmentation_losses(
            self.model(batch["image"]),
            batch["mask"],
            dice_weight=self.dice_weight,
            label_smoothing=self.label_smoothing,
        )

    def update_metrics(self, batch: Batch, metrics: MetricCollection, split: str) -> None:
        if self.window:
            scores = sliding_window(self.model, batch["image"], (self.window, self.window))
        else:
            scores = self.model(batch["image"])
        predicted = scores.argmax(1)
        if "original_mask" in batch:
            # As results are published: every pixel of the file counts, at its own resolution.
            for one, size, truth in zip(scores, batch["size"].tolist(), batch["original_mask"], strict=True):
                shown = one[None, :, : size[0], : size[1]]
                metrics.update(resize(shown, truth.shape).argmax(1)[0], truth.long())
        else:
            metrics.update(predicted, batch["mask"])
        if split == "test":
            room = 8 - len(self._examples)
            for i in range(min(room, len(predicted))):
                self._examples.append(
                    (batch["image"][i].cpu(), batch["mask"][i].cpu(), predicted[i].to(torch.int16).cpu())
                )

    def compute_metrics(self, split: str) -> dict[str, float]:
        values = super().compute_metrics(split)
        if split == "test":
            scores = self.metrics[split]["scores"]
            with scores.sync_context():  # of all processes
                self._counts = scores.counts.clone()
        return values

    def example_inputs(self) -> tuple[tuple, dict]:
        height, width = self.data.image_size
        return (torch.zeros(1, self.data.in_channels, height, width),), {}

    def card(self) -> dict[str, Any]:
        return {"labels": self.data.mask_labels}

    def figures(self, folder: Path) -> list[Path]:
        """Predictions beside truth, and the scores of each class as a table."""
        from tasks._vision_figures import draw_masks

        folder.mkdir(parents=True, exist_ok=True)
        written = [folder / "masks.png"]
        draw_masks(written[0], self._examples, self.data)
        if self._counts is not None:
            written.append(folder / "classes.csv")
            self._write_classes(written[-1])
        return written

    def _write_classes(self, path: Path) -> None:
        counts = self._counts.cpu().numpy()
        scores = confusion_scores(counts, self.has_background, self.data.mask_labels)
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["class", "iou", "precision", "recall", "pixels"])
            for i, name in enumerate(self.data.mask_labels):
                hit, true, found = counts[i, i], counts[i].sum(), counts[:, i].sum()
                row = (scores[f"iou_{name}"], hit / found if found else 0.0, hit / true if true else 0.0)
                writer.writerow([name, *(f"{v:.4f}" for v in row), int(true)])


def segmentation_losses(
    logits: Tensor, target: Tensor, *, dice_weight: float = 1.0, label_smoothing: float = 0.0
) -> dict[str, Tensor]:
    """Cross-entropy over the pixels that count, and soft Dice over the classes that occur.

    Args:
        logits: [B, K, H, W].
        target: int64 [B, H, W]; VOID (255) pixels carry no loss and no gradient.
        dice_weight: Factor on the Dice term; 0 leaves it out.
        label_smoothing: As in the cross-entropy.

    Returns:
        Terms `cross_entropy` and `dice`; zero when every pixel is void.
    """
    keep = target != VOID
    count = keep.sum().clamp(min=1)
    log_share = full_precision(logits).log_softmax(1)
    total = F.nll_loss(log_share, target, ignore_index=VOID, reduction="sum")
    if label_smoothing:
        even = -(log_share.mean(1) * keep).sum()
        total = (1 - label_smoothing) * total + label_smoothing * even
    terms = {"cross_entropy": total / count}
    if dice_weight:
        k, dtype = logits.shape[1], log_share.dtype
        probability = log_share.exp() * keep[:, None]
        truth = target.masked_fill(~keep, 0)[:, None]
        inside = probability.gather(1, truth)[:, 0]  # [B, H, W]: share given to the true class
        flat = truth.flatten()
        hit = torch.zeros(k, device=logits.device, dtype=dtype).index_add(0, flat, inside.flatten())
        true = torch.bincount(flat, weights=keep.flatten().to(dtype), minlength=k).to(dtype)
        score = 2 * hit / (probability.sum((0, 2, 3)) + true).clamp(min=1e-6)
        present = true > 0
        dice = ((1 - score) * present).sum() / present.sum().clamp(min=1)
        terms["dice"] = dice_weight * dice
    return terms
