"""Figures of tabular tasks: ROC, precision-recall, calibration, predicted against true, importance of columns."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from data.sampler import BatchKey
from zoo.attention.base import Attention
from zoo.tabular.schema import Target
from zoo.tabular.scores import MAIN, score_target

if TYPE_CHECKING:
    from tasks.base import ZooTask

COLUMNS_SHOWN = 30


def target_figure(folder: Path, target: Target, prediction: np.ndarray, truth: np.ndarray) -> Path:
    """What there is to see of one target's test predictions."""
    from matplotlib.figure import Figure

    draw = {"binary": _binary, "multiclass": _multiclass, "regression": _regression}[target.kind]
    figure = Figure(figsize=(12, 3.8), layout="constrained")
    figure.suptitle(f"{target.name}, {len(truth):,} test rows")
    draw(figure, target, prediction, truth)
    path = folder / f"target_{''.join(c if c.isalnum() else '_' for c in target.name)}.png"
    figure.savefig(path, dpi=120)
    return path


def _binary(figure: Any, target: Target, p: np.ndarray, y: np.ndarray) -> None:
    roc, pr, calibration = figure.subplots(1, 3)
    order = np.argsort(-p, kind="stable")
    hits, misses = np.cumsum(y[order] == 1), np.cumsum(y[order] != 1)
    scores = score_target("binary", p, y)
    roc.plot(misses / max(1, misses[-1]), hits / max(1, hits[-1]))
    roc.plot([0, 1], [0, 1], "k:", lw=0.8)
    roc.set(xlabel="false positive rate", ylabel="true positive rate", title=f"ROC, area {scores['auc']:.4f}")
    pr.plot(hits / max(1, hits[-1]), hits / (hits + misses))
    pr.axhline(float((y == 1).mean()), color="k", ls=":", lw=0.8)
    pr.set(xlabel="recall", ylabel="precision", ylim=(0, 1.02), title=f"precision-recall, {scores['ap']:.4f}")
    _calibration(calibration, p, y == 1, f"probability of {target.classes[1]}")


def _calibration(axes: Any, p: np.ndarray, hit: np.ndarray, label: str) -> None:
    edges = np.unique(np.quantile(p, np.linspace(0, 1, 16)))
    place = np.searchsorted(edges[1:-1], p, side="right")
    groups = [place == i for i in np.unique(place)]
    mean, share = [p[g].mean() for g in groups], [hit[g].mean() for g in groups]
    error = sum(g.sum() * abs(m - s) for g, m, s in zip(groups, mean, share, strict=True)) / len(p)
    axes.plot([0, 1], [0, 1], "k:", lw=0.8)
    axes.plot(mean, share, "o-", ms=4)
    axes.set(xlabel=label, ylabel="share of such rows", title=f"calibration, mean gap {error:.4f}")


def _multiclass(figure: Any, target: Target, p: np.ndarray, y: np.ndarray) -> None:
    matrix, calibration = figure.subplots(1, 2)
    k = len(target.classes)
    counts = np.zeros((k, k))
    np.add.at(counts, (y.astype(int), p.argmax(1)), 1)
    image = matrix.imshow(counts / counts.sum(1, keepdims=True).clip(1), cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, ax=matrix, label="share of the true class")
    if k <= 20:
        matrix.set_xticks(range(k), target.classes, rotation=90)
        matrix.set_yticks(range(k), target.classes)
    matrix.set(xlabel="predicted", ylabel="true", title="confusion matrix")
    _calibration(calibration, p.max(1), p.argmax(1) == y, "probability of the chosen class")


def _regression(figure: Any, target: Target, p: np.ndarray, y: np.ndarray) -> None:
    scatter, residual = figure.subplots(1, 2)
    scores = score_target("regression", p, y)
    scatter.hexbin(y, p, gridsize=60, bins="log", mincnt=1, cmap="viridis")
    low, high = float(min(p.min(), y.min())), float(max(p.max(), y.max()))
    scatter.plot([low, high], [low, high], "k:", lw=0.8)
    scatter.set(
        xlabel=f"true {target.name}",
        ylabel="predicted",
        title=f"RMSE {scores['rmse']:.4g}, R² {scores['r2']:.4f}",
    )
    residual.hist(p - y, bins=80)
    residual.set(xlabel="predicted - true", ylabel="rows", title=f"residuals, mean {np.mean(p - y):.3g}")


def importance_figure(folder: Path, task: ZooTask) -> Path:
    """Importance of columns by permutation on test rows, beside the attention that they get where there is a map."""
    from matplotlib.figure import Figure

    names = task.data.preprocessor.feature_names
    loss = permutation_importance(task)
    looked = attention_importance(task)
    shown = np.argsort(-loss)[:COLUMNS_SHOWN][::-1]
    figure = Figure(figsize=(11, 1.5 + 0.25 * len(shown)), layout="constrained")
    axes = figure.subplots(1, 1 if looked is None else 2, sharey=True, squeeze=False)[0]
    main = MAIN[task.targets[0].kind][0]
    axes[0].barh(range(len(shown)), loss[shown])
    axes[0].set_yticks(range(len(shown)), [names[i] for i in shown])
    axes[0].set(xlabel=f"loss of {main} when shuffled", title="importance by permutation")
    if looked is not None:
        axes[1].barh(range(len(shown)), looked[shown])
        axes[1].set(xlabel="mean weight, all blocks and heads", title="attention paid")
    path = folder / "importance.png"
    figure.savefig(path, dpi=120)
    return path


@torch.no_grad()
def permutation_importance(task: ZooTask, *, repeats: int = 2, seed: int = 0) -> np.ndarray:
    """How much worse the main score gets when a column is shuffled among rows, mean over targets and repeats: [F]."""
    batch = _test_batch(task)
    draw = torch.Generator().manual_seed(seed)
    before = _main_scores(task, batch)
    found = []
    for key, i in _columns(batch):
        losses = []
        for _ in range(repeats):
            order = torch.randperm(len(batch[key]), generator=draw)
            changed = {**batch, key: batch[key].clone()}
            changed[key][:, i] = batch[key][order, i]
            if key == "numerical" and "missing" in batch:
                changed["missing"] = batch["missing"].clone()
                changed["missing"][:, i] = batch["missing"][order, i]
            losses.append(np.nanmean(before - _main_scores(task, changed)))
        found.append(float(np.mean(losses)))
    return np.array(found)


@torch.no_grad()
def attention_importance(task: ZooTask) -> np.ndarray | None:
    """Mean absolute attention that each column gets, [F]; None when no block over the columns has a map.

    The class token's row counts where the model has one, all rows otherwise.
    """
    batch = _test_batch(task)
    columns = len(_columns(batch))
    kept: list[torch.Tensor] = []

    def look(module: nn.Module, args: tuple, kwargs: dict) -> None:
        x = args[0]
        if x.dim() == 3 and x.shape[1] >= columns and x.shape[0] == len(batch["target"]):
            call = {k: v for k, v in kwargs.items() if v is not None}
            weights = module.attention_map(*args, **call).abs()
            rows = weights[:, :, :1] if hasattr(task.model, "cls_token") else weights
            kept.append(rows[..., -columns:].mean((0, 1, 2)))

    blocks = [m for m in task.model.modules() if isinstance(m, Attention) and m.capabilities.has_map]
    hooks = [m.register_forward_pre_hook(look, with_kwargs=True) for m in blocks]
    try:
        task.logits(batch)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(kept).mean(0).cpu().numpy() if kept else None


def _test_batch(task: ZooTask) -> dict[str, torch.Tensor]:
    rows = min(task.importance_rows, len(task.data.dataset("test")))
    batch = task.data.dataset("test")[BatchKey(np.arange(rows), -1, 0)]
    task.eval()
    return {k: v.to(task.device) for k, v in batch.items()}


def _columns(batch: dict[str, torch.Tensor]) -> list[tuple[str, int]]:
    return [(key, i) for key in ("numerical", "categorical") for i in range(batch[key].shape[1])]


def _main_scores(task: ZooTask, batch: dict[str, torch.Tensor]) -> np.ndarray:
    """Main score of each target, larger is better."""
    from tasks.tabular import original

    found = []
    for i, (target, p) in enumerate(zip(task.targets, task.predictions(batch), strict=True)):
        truth = original(batch["target"][:, i], target).cpu().numpy()
        name, mode = MAIN[target.kind]
        value = score_target(target.kind, p.cpu().numpy(), truth)[name]
        found.append(value if mode == "max" else -value)
    return np.array(found)
