"""Object detection with sets of queries: Hungarian matching, set losses on every decoder layer, COCO AP."""

from __future__ import annotations

import csv
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchmetrics import MetricCollection

from tasks._detection_losses import decode, detection_losses, relative_boxes
from tasks._matching import Weights
from tasks._vision_metrics import CocoScores
from tasks.base import Batch, ZooTask
from zoo.errors import ConfigError, unknown
from zoo.layers.backbones import load_pretrained_backbone
from zoo.layers.boxes import to_xyxy

CLASS_LOSSES = ("focal", "mal")


class Detection(ZooTask):
    """Boxes with classes.

    Args:
        class_loss: focal, or mal (scores aim at the box's IoU). Models with a no-object class use cross-entropy.
        class_weight: Factor of the class term in cost and loss.
        l1_weight: Factor of the L1 term on normalised boxes.
        delta_weight: The same where boxes are changes relative to references.
        giou_weight: Factor of the generalised IoU term.
        many_repeat: Queries per object in one-to-many matching.
        many_weight: Factor on the losses of the one-to-many group.
        no_object_weight: Weight of the no-object class in cross-entropy.
        max_detections: Highest-scoring pairs of query and class kept per image.
        pretrained_backbone: Start from timm's published weights of `model.backbone`.
    """

    monitor = "ap"
    mode = "max"
    data_kind = "scenes"
    headline = ("ap", "ap50", "ap75", "ap_agnostic", "ap50_agnostic")

    def __init__(
        self,
        model: nn.Module,
        data: Any,
        *,
        class_loss: str = "focal",
        class_weight: float = 2.0,
        l1_weight: float = 5.0,
        delta_weight: float = 1.0,
        giou_weight: float = 2.0,
        many_repeat: int = 6,
        many_weight: float = 1.0,
        no_object_weight: float = 0.1,
        max_detections: int = 100,
        pretrained_backbone: bool = False,
        **common: Any,
    ) -> None:
        if class_loss not in CLASS_LOSSES:
            raise unknown("task.class_loss", class_loss, CLASS_LOSSES)
        for key, value in (
            ("class_weight", class_weight),
            ("l1_weight", l1_weight),
            ("delta_weight", delta_weight),
            ("giou_weight", giou_weight),
            ("many_weight", many_weight),
            ("no_object_weight", no_object_weight),
        ):
            if value < 0:
                raise ConfigError(f"task.{key}={value} must not be negative")
        for key, count in (("many_repeat", many_repeat), ("max_detections", max_detections)):
            if count < 1:
                raise ConfigError(f"task.{key}={count} must be at least 1")
        data.require("boxes", "detr")
        self.__dict__["_truth_of"] = data.ground_truth
        if pretrained_backbone:
            load_pretrained_backbone(model)
        super().__init__(model, data, **common)
        self.softmax = bool(getattr(model, "softmax_classes", False))
        self.delta = getattr(model, "box_form", "sigmoid") == "delta"
        self.class_loss = "softmax" if self.softmax else class_loss
        self.weights = Weights(class_weight, delta_weight if self.delta else l1_weight, giou_weight)
        self.many_repeat, self.many_weight = many_repeat, many_weight
        self.no_object, self.max_detections = no_object_weight, max_detections
        self._examples: list[dict[str, Any]] = []
        self._tested: tuple[np.ndarray, np.ndarray] | None = None  # detections, numbers of the images
        self._original: dict[tuple[str, int], tuple[int, int]] = {}

    @classmethod
    def model_arguments(cls, data: Any) -> dict[str, Any]:
        return {
            "image_size": data.image_size,
            "in_channels": data.in_channels,
            "num_classes": data.num_classes,
            "padded": data.padded,
        }

    def make_metrics(self) -> MetricCollection:
        return MetricCollection({"coco": CocoScores()}, compute_groups=False)

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        size = batch["size"]
        out = self.model(batch["image"], size)
        return detection_losses(
            out,
            batch["labels"],
            relative_boxes(batch["boxes"], size),
            self.weights,
            kind=self.class_loss,
            delta=self.delta,
            many_repeat=self.many_repeat,
            many_weight=self.many_weight,
            no_object=self.no_object,
            names=batch["index"].tolist(),
        )

    def update_metrics(self, batch: Batch, metrics: MetricCollection, split: str) -> None:
        name = {"valid": "val", "test": "test"}[split]
        out = self.model(batch["image"], batch["size"])
        sizes = [self._size(name, i) for i in batch["index"].tolist()]
        found = decode(
            out["logits"][-1],
            out["boxes"][-1],
            torch.tensor(sizes, device=batch["image"].device),
            limit=self.max_detections,
            softmax=self.softmax,
        )
        coco = metrics["coco"]
        coco.ground_truth = partial(self._truth_of, name)
        coco.update(batch["index"], *zip(*found, strict=True))
        if split == "test":
            self._keep_examples(batch, out)

    def compute_metrics(self, split: str) -> dict[str, float]:
        values = super().compute_metrics(split)
        if split == "test":
            coco = self.metrics[split]["coco"]
            with coco.sync_context():  # of all processes
                self._tested = tuple(t.cpu().double().numpy() for t in (coco.rows(), coco.index()))
        return values

    def _size(self, split: str, index: int) -> tuple[int, int]:
        key = (split, index)
        if key not in self._original:
            self._original[key] = tuple(self.data.original_size(split, index))
        return self._original[key]

    def _keep_examples(self, batch: Batch, out: dict[str, Tensor]) -> None:
        room = 12 - len(self._examples)
        if room <= 0:
            return
        own = decode(out["logits"][-1], out["boxes"][-1], batch["size"], limit=30, softmax=self.softmax)
        for i in range(min(room, len(own))):
            real = batch["labels"][i] >= 0
            boxes, scores, labels = own[i]
            self._examples.append(
                {
                    "image": batch["image"][i].cpu(),
                    "size": batch["size"][i].cpu(),
                    "truth": batch["boxes"][i][real].cpu(),
                    "boxes": boxes.cpu(),
                    "scores": scores.cpu(),
                    "labels": labels.cpu(),
                }
            )

    def example_inputs(self) -> tuple[tuple, dict]:
        height, width = self.data.image_size
        return (torch.zeros(1, self.data.in_channels, height, width),), {}

    def card(self) -> dict[str, Any]:
        return {"box_form": "corners in pixels of the original image", "max_detections": self.max_detections}

    def figures(self, folder: Path) -> list[Path]:
        """Boxes beside truth, attention of queries, and AP per class as a table."""
        from data.detection_eval import per_class_ap
        from tasks._vision_figures import draw_boxes, draw_query_maps

        folder.mkdir(parents=True, exist_ok=True)
        written = [folder / "boxes.png"]
        draw_boxes(written[0], self._examples, self.data)
        if self._examples and (maps := self._query_maps(self._examples[0])) is not None:
            written.append(folder / "query_attention.png")
            draw_query_maps(written[-1], self._examples[0]["image"], *maps, self.data)
        if self._tested is not None:
            written.append(folder / "classes.csv")
            scores = per_class_ap(self._truth_of("test"), *self._tested)
            with written[-1].open("w", newline="", encoding="utf-8") as file:
                writer = csv.writer(file)
                writer.writerow(["class", "ap"])
                writer.writerows([name, f"{ap:.4f}"] for name, ap in scores.items())
        return written

    @torch.no_grad()
    def _query_maps(self, example: dict[str, Any]) -> tuple | None:
        """Cross-attention maps of the best queries in the last layer, where the variant has such a map."""
        decoder = getattr(self.model, "decoder", None)
        if decoder is None or not decoder[-1].cross.capabilities.has_map:
            return None
        seen: dict[str, Any] = {}

        def keep(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            seen.update(args=args, kwargs=kwargs)

        handle = decoder[-1].cross.register_forward_pre_hook(keep, with_kwargs=True)
        training = self.model.training
        try:
            self.model.eval()
            out = self.model(example["image"][None].to(self.device), example["size"][None].to(self.device))
        finally:
            handle.remove()
            self.model.train(training)
        weights = decoder[-1].cross.attention_map(*seen["args"], **seen["kwargs"]).mean(1)[0].cpu()
        logits, boxes = out["logits"][-1, 0].cpu(), out["boxes"][-1, 0].cpu()
        scores = logits.softmax(-1)[:, :-1] if self.softmax else logits.sigmoid()
        score, label = scores.max(-1)
        best = score.argsort(descending=True)[: max(1, min(5, int((score > 0.3).sum())))]
        h, w = example["size"].tolist()
        corners = to_xyxy(boxes[best]) * torch.tensor([w, h, w, h])
        titles = [f"{self.data.labels[int(label[k])]} {float(score[k]):.2f}" for k in best]
        return weights[best], tuple(seen["kwargs"]["grid"].shape), corners, titles
