"""Losses over a catalogue of items, without ever holding all logits."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK_ELEMENTS = 1 << 19  # 2 MiB of float32 logits stay in the cache between the passes over them


def full_softmax_loss(
    users: Tensor, table: Tensor, bias: Tensor, targets: Tensor, label_smoothing: float = 0.0
) -> Tensor:
    """Mean cross-entropy of the right item against all items.

    Equals `F.cross_entropy(users @ table.T + bias, targets, label_smoothing=...)`, but makes the logits in blocks of
    rows and turns each into its gradient at once: one pass instead of six over a [R, I] matrix.

    Args:
        users: [R, C].
        table: [I, C].
        bias: [I].
        targets: Item indices from 0, int64 [R].
        label_smoothing: Share of the target spread over all items, [0, 1).
    """
    # Autocast would make the products in half precision, which neither holds sums over a catalogue nor fits the table's gradient.
    with torch.autocast(users.device.type, enabled=False):
        return _FullSoftmax.apply(users.to(table.dtype), table, bias, targets, label_smoothing)


class _FullSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, users: Tensor, table: Tensor, bias: Tensor, targets: Tensor, smoothing: float
    ) -> Tensor:
        rows, items = len(users), len(table)
        wanted = any(ctx.needs_input_grad[:3])
        d_users = torch.empty_like(users) if wanted else None
        d_table, d_bias = torch.zeros_like(table), torch.zeros_like(bias)
        loss = users.new_zeros((), dtype=torch.float64)
        step = max(1, BLOCK_ELEMENTS // items)
        for start in range(0, rows, step):
            h, t = users[start : start + step], targets[start : start + step]
            logits = torch.addmm(bias, h, table.T)
            right = logits.gather(1, t[:, None])
            mean = logits.mean(1, keepdim=True) if smoothing else 0.0
            peak = logits.amax(1, keepdim=True)
            weight = logits.sub_(
                peak
            ).exp_()  # the softmax times `total`: rows are scaled where they are short
            total = weight.sum(1, keepdim=True)
            block = peak + total.log() - (1 - smoothing) * right - smoothing * mean
            loss += block.double().sum()
            if wanted:
                if smoothing:
                    weight.sub_(total * (smoothing / items))
                weight.scatter_add_(1, t[:, None], (smoothing - 1) * total)
                torch.div(weight @ table, total, out=d_users[start : start + step])
                d_table.addmm_(weight.T, h / total)
                d_bias.addmv_(weight.T, 1 / total[:, 0])
        if wanted:
            ctx.save_for_backward(d_users, d_table, d_bias)
            ctx.rows = max(1, rows)
        return (loss / max(1, rows)).to(users.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        scale = grad / ctx.rows
        return *(g * scale for g in ctx.saved_tensors), None, None


def sampled_softmax_loss(
    users: Tensor, table: Tensor, bias: Tensor, targets: Tensor, negatives: Tensor, log_probability: Tensor
) -> Tensor:
    """Mean cross-entropy of the right item against a shared sample, corrected for how likely each was drawn.

    Args:
        users: [R, C].
        table: [I, C].
        bias: [I].
        targets: Item indices from 0, int64 [R].
        negatives: Item indices drawn with replacement, int64 [K]; a row's own target among them does not count.
        log_probability: Logarithm of the probability that a draw gives item i, [I].

    Source: Bengio and Senecal, 2008, "Adaptive importance sampling to accelerate training".
    """
    right = (users * table[targets]).sum(1) + bias[targets]
    expected = log_probability + torch.log(torch.tensor(float(len(negatives))))
    others = torch.addmm(bias[negatives] - expected[negatives], users, table[negatives].T)
    others = others.masked_fill(negatives[None, :] == targets[:, None], float("-inf"))
    logits = torch.cat((right[:, None], others), 1)
    return F.cross_entropy(logits, torch.zeros_like(targets))


def binary_loss(users: Tensor, table: Tensor, bias: Tensor, targets: Tensor, negatives: Tensor) -> Tensor:
    """The original SASRec loss: binary cross-entropy of the right item and one other, [R] each."""
    right = (users * table[targets]).sum(1) + bias[targets]
    wrong = (users * table[negatives]).sum(1) + bias[negatives]
    counts = negatives != targets
    return F.softplus(-right).mean() + (F.softplus(wrong) * counts).sum() / counts.sum().clamp_min(1)
