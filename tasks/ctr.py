"""Click-through prediction from long behaviour sequences: AUC, AUC by user, and how well the search finds the truth."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric, MetricCollection
from torchmetrics.utilities import dim_zero_cat

from data.rec_metrics import auc, grouped_auc, log_loss
from tasks.base import Batch, ZooTask, full_precision, of_all_processes
from zoo.errors import ConfigError, unknown

WEIGHTS = ("impressions", "clicks")


class ClickMetrics(Metric):
    """AUC with ties counted half, AUC within users, log-loss, over all samples of a split."""

    full_state_update = False

    def __init__(self, weights: str) -> None:
        super().__init__()
        self.weights = weights
        for name in ("logit", "label", "user"):
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def update(self, logit: Tensor, label: Tensor, user: Tensor) -> None:
        """One batch: [B] each."""
        # On the device: its processes exchange nothing else.
        self.logit.append(logit.detach().float())
        self.label.append(label)
        self.user.append(user)

    def compute(self) -> dict[str, float]:
        """`auc`, `gauc` and `log_loss`."""
        logit, label, user = (dim_zero_cat(x).cpu().numpy() for x in (self.logit, self.label, self.user))
        return {
            "auc": auc(logit, label),
            "gauc": grouped_auc(logit, label, user, self.weights)[0],
            "log_loss": log_loss(logit, label),
        }


class ClickThrough(ZooTask):
    """Will this user click on this item?

    Args:
        gauc_weights: What weighs a user in the mean AUC: "impressions" or "clicks"; users with one class are left out.
        auxiliary_loss_weight: Factor on the loss of a model's search stage (dare), >= 0.
        table_weight_decay: Decay of embedding tables, >= 0; `weight_decay` is that of matrices.
        search_weight_decay: The same of tables that only attention reads (dare), >= 0: scores are products of their
            rows, so decay flattens the softmax, and a narrow table's the most.
        search_lr_factor: Rate of those tables over that of the others, > 0.
        truth_k: Depth at which the search is compared with the true relevance, where the data know it.
        common: Those of `ZooTask`.
    """

    monitor = "auc"
    mode = "max"
    data_kind = "clicks"

    def __init__(
        self,
        model: nn.Module,
        data: Any,
        *,
        gauc_weights: str = "impressions",
        auxiliary_loss_weight: float = 1.0,
        table_weight_decay: float = 0.0,
        search_weight_decay: float = 0.0,
        search_lr_factor: float = 2.0,
        truth_k: int = 20,
        **common: Any,
    ) -> None:
        if gauc_weights not in WEIGHTS:
            raise unknown("task.gauc_weights", str(gauc_weights), WEIGHTS)
        if min(auxiliary_loss_weight, table_weight_decay, search_weight_decay) < 0 or truth_k < 1:
            raise ConfigError(
                f"task.auxiliary_loss_weight={auxiliary_loss_weight}, task.table_weight_decay={table_weight_decay} and "
                f"task.search_weight_decay={search_weight_decay} must not be negative, task.truth_k={truth_k} must be "
                "at least 1"
            )
        if search_lr_factor <= 0:
            raise ConfigError(f"task.search_lr_factor={search_lr_factor} must be positive")
        self.gauc_weights = gauc_weights
        super().__init__(model, data, **common)
        self.auxiliary_loss_weight, self.table_weight_decay = auxiliary_loss_weight, table_weight_decay
        self.search_weight_decay, self.search_lr_factor = search_weight_decay, search_lr_factor
        self.truth_k = truth_k
        self._kept: dict[str, list[Tensor]] = {"score": [], "truth": [], "logit": [], "label": []}

    @classmethod
    def model_arguments(cls, data: Any) -> dict[str, Any]:
        return {
            "num_items": data.num_items,
            "num_categories": data.num_categories,
            "max_length": data.max_length,
        }

    def make_metrics(self) -> MetricCollection:
        return MetricCollection(
            {
                "clicks": ClickMetrics(self.gauc_weights),
                "recall": MeanMetric(),
                "weight": MeanMetric(),
                "correlation": MeanMetric(),
            },
            compute_groups=False,
        )

    def compute_metrics(self, split: str) -> dict[str, float]:
        metrics = self.metrics[split]
        values = dict(metrics["clicks"].compute())
        names = {
            "recall": "recall_of_truth",
            "weight": "recall_of_weight",
            "correlation": "correlation_of_truth",
        }
        for name, shown in names.items():
            # Every process that saw a history counts here, relevant behaviours or none: computing waits for all of them.
            if metrics[name].update_count and not math.isnan(value := float(metrics[name].compute())):
                values[shown] = value
        return values

    # ---------------------------------------------------------------- training

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        out = self.model(*_inputs(batch))
        terms = {"click": F.binary_cross_entropy_with_logits(out["logit"], batch["label"])}
        if "auxiliary" in out:
            loss = F.binary_cross_entropy_with_logits(out["auxiliary"], batch["label"])
            terms["search"] = self.auxiliary_loss_weight * loss
        return terms

    def configure_optimizers(self) -> Any:
        """Tables apart from the rest, and those of attention apart from those of representation."""
        out = super().configure_optimizers()
        optimizer, schedule = out["optimizer"], out["lr_scheduler"]["scheduler"].lr_lambdas[0]
        compare = getattr(self.model, "compare", None)  # a model from elsewhere need not have it
        own = compare is not None and compare is not self.model.represent
        search = list(compare.parameters()) if own else []
        seen = {id(p) for p in search}
        others = [p for m in self.model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()]
        others = [p for p in others if id(p) not in seen]
        seen |= {id(p) for p in others}
        for group in optimizer.param_groups:
            group["params"] = [p for p in group["params"] if id(p) not in seen]
        for params, factor, decay in (
            (others, 1.0, self.table_weight_decay),
            (search, self.search_lr_factor, self.search_weight_decay),
        ):
            if params:
                lr = self.lr * factor
                optimizer.add_param_group(
                    {"params": params, "lr": lr, "initial_lr": lr, "weight_decay": decay}
                )
        out["lr_scheduler"]["scheduler"] = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
        return out

    # ---------------------------------------------------------------- evaluation

    def update_metrics(self, batch: Batch, metrics: MetricCollection, split: str) -> None:
        logit = full_precision(self.model(*_inputs(batch))["logit"])
        metrics["clicks"].update(logit, batch["label"], batch["user"])
        if split == "test":
            self._kept["logit"].append(logit.cpu())
            self._kept["label"].append(batch["label"].cpu())
        if "relevance" in batch:
            scores = full_precision(self.model.search_scores(*_inputs(batch)))
            real = batch["items"] > 0
            recall, weight = recall_of_truth(scores, batch["relevance"], real, self.truth_k)
            metrics["recall"].update(recall)
            metrics["weight"].update(weight)
            metrics["correlation"].update(correlation_with_truth(scores, batch["relevance"], real))
            if split == "test" and len(self._kept["score"]) < 20:
                keep = real & scores.isfinite()
                self._kept["score"].append(scores[keep].cpu())
                self._kept["truth"].append(batch["relevance"][keep].cpu())

    def on_test_start(self) -> None:
        super().on_test_start()
        for kept in self._kept.values():
            kept.clear()

    def example_inputs(self) -> tuple[tuple, dict]:
        one = torch.ones(1, dtype=torch.long)
        history = torch.ones(1, self.data.max_length, dtype=torch.long)
        return (one, one, history, history), {}

    def gather(self) -> None:
        self._kept = {name: of_all_processes(parts) for name, parts in self._kept.items()}

    def figures(self, folder: Path) -> list[Path]:
        """Calibration, and what the search scores make of truly relevant behaviours."""
        kept = self._kept
        if not kept["logit"]:
            return []
        from matplotlib.figure import Figure

        folder.mkdir(parents=True, exist_ok=True)
        chance, label = torch.cat(kept["logit"]).sigmoid(), torch.cat(kept["label"])
        edges = torch.from_numpy(np.quantile(chance.numpy(), np.linspace(0, 1, 16))).to(chance).unique()
        group = torch.bucketize(chance, edges[1:-1]) if len(edges) > 2 else torch.zeros_like(chance).long()
        figure = Figure(figsize=(4.6, 4.2), layout="constrained")
        axes = figure.subplots()
        axes.plot([0, 1], [0, 1], "k:", label="perfect")
        points = [(chance[group == g].mean(), label[group == g].mean()) for g in group.unique()]
        axes.plot(*zip(*points, strict=True), "o-", label="model")
        axes.set(xlabel="predicted probability", ylabel="share clicked", title="Calibration, test split")
        axes.legend()
        written = [folder / "calibration.png"]
        figure.savefig(written[0], dpi=130)
        if kept["score"]:
            score, truth = torch.cat(kept["score"]), torch.cat(kept["truth"])
            figure = Figure(figsize=(5.6, 4.2), layout="constrained")
            axes = figure.subplots()
            spread = (score - score.mean()) / score.std().clamp_min(1e-9)
            parts = {"irrelevant": truth == 0, "weak": (truth > 0) & (truth <= 0.3), "strong": truth > 0.3}
            for name, rows in parts.items():
                if rows.any():
                    axes.hist(spread[rows].clamp(-4, 6).numpy(), 60, density=True, alpha=0.5, label=name)
            axes.set(
                xlabel="search score, standardised", ylabel="density", title="Scores of behaviours by truth"
            )
            axes.legend()
            written.append(folder / "search_scores.png")
            figure.savefig(written[1], dpi=130)
        return written


def recall_of_truth(scores: Tensor, relevance: Tensor, real: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """How many of the k truly most relevant behaviours are among the k with the best scores, and their weight.

    Args:
        scores: What the model orders by, [B, M]; the search leaves out what has -inf.
        relevance: True weights, >= 0, [B, M].
        real: Behaviours that are no padding, bool [B, M].
        k: Depth. A sample with fewer relevant behaviours is asked for those; one with none is left out.

    Returns:
        Share of the behaviours, and share of the weight that any k behaviours could hold; one value each per sample
        that has a relevant behaviour.
    """
    k = min(k, scores.shape[1])
    # A score shared by many says nothing of their order: shuffle them, so that padding order does not help.
    mixed = torch.randperm(scores.shape[1], generator=torch.Generator().manual_seed(0)).to(scores.device)
    scores, relevance, real = scores[:, mixed], relevance[:, mixed], real[:, mixed]
    best, found = scores.masked_fill(~real, float("-inf")).topk(k, 1)
    taken = best > float("-inf")
    wanted_weight, wanted = relevance.topk(k, 1)
    is_wanted = torch.zeros_like(real).scatter(1, wanted, wanted_weight > 0)
    count = is_wanted.sum(1)
    hits = (is_wanted.gather(1, found) & taken).sum(1)
    held = (relevance.gather(1, found) * taken).sum(1) / wanted_weight.sum(1).clamp_min(1e-12)
    asked = count > 0
    return (hits / count.clamp_min(1))[asked].float(), held[asked].float()


def correlation_with_truth(scores: Tensor, relevance: Tensor, real: Tensor) -> Tensor:
    """Pearson correlation of the softmax of the scores with the true weights, per sample that has both varying."""
    real = real & scores.isfinite()
    weight = scores.masked_fill(~real, float("-inf")).softmax(1).nan_to_num(0.0)
    count = real.sum(1, keepdim=True).clamp_min(1)

    def centred(x: Tensor) -> Tensor:
        x = x * real
        return (x - x.sum(1, keepdim=True) / count) * real

    a, b = centred(weight), centred(relevance)
    norm = a.norm(dim=1) * b.norm(dim=1)
    return ((a * b).sum(1) / norm.clamp_min(1e-12))[norm > 1e-12]


def _inputs(batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return batch["item"], batch["category"], batch["items"], batch["categories"]
