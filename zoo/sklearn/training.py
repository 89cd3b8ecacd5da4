"""The training loop of the estimators."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from zoo.errors import DataError
from zoo.tabular.schema import Target

ROWS_AT_ONCE = 4096


@dataclass(frozen=True)
class Recipe:
    """How long and how fast to train; see `TabularClassifier`."""

    epochs: int
    batch_size: int
    lr: float
    weight_decay: float
    ema_decay: float
    patience: int


def fit_network(
    model: torch.nn.Module,
    tensors: list[torch.Tensor],
    train: torch.Tensor,
    val: torch.Tensor,
    target: Target,
    recipe: Recipe,
) -> tuple[torch.nn.Module, list[dict[str, float]]]:
    """AdamW with warm-up and cosine decay on averaged weights; stops when validation no longer improves.

    Args:
        model: Network over numbers, codes and gaps.
        tensors: Numbers [N, Fn], codes [N, Fc], gaps [N, Fn] and targets [N].
        train, val: Rows to train on and to stop by; `val` may be empty.
        target: What is predicted.
        recipe: Settings.

    Returns:
        The averaged network of the best epoch, and a record of every epoch.
    """
    average = copy.deepcopy(model).eval()
    steps = math.ceil(len(train) / recipe.batch_size)
    total, warmup = recipe.epochs * steps, max(1, int(0.1 * recipe.epochs * steps))
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda t: (
            (t + 1) / warmup
            if t < warmup
            else 0.5 * (1 + math.cos(math.pi * (t - warmup) / max(1, total - warmup)))
        ),
    )
    best, waited, kept, step = math.inf, 0, None, 0
    history: list[dict[str, float]] = []
    for epoch in range(recipe.epochs):
        model.train()
        for own in torch.randperm(len(train)).split(recipe.batch_size):
            rows = train[own]
            hidden = {"own": own} if getattr(model, "hides_own", False) else {}
            loss = _loss(model(*(t[rows] for t in tensors[:3]), **hidden), tensors[3][rows], target)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            step += 1
            decay = min(recipe.ema_decay, (1 + step) / (10 + step))
            with torch.no_grad():
                for a, b in zip(average.parameters(), model.parameters(), strict=True):
                    a.lerp_(b, 1 - decay)
        record = {"epoch": epoch + 1, "train_loss": float(loss.detach())}
        if not math.isfinite(record["train_loss"]):
            raise DataError(f"the loss is {record['train_loss']} in epoch {epoch + 1}; try a smaller lr")
        if len(val):
            out = outputs(average, [t[val] for t in tensors[:3]])
            record["val_loss"] = float(_loss(out, tensors[3][val], target))
            if record["val_loss"] < best:
                best, waited, kept = record["val_loss"], 0, copy.deepcopy(average.state_dict())
            else:
                waited += 1
        history.append(record)
        if waited >= recipe.patience:
            break
    if kept is not None:
        average.load_state_dict(kept)
    # In double precision a row's prediction is the same to the last printed digit whatever rows come with it.
    return average.double(), history


def _loss(out: torch.Tensor, truth: torch.Tensor, target: Target) -> torch.Tensor:
    if out.dim() == 3:
        truth = truth[:, None].expand(out.shape[:2])
    if target.kind == "regression":
        return F.mse_loss(out[..., 0], truth)
    if target.kind == "binary":
        return F.binary_cross_entropy_with_logits(out[..., 0], truth)
    return F.cross_entropy(out.flatten(0, -2), truth.flatten().long())


@torch.no_grad()
def outputs(model: torch.nn.Module, inputs: list[torch.Tensor]) -> torch.Tensor:
    """What the network says of numbers, codes and gaps, some thousand rows at a time."""
    model.eval()
    rows = range(0, len(inputs[0]), ROWS_AT_ONCE)
    return torch.cat([model(*(t[i : i + ROWS_AT_ONCE] for t in inputs)) for i in rows])
