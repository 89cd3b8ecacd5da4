"""Image classification: cross-entropy with label smoothing or soft targets; accuracy, calibration and loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassCalibrationError,
    MulticlassConfusionMatrix,
)

from tasks.base import Batch, ZooTask, of_all_processes
from zoo.errors import ConfigError


class Classification(ZooTask):
    """One label per image.

    Args:
        label_smoothing: Share of the target spread over all classes, [0, 1); soft targets (mixup) are smoothed too.
    """

    monitor = "accuracy"
    mode = "max"
    data_kind = "images"

    def __init__(self, model: nn.Module, data: Any, *, label_smoothing: float = 0.1, **common: Any) -> None:
        if not 0 <= label_smoothing < 1:
            raise ConfigError(f"task.label_smoothing={label_smoothing} is outside [0, 1)")
        self.classes = data.num_classes
        super().__init__(model, data, **common)
        self.label_smoothing = label_smoothing
        self.confusion = MulticlassConfusionMatrix(self.classes)
        self._counts: Tensor | None = None  # [true, predicted] classes of the test set, once gathered
        self._wrong: list[tuple[float, Tensor, int, int]] = []

    @classmethod
    def model_arguments(cls, data: Any) -> dict[str, Any]:
        return {
            "image_size": data.image_size,
            "in_channels": data.in_channels,
            "num_classes": data.num_classes,
        }

    def make_metrics(self) -> MetricCollection:
        # Keyword-filtered: the loss takes `value`, the others predictions and targets.
        top5 = {"accuracy_top5": _accuracy(self.classes, 5)} if self.classes > 5 else {}
        return MetricCollection(
            {
                "accuracy": _accuracy(self.classes),
                **top5,
                "calibration_error": MulticlassCalibrationError(self.classes, n_bins=15),
                "loss": MeanMetric(),
            },
            compute_groups=False,
        )

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        target = batch.get("target", batch["label"])
        loss = F.cross_entropy(self.model(batch["image"]), target, label_smoothing=self.label_smoothing)
        return {"cross_entropy": loss}

    def update_metrics(self, batch: Batch, metrics: MetricCollection, split: str) -> None:
        logits = self.model(batch["image"])
        label = batch["label"]
        loss = F.cross_entropy(logits, label, reduction="none")
        metrics.update(preds=logits.softmax(-1), target=label, value=loss)
        if split == "test":
            self.confusion.update(logits.argmax(-1), label)
            self._keep_wrong(batch["image"], logits, label)

    def _keep_wrong(self, images: Tensor, logits: Tensor, labels: Tensor) -> None:
        confidence, predicted = logits.softmax(-1).max(-1)
        for i in (predicted != labels).nonzero().flatten().tolist():
            self._wrong.append((float(confidence[i]), images[i].cpu(), int(labels[i]), int(predicted[i])))
        self._wrong = _surest(self._wrong)

    def example_inputs(self) -> tuple[tuple, dict]:
        height, width = self.data.image_size
        return (torch.zeros(1, self.data.in_channels, height, width),), {}

    def gather(self) -> None:
        self._counts = self.confusion.compute()
        self._wrong = _surest(of_all_processes(self._wrong))

    def figures(self, folder: Path) -> list[Path]:
        """Confusion matrix and the wrong answers given with most confidence."""
        from matplotlib.figure import Figure

        folder.mkdir(parents=True, exist_ok=True)
        names = self.data.labels
        counts = self._counts.cpu().numpy()
        figure = Figure(figsize=(6, 5), layout="constrained")
        axes = figure.subplots()
        image = axes.imshow(counts / counts.sum(1, keepdims=True).clip(1), cmap="Blues", vmin=0, vmax=1)
        figure.colorbar(image, label="share of the true class")
        axes.set(xlabel="predicted", ylabel="true", title="Confusion matrix, test split")
        if len(names) <= 20:
            axes.set_xticks(range(len(names)), names, rotation=90 if max(map(len, names)) > 2 else 0)
            axes.set_yticks(range(len(names)), names)
            for (i, j), count in ((ij, counts[ij]) for ij in zip(*counts.nonzero(), strict=True)):
                dark = count / max(1, counts[i].sum()) > 0.5
                axes.text(j, i, str(count), ha="center", va="center", color="w" if dark else "k", fontsize=7)
        written = [folder / "confusion_matrix.png"]
        figure.savefig(written[0], dpi=130)

        if self._wrong:
            figure = Figure(figsize=(8, 8.4), layout="constrained")
            figure.suptitle("Misclassified test images, most confident first: true → predicted (confidence)")
            for axes, (confidence, picture, label, predicted) in zip(
                figure.subplots(5, 5).flat, self._wrong, strict=False
            ):
                pixels = picture - picture.min()
                pixels = (pixels / pixels.max().clamp(min=1e-6)).permute(1, 2, 0).squeeze(-1)
                axes.imshow(pixels.numpy(), cmap="gray")
                axes.set_title(f"{names[label]} → {names[predicted]} ({confidence:.2f})", fontsize=8)
            for axes in figure.axes:
                axes.axis("off")
            written.append(folder / "misclassified.png")
            figure.savefig(written[1], dpi=130)
        return written


def _surest(wrong: list[tuple[float, Tensor, int, int]]) -> list[tuple[float, Tensor, int, int]]:
    """The wrong answers given with most confidence."""
    return sorted(wrong, key=lambda w: -w[0])[:25]


def _accuracy(classes: int, top_k: int = 1) -> MulticlassAccuracy:
    return MulticlassAccuracy(classes, top_k=top_k, average="micro")
