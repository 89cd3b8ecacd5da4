"""Learning an operator between functions, tested at the training resolution and at finer ones never trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric, MetricCollection

from data.operator1d import NODES
from tasks.base import Batch, ZooTask, full_precision


def relative_l2(found: Tensor, true: Tensor) -> Tensor:
    """Relative L2 error of each function, [B]."""
    return (found - true).norm(dim=-1) / true.norm(dim=-1).clamp_min(1e-12)


class OperatorTask(ZooTask):
    """Operator learning with the mean relative L2 error as loss; arguments as in `ZooTask`."""

    monitor = "rel_l2"
    mode = "min"
    data_kind = "operator"

    def __init__(self, model: nn.Module, data: Any, **common: Any) -> None:
        self.__dict__["_resolutions"] = (data.nodes, *data.refine)
        super().__init__(model, data, **common)
        self._kept: tuple[Tensor, Tensor, Tensor] | None = None

    def apply_at(self, nodes: int, batch: Batch) -> tuple[Tensor, Tensor]:
        """Prediction and truth at a resolution, [B, nodes] each."""
        every = NODES // nodes
        u0, u1 = batch["u0"][:, ::every], batch["u1"][:, ::every]
        x = torch.arange(nodes, device=u0.device, dtype=u0.dtype) / nodes
        return full_precision(self.model(u0, x)), u1

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        return {"rel_l2": relative_l2(*self.apply_at(self._resolutions[0], batch)).mean()}

    def make_metrics(self) -> MetricCollection:
        first, *finer = self._resolutions
        return MetricCollection(
            {"rel_l2": MeanMetric(), **{f"rel_l2_{n}": MeanMetric() for n in (first, *finer)}}
        )

    def update_metrics(self, batch: Batch, metrics: MetricCollection, split: str) -> None:
        for n in self._resolutions if split == "test" else self._resolutions[:1]:
            found, true = self.apply_at(n, batch)
            error = relative_l2(found, true)
            metrics[f"rel_l2_{n}"].update(error)
            if n == self._resolutions[0]:
                metrics["rel_l2"].update(error)
            if split == "test":
                self._kept = (batch["u0"], found, true)

    def compute_metrics(self, split: str) -> dict[str, float]:
        wanted = ["rel_l2", *(f"rel_l2_{n}" for n in self._resolutions)] if split == "test" else ["rel_l2"]
        return {k: float(self.metrics[split][k].compute()) for k in wanted}

    def figures(self, folder: Path) -> list[Path]:
        """Some test functions: input, truth, prediction at the finest resolution."""
        if self._kept is None:
            return []
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        folder.mkdir(parents=True, exist_ok=True)
        start, found, true = (t.detach().cpu() for t in self._kept)
        figure, axes = plt.subplots(1, 4, figsize=(14, 3), layout="constrained")
        for n, axis in enumerate(axes[: len(found)]):
            axis.plot(torch.arange(NODES) / NODES, start[n], ":", label="input")
            place = torch.arange(found.shape[1]) / found.shape[1]
            axis.plot(place, true[n], label="truth")
            axis.plot(place, found[n], "--", label="prediction")
        axes[0].legend(fontsize=7)
        figure.savefig(folder / "functions.png", dpi=110)
        plt.close(figure)
        return [folder / "functions.png"]

    def example_inputs(self) -> tuple[tuple, dict]:
        n = self._resolutions[0]
        return (torch.zeros(1, n, device=self.device), torch.arange(n, device=self.device) / n), {}
