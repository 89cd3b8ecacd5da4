"""Several targets of one table at once, with the gain over predicting each alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tasks.tabular import _TabularTask, suffix
from zoo.errors import ConfigError, unknown
from zoo.tabular.schema import Target
from zoo.tabular.scores import MAIN

REFERENCE = "single_task_mlp"
BALANCES = ("sum", "geometric")


class TabularMultitaskTask(_TabularTask):
    """Sum of the targets' losses; chosen by the mean of AUC and R² over targets.

    Args:
        target_weights: Weight of each target's loss; equal when left out.
        balance: How the targets' losses become one: "sum", or "geometric", their (weighted) geometric mean, whose
            gradient weighs each target by one over its present loss: a target that is nearly solved still counts, and
            one with heavy tails does not drown the others.
        reference: Run folder of single-task networks (`model.separate=true`, else the same settings); its test metrics are
            what `gain_over_single_percent` is reckoned from. `gain_percent` is reckoned from the baseline's perceptrons.
        common: See the base class and `tasks.base.ZooTask`.
    """

    monitor = "score_mean"
    mode = "max"

    def __init__(
        self,
        model: nn.Module,
        data: Any,
        *,
        target_weights: list[float] | None = None,
        balance: str = "sum",
        reference: str | None = None,
        **common: Any,
    ) -> None:
        super().__init__(model, data, **common)
        if balance not in BALANCES:
            raise unknown("task.balance", str(balance), BALANCES)
        if target_weights is not None and (
            len(target_weights) != len(self.targets) or min(target_weights) < 0 or not any(target_weights)
        ):
            raise ConfigError(
                f"task.target_weights={target_weights} must be {len(self.targets)} numbers >= 0, not all 0, one per target: "
                f"{', '.join(t.name for t in self.targets)}"
            )
        self.target_weights = list(target_weights or [1.0] * len(self.targets))
        self.balance = balance
        self.reference = reference and read_reference(Path(reference), self.targets)

    def losses(self, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        terms = super().losses(batch)
        if self.balance == "geometric":
            return {"geometric_mean": geometric_mean(torch.stack([*terms.values()]), self.target_weights)}
        return {name: w * term for w, (name, term) in zip(self.target_weights, terms.items(), strict=True)}

    def compute_metrics(self, split: str) -> dict[str, float]:
        values = super().compute_metrics(split)
        parts = [
            values[("r2" if t.kind == "regression" else "auc") + suffix(t, self.targets)]
            for t in self.targets
        ]
        values = {"score_mean": sum(parts) / len(parts), **values}
        if split == "test" and not self.trainer.fast_dev_run:
            singles = {
                "gain_percent": self.data.baselines().get(REFERENCE),
                "gain_over_single_percent": self.reference,
            }
            values |= {name: multitask_gain(self.targets, values, s) for name, s in singles.items() if s}
        return values


def geometric_mean(losses: torch.Tensor, weights: list[float]) -> torch.Tensor:
    """exp(sum of w log(loss) / sum of w) of losses [T] >= 0.

    Source: Chennupati et al., "MultiNet++", arXiv:1904.08492 (geometric loss strategy).
    """
    w = losses.new_tensor(weights)
    return ((w / w.sum()) * (losses + 1e-12).log()).sum().exp()


def read_reference(folder: Path, targets: list[Target]) -> dict[str, float]:
    """Test metrics of a finished run on the same targets.

    Raises:
        ConfigError: No result there, or one of other targets.
    """
    file = folder.expanduser() / "result.json"
    if not file.is_file():
        raise ConfigError(f"task.reference={folder} holds no result.json; give the folder of a finished run")
    found = json.loads(file.read_text())["test"]
    absent = [n for t in targets if (n := MAIN[t.kind][0] + suffix(t, targets)) not in found]
    if absent:
        raise ConfigError(
            f"task.reference={folder} has no {', '.join(absent)}; give a run on the same targets"
        )
    return found


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
