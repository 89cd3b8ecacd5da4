"""Figures of merit of a solver: residuals at held-out points, errors on the reference grid."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

from data.problems.base import Condition, combine
from data.problems.baselines import field_errors
from tasks.physics.objective import Objective


class Gathered(Metric):
    """Keeps what the whole split gave, to be scored at once (means of free fields need all of it)."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("points", "found", "true", "residuals", "extra"):
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def update(self, **values: Tensor) -> None:
        for name, value in values.items():
            getattr(self, name).append(value)

    def compute(self) -> dict[str, Tensor]:
        """Everything gathered, one tensor per name; names that got nothing are left out."""
        kept = {name: getattr(self, name) for name in ("points", "found", "true", "residuals", "extra")}
        return {
            n: torch.cat(list(v)) if isinstance(v, list) else v
            for n, v in kept.items()
            if isinstance(v, Tensor) or v
        }


def evaluate(objective: Objective, points: Tensor) -> dict[str, Tensor]:
    """Reported fields, residuals and further quantities at points [N, d], each [N, *] float64."""
    p = objective.problem
    columns: dict[str, list[Tensor]] = {"found": [], "residuals": [], "extra": []}
    # Reverse-mode derivatives need a graph, which inference mode would forbid.
    with torch.inference_mode(False), torch.set_grad_enabled(objective.method == "reverse"):
        for part in points.clone().split(objective.chunk):
            d = objective.fields(part)
            extra = [combine(d, terms) for terms in p.quantities.values()]
            columns["residuals"].append(objective.residuals(d, part))
            columns["found"].append(p.report(d))
            columns["extra"].append(torch.stack(extra, 1) if extra else part[:, :0])
    return {"points": points} | {n: torch.cat([t.detach().double() for t in c]) for n, c in columns.items()}


def coefficients(objective: Objective) -> dict[str, float]:
    """The unknown coefficients: in closed form from the fields where the problem has one, else as they were trained."""

    def fields(points: Tensor) -> Tensor:
        parts = points.to(objective.device).split(4 * objective.chunk)
        return torch.cat([objective.reported(part).detach().double().cpu() for part in parts])

    trained = {name: float(value.detach()) for name, value in objective.unknowns.items()}
    with torch.inference_mode(False), torch.set_grad_enabled(objective.method == "reverse"):
        return trained | objective.problem.closed_form(fields)


def scores(objective: Objective, held_out: Sequence[Condition], kept: dict[str, Tensor]) -> dict[str, float]:
    """Metrics of one split.

    Args:
        objective: Network and equation.
        held_out: Conditions at points that training does not see.
        kept: What `Gathered` kept; errors of the fields are given where the reference is among it.
    """
    p = objective.problem
    values = {"residual_rms": float(kept["residuals"].square().sum(1).mean().sqrt())}
    with torch.inference_mode(False), torch.set_grad_enabled(objective.method == "reverse"):
        misfits = dict.fromkeys((c.name for c in held_out), 0.0)
        for c in held_out:
            misfits[c.name] += float(objective.misfit(c).detach().square().sum(1).mean())
    values["loss"] = values["residual_rms"] ** 2 + sum(misfits.values())
    values |= {f"{t}_mse": m for t, m in misfits.items()}
    estimates = coefficients(objective) if p.unknowns else {}
    for name, (_, true) in p.unknowns.items():
        pair = {name: estimates[name], f"{name}_trained": float(objective.unknowns[name].detach())}
        values |= pair | {f"{n}_error": abs(v - true) / abs(true) for n, v in pair.items()}
    if "true" in kept:
        found, true, points = kept["found"], kept["true"], kept["points"]
        values |= field_errors(found, true, tuple(p.report_fields), tuple(p.free_constant), p.times(points))
        values |= p.grid_metrics(found, true, points)
        rms = kept["extra"].square().mean(0).sqrt()
        values |= {f"{n}_rms": float(v) for n, v in zip(p.quantities, rms, strict=True)}
    return values
