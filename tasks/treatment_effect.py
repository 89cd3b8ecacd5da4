"""Treatment effects: fit seen outcomes, judge the unseen ones where a simulation knows them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection
from torchmetrics.utilities import dim_zero_cat

from data.ihdp import effect_scores
from tasks.base import Batch, ZooTask
from zoo.errors import ConfigError


class TreatmentEffectTask(ZooTask):
    """Mean squared error on the outcome of the treatment that each row got.

    The best checkpoint is chosen by seen outcomes: effects are unknown outside simulations.

    Args:
        propensity_weight: Weight of the adversarial propensity loss, >= 0; 0 leaves it out.
        common: See `tasks.base.ZooTask`.
    """

    monitor = "rmse"
    mode = "min"
    data_kind = "treatment"

    def __init__(self, model: nn.Module, data: Any, *, propensity_weight: float = 0.0, **common: Any) -> None:
        if propensity_weight < 0:
            raise ConfigError(f"task.propensity_weight={propensity_weight} must be at least 0")
        scale = data.preprocessing()
        self.outcome_mean, self.outcome_std = scale["outcome_mean"], scale["outcome_std"]
        super().__init__(model, data, **common)
        self.propensity_weight = propensity_weight

    @classmethod
    def model_arguments(cls, data: Any) -> dict[str, Any]:
        return {"num_covariates": data.num_covariates}

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        context = self.model.encode(batch["covariates"])
        terms = {"mse": F.mse_loss(self.model.outcome(context, batch["treatment"]), batch["outcome"])}
        if self.propensity_weight:
            logits = self.model.treatment_logits(context)
            terms["propensity"] = self.propensity_weight * F.cross_entropy(logits, batch["treatment"])
        return terms

    def outcomes(self, covariates: Tensor) -> Tensor:
        """Expected outcomes without and with treatment, own scale, float64 [B, 2]."""
        context = self.model.encode(covariates)
        both = [
            self.model.outcome(context, torch.full((len(covariates),), t, device=covariates.device))
            for t in (0, 1)
        ]
        return torch.stack(both, 1).double() * self.outcome_std + self.outcome_mean

    def make_metrics(self) -> MetricCollection:
        return MetricCollection({"effects": _Effects()})

    def update_metrics(self, batch: Batch, metrics: MetricCollection, split: str) -> None:
        seen = batch["outcome"].double() * self.outcome_std + self.outcome_mean
        metrics["effects"].update(
            self.outcomes(batch["covariates"]), batch["mu"].double(), batch["treatment"], seen
        )

    def compute_metrics(self, split: str) -> dict[str, float]:
        if split == "test":
            with self.metrics[split]["effects"].sync_context():  # of all processes
                self.test_arrays = self.metrics[split]["effects"].gathered()
        return super().compute_metrics(split)

    def example_inputs(self) -> tuple[tuple, dict]:
        return (torch.zeros(1, self.data.num_covariates), torch.zeros(1, dtype=torch.int64)), {}

    def figures(self, folder: Path) -> list[Path]:
        """True against predicted effects, and both distributions."""
        from matplotlib.figure import Figure

        folder.mkdir(parents=True, exist_ok=True)
        predicted, truth, _, _ = self.test_arrays
        effect, true_effect = predicted[:, 1] - predicted[:, 0], truth[:, 1] - truth[:, 0]
        figure = Figure(figsize=(9, 3.8), layout="constrained")
        scatter, histogram = figure.subplots(1, 2)
        ends = [min(effect.min(), true_effect.min()), max(effect.max(), true_effect.max())]
        scatter.plot(true_effect, effect, ".", ms=3)
        scatter.plot(ends, ends, "k:", lw=0.8)
        scatter.set(xlabel="true effect", ylabel="predicted effect", title="effect of each test row")
        histogram.hist([true_effect, effect], bins=40, label=["true", "predicted"])
        histogram.axvline(true_effect.mean(), color="C0", ls="--")
        histogram.axvline(effect.mean(), color="C1", ls="--")
        histogram.set(xlabel="effect", ylabel="rows", title="means dashed")
        histogram.legend()
        path = folder / "effects.png"
        figure.savefig(path, dpi=120)
        return [path]


class _Effects(Metric):
    """Keeps predicted and true outcomes of a split and scores the effects."""

    full_state_update = False
    _STATES = ("predicted", "truth", "treatment", "seen")

    def __init__(self) -> None:
        super().__init__()
        for name in self._STATES:
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def update(self, predicted: Tensor, truth: Tensor, treatment: Tensor, seen: Tensor) -> None:
        for name, value in zip(self._STATES, (predicted, truth, treatment, seen), strict=True):
            getattr(self, name).append(value.detach())

    def gathered(self) -> list[np.ndarray]:
        """Arrays of all rows seen."""
        return [dim_zero_cat(getattr(self, name)).cpu().numpy() for name in self._STATES]

    def compute(self) -> dict[str, Tensor]:
        return {k: torch.tensor(v) for k, v in effect_scores(*self.gathered()).items()}
