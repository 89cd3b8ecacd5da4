"""Levenberg-Marquardt: Gauss-Newton steps, damped so that each one lowers the sum of squares.

The damping changes from step to step as in Nielsen (1999). It is added to the whole diagonal alike: scaled by each entry, as
Marquardt has it, steps run off along weights that hardly matter. A step solves with a matrix of all numbers, so it is for
small networks. On Burgers' equation with a perceptron of 609 numbers (model.dim=16 model.depth=3), one core: relative error
2.5e-3 after 8 s and 7.8e-4 after 25 s, where ssbroyden has 2.6e-2 and 3.1e-3. With 5,400 numbers a step takes 12 s and gains
no more than ssbroyden in that time.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor

from tasks.optimizers.quasi_newton import DENSE_LIMIT
from zoo.errors import ConfigError


class LeastSquares(Protocol):
    """A sum of squares f . f of the parameters."""

    def loss(self) -> float: ...

    def normal(self) -> tuple[Tensor, Tensor, float]:
        """Lower triangle of J^T J [P, P], J^T f [P], and f . f."""
        ...


class GaussNewton(torch.optim.Optimizer):
    """One accepted step per `step()`; the points of the objective may differ from step to step.

    Args:
        params: All parameters, in float64.
        system: Gives the normal equations at the parameters as they are.
        damping: First factor on the scaling.
        trials: Solutions with ever more damping before a step is given up.
        tolerance: Relative decrease below which a step counts as stalled.
        patience: Stalled steps before the end.

    Attributes:
        exit_reason: None while running; else why it ended.
        loss: Sum of squares where the last step ended.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        system: LeastSquares,
        damping: float = 1e-4,
        trials: int = 8,
        tolerance: float = 1e-9,
        patience: int = 5,
    ) -> None:
        super().__init__(params, {"lr": 1.0})
        self._params = self.param_groups[0]["params"]
        size = sum(p.numel() for p in self._params)
        if size > DENSE_LIMIT:
            raise ConfigError(
                f"gauss_newton solves with a {size} x {size} matrix; up to {DENSE_LIMIT} parameters are allowed: use "
                "second=lbfgs or a smaller model"
            )
        self.system, self.trials, self.tolerance, self.patience = system, trials, tolerance, patience
        self.damping = damping
        self.exit_reason: str | None = None
        self.loss = torch.zeros((), dtype=torch.float64)

    def refresh(self) -> None:
        """Go on with other points: nothing is kept that depends on them."""
        self.exit_reason = None

    @torch.no_grad()
    def step(self, closure: object = None) -> Tensor:
        """Solve, try, and damp more until the sum of squares falls; `closure` is not needed."""
        state = self.state[self._params[0]]
        if not state:
            state.update(damping=torch.tensor(self.damping), stalled=0)
        matrix, slope, before = self.system.normal()
        self.loss = torch.tensor(before, dtype=torch.float64)
        if before != before or not torch.isfinite(slope).all():
            self.exit_reason = "loss or gradient is not finite at the start"
            return self.loss
        diagonal = matrix.diagonal().clone()
        scale = torch.full_like(diagonal, float(diagonal.max()))
        damping, growth = float(state["damping"]), 2.0
        start = [p.clone() for p in self._params]
        for _ in range(self.trials):
            matrix.diagonal().copy_(diagonal + damping * scale)
            move = _solve(matrix, -slope)
            after = float("nan")
            if move is not None:
                self._set(start, move)
                after = self.system.loss()
            if after < before:
                # What the linear model promises: s . (damping * scale * s - J^T f).
                promised = float(move @ (damping * scale * move - slope))
                ratio = (before - after) / max(promised, 1e-300)
                state["damping"] = torch.tensor(max(damping * max(1 / 3, 1 - (2 * ratio - 1) ** 3), 1e-15))
                stalled = (before - after) / before < self.tolerance
                state["stalled"] = int(state["stalled"]) + 1 if stalled else 0
                if state["stalled"] >= self.patience:
                    self.exit_reason = f"{self.patience} steps gained less than {self.tolerance}"
                self.loss = torch.tensor(after, dtype=torch.float64)
                return self.loss
            damping, growth = damping * growth, growth * 2
        self._set(start, torch.zeros_like(slope))
        state["damping"] = torch.tensor(damping)
        self.exit_reason = (
            f"{self.trials} dampings up to {damping:.1e} lowered nothing: round-off, or a minimum"
        )
        return self.loss

    def _set(self, start: list[Tensor], move: Tensor) -> None:
        parts = move.split([p.numel() for p in start])
        for p, origin, part in zip(self._params, start, parts, strict=True):
            p.copy_(origin + part.view_as(p))


def _solve(matrix: Tensor, right: Tensor) -> Tensor | None:
    """Solution of a symmetric positive system given by its lower triangle; None where it is not positive."""
    factor, info = torch.linalg.cholesky_ex(matrix)
    return None if int(info) else torch.cholesky_solve(right[:, None], factor)[:, 0]


def add_gram(total: Tensor, rows: Tensor, block: int = 1024) -> None:
    """Add rows^T rows to the lower triangle of `total` [P, P], block column by block column; what is above it is left."""
    for start in range(0, len(total), block):
        stop = min(start + block, len(total))
        total[start:, start:stop].addmm_(rows[:, start:].T, rows[:, start:stop])
