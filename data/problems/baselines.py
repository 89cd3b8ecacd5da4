"""Fields that need no training, scored like a trained solver."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def centred(values: Tensor, times: Tensor | None = None) -> Tensor:
    """Values [M] without their mean, or without the mean at each time [M]: an unsteady pressure is free at each."""
    if times is None:
        return values - values.mean()
    _, at = times.unique(return_inverse=True)
    sums = torch.zeros(int(at.max()) + 1, dtype=values.dtype, device=values.device)
    means = sums.index_add(0, at, values) / torch.bincount(at)
    return values - means[at]


def field_errors(
    found: Tensor,
    true: Tensor,
    fields: tuple[str, ...],
    free: tuple[str, ...] = (),
    times: Tensor | None = None,
) -> dict[str, float]:
    """Errors per field and overall.

    Args:
        found: [M, F].
        true: [M, F].
        fields: Names.
        free: Fields known up to a constant; means are removed from both sides.
        times: Time of each point, [M]; the constant is another one at each.

    Returns:
        rel_l2, rel_l1, mse, max_error for each field (`rel_l2_u` ...). The plain names are of the only field, or the
        mean over fields (maximum for max_error).
    """
    out: dict[str, dict[str, float]] = {}
    for n, name in enumerate(fields):
        a, b = found[:, n], true[:, n]
        if name in free:
            a, b = centred(a, times), centred(b, times)
        error, size2, size1 = a - b, b.square().sum(), b.abs().sum()
        out[name] = {
            "rel_l2": float((error.square().sum() / size2).sqrt()) if size2 > 0 else float("inf"),
            "rel_l1": float(error.abs().sum() / size1) if size1 > 0 else float("inf"),
            "mse": float(error.square().mean()),
            "max_error": float(error.abs().max()),
        }
    metrics: dict[str, float] = {}
    for key in ("rel_l2", "rel_l1", "mse", "max_error"):
        values = [e[key] for e in out.values()]
        metrics[key] = max(values) if key == "max_error" else sum(values) / len(values)
        if len(fields) > 1:
            metrics.update({f"{key}_{name}": e[key] for name, e in out.items()})
    return metrics


def field_baselines(data: Any) -> dict[str, dict[str, float]]:
    """The zero field; the initial state kept for ever where there is one; the mean of each field."""
    p = data.problem
    args = (data.reference, tuple(p.report_fields), tuple(p.free_constant), p.times(data.grid))
    found = {"zero_field": field_errors(torch.zeros_like(data.reference), *args)}
    found["mean_field"] = field_errors(data.reference.mean(0).expand_as(data.reference), *args)
    if p.coordinates[-1] == "t" and hasattr(p, "exact"):
        start = data.grid.clone()
        start[:, -1] = p.lower[-1]
        found["initial_state"] = field_errors(p.exact(start), *args)
    return found
