"""Next-item recommendation: full, sampled or binary softmax; full ranking with ties counted fairly."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric, MetricCollection

from data.rec_metrics import CUTOFFS, count_above, ranking_metrics
from tasks.base import Batch, ZooTask, full_precision, of_all_processes
from zoo.errors import ConfigError, unknown
from zoo.layers.item_losses import binary_loss, full_softmax_loss, sampled_softmax_loss

LOSSES = ("full", "sampled", "binary")


class Recommendation(ZooTask):
    """Rank all items for each user.

    Args:
        loss: "full" softmax over all items, "sampled" softmax over `negatives` items, or "binary" with one negative.
        negatives: Items drawn per step for "sampled", >= 1.
        sampling: How they are drawn: "uniform" or "popularity" (training counts to the power 0.75).
        label_smoothing: Share of the target spread over all items; "full" only, [0, 1).
        mask_fraction: Share of items hidden in training for models with the cloze objective, (0, 1).
        mask_last: Share of training sequences in which the last item alone is hidden, as in the test, [0, 1].
        common: Those of `ZooTask`.
    """

    monitor = "ndcg_at_10"
    mode = "max"
    loss_split = "train"
    data_kind = "sequences"

    def __init__(
        self,
        model: nn.Module,
        data: Any,
        *,
        loss: str = "full",
        negatives: int = 256,
        sampling: str = "popularity",
        label_smoothing: float = 0.0,
        mask_fraction: float = 0.2,
        mask_last: float = 0.2,
        **common: Any,
    ) -> None:
        if loss not in LOSSES:
            raise unknown("task.loss", str(loss), LOSSES)
        if negatives < 1:
            raise ConfigError(f"task.negatives={negatives} must be at least 1")
        if sampling not in ("uniform", "popularity"):
            raise unknown("task.sampling", str(sampling), ("uniform", "popularity"))
        if not 0 <= label_smoothing < 1:
            raise ConfigError(f"task.label_smoothing={label_smoothing} is outside [0, 1)")
        if label_smoothing and loss != "full":
            raise ConfigError(f"task.label_smoothing={label_smoothing} belongs to task.loss=full, not {loss}")
        if not 0 < mask_fraction < 1 or not 0 <= mask_last <= 1:
            raise ConfigError(
                f"task.mask_fraction={mask_fraction} must lie in (0, 1) and task.mask_last={mask_last} in [0, 1]"
            )
        super().__init__(model, data, **common)
        self.loss, self.negatives, self.label_smoothing = loss, negatives, label_smoothing
        self.mask_fraction, self.mask_last = mask_fraction, mask_last
        counts = torch.bincount(torch.from_numpy(data.train_items()), minlength=data.num_items + 1)[1:]
        weight = (counts.float() + 1) ** (0.75 if sampling == "popularity" else 0.0)
        self.register_buffer("log_probability", (weight / weight.sum()).log(), persistent=False)
        self.register_buffer("train_counts", counts, persistent=False)
        # Of each test batch: rank of the right item, its number, events in the history, numbers of the first ten.
        self._tested: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []

    @classmethod
    def model_arguments(cls, data: Any) -> dict[str, Any]:
        return {"num_items": data.num_items, "max_length": data.max_length}

    def make_metrics(self) -> MetricCollection:
        names = [f"{name}_at_{k}" for name in ("hr", "ndcg", "mrr") for k in CUTOFFS]
        return MetricCollection({name: MeanMetric() for name in names}, compute_groups=False)

    # ---------------------------------------------------------------- training

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        items, targets = batch["items"], batch["targets"]
        if self.model.objective == "cloze":
            items, targets = self._hide(items, targets)
        asked = targets > 0
        users = self.model(items, batch["times"])[asked]
        right = targets[asked] - 1
        table, bias = self.model.item_table()
        # In half precision many items' logits would be the same.
        with torch.autocast(users.device.type, enabled=False):
            users = full_precision(users)
            if self.loss == "full":
                value = full_softmax_loss(users, table, bias, right, self.label_smoothing)
            elif self.loss == "sampled":
                drawn = torch.multinomial(self.log_probability.exp(), self.negatives, replacement=True)
                value = sampled_softmax_loss(users, table, bias, right, drawn, self.log_probability)
            else:
                drawn = torch.randint(len(table), right.shape, device=right.device)
                value = binary_loss(users, table, bias, right, drawn)
        return {self.loss: value}

    def _hide(self, items: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Replace some items by the mask; what to predict there is the item itself."""
        full = torch.cat(
            (items[:, 1:], targets[:, -1:]), 1
        )  # the window moved on: its last item is the newest
        real = full > 0
        last = torch.zeros_like(real)
        last[:, -1] = True
        hidden = torch.rand(full.shape, device=full.device) < self.mask_fraction
        only_last = torch.rand(len(full), 1, device=full.device) < self.mask_last
        hidden = torch.where(only_last, last, hidden) & real
        hidden |= last & real & ~hidden.any(1, keepdim=True)  # every window asks for something
        return full.masked_fill(hidden, self.model.mask_token), full.masked_fill(~hidden, 0)

    # ---------------------------------------------------------------- evaluation

    def update_metrics(self, batch: Batch, metrics: MetricCollection, split: str) -> None:
        users = full_precision(self.model.user_vector(batch["items"], batch["times"]))
        # In half precision most of a catalogue would tie.
        with torch.autocast(users.device.type, enabled=False):
            scores = self.model.scores(users)
        target = batch["target"] - 1
        excluded = batch["seen"] - 1 if self.data.exclude_seen else None
        above, tied = count_above(scores, target, excluded)
        values = ranking_metrics(above.cpu(), tied.cpu(), CUTOFFS)
        for name, value in values.items():
            metrics[name].update(value)
        if split == "test":
            if self.data.exclude_seen:
                # Item numbers run from 1: padding points at a column of its own.
                spare = torch.cat((scores[:, :1], scores), 1)
                scores = spare.scatter(1, batch["seen"], float("-inf"))[:, 1:]
            top = scores.topk(min(10, scores.shape[1]), dim=1).indices
            kept = (above + tied / 2 + 1, target, (batch["seen"] > 0).sum(1), top)
            self._tested.append(tuple(t.cpu() for t in kept))

    def on_test_start(self) -> None:
        super().on_test_start()
        self._tested.clear()

    def example_inputs(self) -> tuple[tuple, dict]:
        items = torch.ones(1, self.data.max_length, dtype=torch.long)
        return (items, torch.zeros(1, self.data.max_length)), {}

    def gather(self) -> None:
        self._tested = of_all_processes(self._tested)

    def figures(self, folder: Path) -> list[Path]:
        """Where the right item ranks, who is served well, and which items are ever shown."""
        if not self._tested:
            return []
        from matplotlib.figure import Figure

        folder.mkdir(parents=True, exist_ok=True)
        ranks, targets, lengths, top = (torch.cat(column) for column in zip(*self._tested, strict=True))
        ranks, counts = ranks.float(), self.train_counts.cpu()
        figure = Figure(figsize=(11, 3.6), layout="constrained")
        left, middle, right = figure.subplots(1, 3)
        k = torch.arange(1, min(200, self.data.num_items) + 1)
        left.plot(k, [(ranks <= i).float().mean() for i in k], label="model")
        left.plot(k, k / self.data.num_items, "k:", label="chance")
        left.set(xlabel="length k of the list", ylabel="HR@k", title="Right item among the first k")
        left.legend()
        for axes, value, label in (
            (middle, lengths, "events in the history"),
            (right, counts[targets], "training events of the right item"),
        ):
            edges = torch.from_numpy(np.quantile(value.numpy(), np.linspace(0, 1, 6))).float().unique()
            group = (
                torch.bucketize(value.float(), edges[1:-1])
                if len(edges) > 2
                else torch.zeros(len(value)).long()
            )
            hits = [(ranks[group == g] <= 10).float().mean().item() for g in group.unique()]
            names = [f"{int(value[group == g].min())}-{int(value[group == g].max())}" for g in group.unique()]
            axes.bar(names, hits)
            axes.set(xlabel=label, ylabel="HR@10")
            axes.tick_params(axis="x", rotation=30)
        written = [folder / "ranking.png"]
        figure.savefig(written[0], dpi=130)

        shown = torch.bincount(top.flatten(), minlength=self.data.num_items)
        figure = Figure(figsize=(5, 3.6), layout="constrained")
        axes = figure.subplots()
        axes.scatter(counts + 1, shown + 1, s=4, alpha=0.5)
        share = (shown > 0).float().mean().item()
        axes.set(
            xscale="log",
            yscale="log",
            xlabel="training events + 1",
            ylabel="times in a top 10 + 1",
            title=f"{share:.0%} of the items are shown to somebody",
        )
        written.append(folder / "coverage.png")
        figure.savefig(written[1], dpi=130)
        return written

    def card(self) -> dict[str, Any]:
        return {
            "chance_hr_at_10": min(1.0, 10 / self.data.num_items),
            "log_items": math.log(self.data.num_items),
        }
