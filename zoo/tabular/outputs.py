"""From a model's outputs to probabilities and values."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from zoo.tabular.schema import Target


def split_outputs(out: Tensor, targets: Sequence[Target]) -> list[Tensor]:
    """[..., S] -> one [..., outputs] per target."""
    return list(out.split([t.outputs for t in targets], dim=-1))


def readings(out: Tensor, targets: Sequence[Target]) -> list[Tensor]:
    """From a model's outputs to probabilities and values on the original scale, float64; members are averaged."""
    found = []
    for target, part in zip(targets, split_outputs(out.double(), targets), strict=True):
        if target.kind == "multiclass":
            value = part.softmax(-1)
        else:
            value = part[..., 0]
            value = value.sigmoid() if target.kind == "binary" else value * target.std + target.mean
        members = out.dim() == 3
        found.append(value.mean(1) if members else value)
    return found
