"""Associative recall: cross-entropy and accuracy at the places where a key is asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import MeanMetric, MetricCollection

from tasks.base import Batch, ZooTask, of_all_processes


class Recall(ZooTask):
    """Name the value that stood behind a key earlier in the sequence."""

    monitor = "accuracy"
    mode = "max"
    data_kind = "recall"
    headline = ("accuracy", "sequence_accuracy")

    def __init__(self, model: torch.nn.Module, data: Any, **common: Any) -> None:
        super().__init__(model, data, **common)
        self._tested: list[tuple[Tensor, Tensor]] = []  # distances and hits of each test batch

    @classmethod
    def model_arguments(cls, data: Any) -> dict[str, Any]:
        return {"vocabulary": data.vocabulary, "max_length": data.length}

    def make_metrics(self) -> MetricCollection:
        names = ("accuracy", "sequence_accuracy", "loss")
        return MetricCollection({name: MeanMetric() for name in names}, compute_groups=False)

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        asked = batch["targets"] >= 0
        return {"cross_entropy": F.cross_entropy(self.model(batch["tokens"], asked), batch["targets"][asked])}

    def update_metrics(self, batch: Batch, metrics: MetricCollection, split: str) -> None:
        targets = batch["targets"]
        asked = targets >= 0
        scores = self.model(batch["tokens"], asked)
        hit = scores.argmax(-1) == targets[asked]
        metrics["accuracy"].update(hit.float())
        metrics["loss"].update(F.cross_entropy(scores, targets[asked], reduction="none"))
        whole = torch.ones_like(asked)
        whole[asked] = hit
        metrics["sequence_accuracy"].update(whole.all(1).float())
        if split == "test":
            place = torch.arange(targets.shape[1], device=targets.device).expand_as(targets)
            match = batch["tokens"][:, None, : 2 * self.data.pairs : 2] == batch["tokens"][..., None]
            first = 2 * match.float().argmax(-1)
            self._tested.append(((place - first)[asked].cpu(), hit.float().cpu()))

    def example_inputs(self) -> tuple[tuple, dict]:
        return (torch.zeros(1, self.data.length, dtype=torch.long),), {}

    def state_size(self) -> int:
        """Numbers kept after a whole sequence, over all layers."""
        return sum(block.attn.state_size(self.data.length) for block in self.model.blocks)

    def gather(self) -> None:
        self._tested = of_all_processes(self._tested)

    def figures(self, folder: Path) -> list[Path]:
        """Accuracy by distance between a key's two places."""
        from matplotlib.figure import Figure

        if not self._tested:
            return []
        folder.mkdir(parents=True, exist_ok=True)
        distance, hit = (torch.cat(column) for column in zip(*self._tested, strict=True))
        edges = torch.linspace(float(distance.min()), float(distance.max()) + 1, 13)
        place = torch.bucketize(distance.float(), edges, right=True) - 1
        count = torch.bincount(place, minlength=12)[:12]
        mean = torch.bincount(place, weights=hit, minlength=12)[:12] / count.clamp(min=1)
        full = count > 0
        figure = Figure(figsize=(5.5, 3.4), layout="constrained")
        axes = figure.subplots()
        centres = (edges[:-1] + edges[1:]) / 2
        axes.plot(centres[full].numpy(), mean[full].numpy(), "o-")
        axes.axhline(1 / self.data.pairs, color="grey", ls=":", label="a value of the sequence, guessed")
        axes.set(
            xlabel="tokens between a key and its query",
            ylabel="accuracy",
            ylim=(0, 1.02),
            title="Recall by distance, test split",
        )
        axes.legend()
        path = folder / "recall_by_distance.png"
        figure.savefig(path, dpi=130)
        return [path]
