"""Several targets of one table at once, with the gain over predicting each alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tasks.tabular import _TabularTask, suffix
from zoo.errors import ConfigError
from zoo.tabular.schema import Target
from zoo.tabular.scores import MAIN

REFERENCE = "single_task_mlp"


class TabularMultitaskTask(_TabularTask):
    """Sum of the targets' losses; chosen by the mean of AUC and R² over targets.

    Args:
        target_weights: Weight of each target's loss; equal when left out.
        common: See the base class and `tasks.base.ZooTask`.
    """

    monitor = "score_mean"
    mode = "max"

    def __init__(
        self, model: nn.Module, data: Any, *, target_weights: list[float] | None = None, **common: Any
    ) -> None:
        super().__init__(model, data, **common)
        if target_weights is not None and (
            len(target_weights) != len(self.targets) or min(target_weights) < 0
        ):
            raise ConfigError(
                f"task.target_weights={target_weights} must be {len(self.targets)} numbers >= 0, one per target: "
                f"{', '.join(t.name for t in self.targets)}"
            )
        self.target_weights = list(target_weights or [1.0] * len(self.targets))

    def losses(self, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        terms = super().losses(batch)
        return {name: w * term for w, (name, term) in zip(self.target_weights, terms.items(), strict=True)}

    def compute_metrics(self, split: str) -> dict[str, float]:
        values = super().compute_metrics(split)
        parts = [
            values[("r2" if t.kind == "regression" else "auc") + suffix(t, self.targets)]
            for t in self.targets
        ]
        values = {"score_mean": sum(parts) / len(parts), **values}
        if split == "test" and not self.trainer.fast_dev_run:
            reference = self.data.baselines().get(REFERENCE)
            if reference:
                values["gain_percent"] = multitask_gain(self.targets, values, reference)
        return values


def multitask_gain(targets: list[Target], ours: dict[str, float], single: dict[str, float]) -> float:
    """Mean relative improvement of the main scores over single-task models, percent; positive is better.

    Source: Maninis et al., "Attentive single-tasking of multiple tasks", arXiv:1904.08918, eq. for the average drop.
    """
    gains = []
    for target in targets:
        name, mode = MAIN[target.kind]
        a, b = ours[name + suffix(target, targets)], single[name + suffix(target, targets)]
        gains.append((a - b) / b * (1 if mode == "max" else -1))
    return 100 * sum(gains) / len(gains)
