"""Tables: classes, values or several of them at once; scores on the targets' own scale."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection
from torchmetrics.utilities import dim_zero_cat

from data.sampler import BatchKey
from tasks.base import Batch, ZooTask
from zoo.errors import ConfigError
from zoo.tabular.outputs import readings, split_outputs
from zoo.tabular.schema import Target
from zoo.tabular.scores import MAIN, interval, score_target


class _TabularTask(ZooTask):
    """What tabular tasks share.

    Args:
        label_smoothing: Share of a class target spread over the classes, [0, 1).
        class_weight: "none", or "balanced": classes count alike in the loss however many rows they have.
        importance_rows: Test rows used for permutation importance; 0 leaves it out.
    """

    data_kind = "tabular"

    def __init__(
        self,
        model: nn.Module,
        data: Any,
        *,
        label_smoothing: float = 0.0,
        class_weight: str = "none",
        importance_rows: int = 1000,
        **common: Any,
    ) -> None:
        if not 0 <= label_smoothing < 1:
            raise ConfigError(f"task.label_smoothing={label_smoothing} is outside [0, 1)")
        if class_weight not in ("none", "balanced"):
            raise ConfigError(f"task.class_weight={class_weight!r}: choose none or balanced")
        if importance_rows < 0:
            raise ConfigError(f"task.importance_rows={importance_rows} must be at least 0")
        self.targets: list[Target] = data.targets
        super().__init__(model, data, **common)
        self.label_smoothing, self.importance_rows = label_smoothing, importance_rows
        for i, target in enumerate(self.targets):
            weights = None
            if class_weight == "balanced" and target.kind != "regression":
                counts = torch.tensor(target.counts, dtype=torch.float32)
                weights = counts.sum() / (len(counts) * counts.clamp(min=1))
            self.register_buffer(f"class_weights_{i}", weights, persistent=False)
        if hasattr(model, "set_bank"):  # training rows that predictions look at; the split's order is random
            train = data.dataset("train")
            rows = train[BatchKey(np.arange(min(model.bank_size, len(train))), -1, 0)]
            model.set_bank(rows["numerical"], rows["categorical"], rows.get("missing"), rows["target"])

    @classmethod
    def model_arguments(cls, data: Any) -> dict[str, Any]:
        return data.model_arguments()

    # ---------------------------------------------------------------- loss and prediction

    def logits(self, batch: Batch) -> Tensor:
        """[B, S], or [B, k, S] of a model with k members; S = all targets' outputs."""
        own = {"own": batch["index"]} if self.training and getattr(self.model, "hides_own", False) else {}
        return self.model(batch["numerical"], batch["categorical"], batch.get("missing"), **own)

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        out = self.logits(batch)
        names = [t.name if len(self.targets) > 1 else _LOSS[t.kind] for t in self.targets]
        parts = split_outputs(out, self.targets)
        return {
            name: self.target_loss(i, part, batch["target"][:, i]) / len(self.targets)
            for i, (name, part) in enumerate(zip(names, parts, strict=True))
        }

    def target_loss(self, i: int, out: Tensor, truth: Tensor) -> Tensor:
        """Mean loss of target i; the mean over members of a model that has some (not the loss of their mean)."""
        target, weights = self.targets[i], getattr(self, f"class_weights_{i}")
        if out.dim() == 3:
            truth = truth[:, None].expand(out.shape[:2])
        if target.kind == "regression":
            return F.mse_loss(out[..., 0], truth)
        if target.kind == "binary":
            soft = truth * (1 - self.label_smoothing) + 0.5 * self.label_smoothing
            weight = None if weights is None else weights[truth.long()]
            return F.binary_cross_entropy_with_logits(out[..., 0], soft, weight=weight)
        return F.cross_entropy(
            out.flatten(0, -2), truth.flatten().long(), weight=weights, label_smoothing=self.label_smoothing
        )

    def predictions(self, batch: Batch) -> list[Tensor]:
        """Per target: probability of the second class [B], class probabilities [B, K], or values [B]; float64."""
        return readings(self.logits(batch), self.targets)

    # ---------------------------------------------------------------- metrics

    def make_metrics(self) -> MetricCollection:
        return MetricCollection({"scores": _Scores(self.targets)})

    def update_metrics(self, batch: Batch, metrics: MetricCollection, split: str) -> None:
        found = self.predictions(batch)
        truth = [original(batch["target"][:, i], t) for i, t in enumerate(self.targets)]
        metrics["scores"].update(found, truth)

    def compute_metrics(self, split: str) -> dict[str, float]:
        scores = self.metrics[split]["scores"]
        values = {k: float(v) for k, v in scores.compute().items()}
        if split == "test":
            with scores.sync_context():  # of all processes
                self.test_predictions, self.test_truth = scores.gathered()
            for target, p, y in zip(self.targets, self.test_predictions, self.test_truth, strict=True):
                name = MAIN[target.kind][0] + suffix(target, self.targets)
                values[f"{name}_low"], values[f"{name}_high"] = interval(target.kind, p, y)
        return values

    # ---------------------------------------------------------------- what users look at

    def example_inputs(self) -> tuple[tuple, dict]:
        p = self.data.preprocessor
        numerical = torch.zeros(1, len(p.schema.numerical))
        return (numerical, torch.zeros(1, len(p.cardinalities), dtype=torch.int64)), {}

    def figures(self, folder: Path) -> list[Path]:
        """Per target: ROC, precision-recall and calibration, or predicted against true; then importance."""
        from tasks.tabular_figures import importance_figure, target_figure

        folder.mkdir(parents=True, exist_ok=True)
        written = [
            target_figure(folder, t, p, y)
            for t, p, y in zip(self.targets, self.test_predictions, self.test_truth, strict=True)
        ]
        if self.importance_rows and not self.trainer.fast_dev_run:
            written.append(importance_figure(folder, self))
        return written


class TabularTask(_TabularTask):
    """One or several targets from the columns of a table, one model.

    Args:
        common: See the base class and `tasks.base.ZooTask`.
    """

    def __init__(self, model: nn.Module, data: Any, **common: Any) -> None:
        super().__init__(model, data, **common)
        first = self.targets[0]
        self.monitor, self.mode = MAIN[first.kind]
        self.monitor += suffix(first, self.targets)


_LOSS = {"binary": "cross_entropy", "multiclass": "cross_entropy", "regression": "mse"}


def suffix(target: Target, targets: list[Target]) -> str:
    """End of a metric's name where there are several targets."""
    return f"_{target.name}" if len(targets) > 1 else ""


def brief(target: Target, scores: dict[str, float]) -> list[tuple[str, float]]:
    """The two scores of a target that are shown where there are several targets."""
    names = {"binary": ("auc", "accuracy"), "multiclass": ("accuracy", "auc"), "regression": ("rmse", "r2")}
    return [(n, scores[n]) for n in names[target.kind]]


def original(truth: Tensor, target: Target) -> Tensor:
    """Batch targets on their own scale, float64."""
    truth = truth.double()
    return truth * target.std + target.mean if target.kind == "regression" else truth


class _Scores(Metric):
    """Keeps every prediction of a split and scores them together, each target by its own kind."""

    full_state_update = False

    def __init__(self, targets: list[Target]) -> None:
        super().__init__()
        self.targets = targets
        for i in range(len(targets)):
            self.add_state(f"prediction_{i}", default=[], dist_reduce_fx="cat")
            self.add_state(f"truth_{i}", default=[], dist_reduce_fx="cat")

    def update(self, predictions: list[Tensor], truth: list[Tensor]) -> None:
        for i, (p, y) in enumerate(zip(predictions, truth, strict=True)):
            getattr(self, f"prediction_{i}").append(p.detach())
            getattr(self, f"truth_{i}").append(y.detach())

    def gathered(self) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Predictions and truth of each target, in the order seen."""
        both = [
            [dim_zero_cat(getattr(self, f"{kind}_{i}")).cpu().numpy() for i in range(len(self.targets))]
            for kind in ("prediction", "truth")
        ]
        return both[0], both[1]

    def compute(self) -> dict[str, Tensor]:
        found = {}
        for target, p, y in zip(self.targets, *self.gathered(), strict=True):
            scores = score_target(target.kind, p, y)
            for name, value in scores.items() if len(self.targets) == 1 else brief(target, scores):
                found[name + suffix(target, self.targets)] = torch.tensor(value, dtype=torch.float64)
        return found
