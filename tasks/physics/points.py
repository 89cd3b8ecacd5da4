"""Collocation points of the running steps: where they are, and how much each counts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from data.sampler import generator
from zoo.errors import ConfigError


class CollocationPoints(nn.Module):
    """Points and their weights, part of the checkpoint.

    Args:
        data: Draws points; `data.problem` has the box.
        adaptive: Share of points drawn by residual at each resampling, [0, 1] (RAD, Wu et al., arXiv:2207.10289).
        pool: Candidates per adaptive point.
        power: Exponent k in the density r^k / mean(r^k) + floor.
        floor: See `power`.
        causal: epsilon of the weights exp(-epsilon * sum of earlier slabs' residuals), or several in rising order: the next
            one begins when every weight exceeds 0.99 (Wang, Sankaran, Perdikaris, arXiv:2203.07404). 0 for none.
        slabs: Time slabs of the causal weights.
        self_adaptive: Rate at which a point's weight grows with its squared residual; 0 for none.

    Attributes:
        at: Points, [N, d] float64.
        squares: Squared residual of each point at the last evaluation, [N]; empty before.
    """

    def __init__(
        self,
        data: Any,
        *,
        adaptive: float = 0.5,
        pool: int = 4,
        power: float = 1.0,
        floor: float = 1.0,
        causal: float | Sequence[float] = 0.0,
        slabs: int = 16,
        self_adaptive: float = 0.0,
    ) -> None:
        super().__init__()
        stages = [float(e) for e in (causal if isinstance(causal, Sequence) else [causal])]
        if not 0 <= adaptive <= 1 or min(pool, slabs) < 1 or min(power, floor, self_adaptive) < 0:
            raise ConfigError(
                f"need adaptive={adaptive} in [0, 1], pool={pool}, slabs={slabs} >= 1, power={power}, floor={floor}, "
                f"self_adaptive={self_adaptive} >= 0"
            )
        if not stages or min(stages) < 0 or stages != sorted(stages):
            raise ConfigError(f"task.causal={causal} must be a number >= 0 or a rising list of them")
        problem = data.problem
        if any(stages) and problem.coordinates[-1] != "t":
            raise ConfigError(
                f"task.causal needs a time coordinate, which problem {problem.name!r} does not have; set it to 0"
            )
        # Not a submodule: a plain reference.
        self.__dict__["data"] = data
        self.start, self.duration = problem.lower[-1], problem.upper[-1] - problem.lower[-1]
        self.adaptive, self.pool, self.power, self.floor = adaptive, pool, power, floor
        self.stages, self.slabs, self.self_adaptive = stages, slabs, self_adaptive
        self.squares = torch.zeros(0, dtype=torch.float64)
        self.register_buffer("at", data.draw(data.interior, 0))
        self.register_buffer("own_weight", torch.ones(len(self.at), dtype=torch.float64))
        self.register_buffer("slab_loss", torch.zeros(slabs, dtype=torch.float64))
        self.register_buffer("stage", torch.zeros((), dtype=torch.long))

    @property
    def causal(self) -> float:
        """The epsilon in force."""
        return self.stages[int(self.stage)]

    def weights(self) -> Tensor:
        """Weight of each point, [N] float64."""
        return self.own_weight * self._slab_weights()[self._slab()] if self.causal else self.own_weight

    def _slab_weights(self) -> Tensor:
        before = torch.cumsum(self.slab_loss, 0) - self.slab_loss
        return torch.exp(-self.causal * before)

    def _slab(self) -> Tensor:
        return ((self.at[:, -1] - self.start) / self.duration * self.slabs).long().clamp(0, self.slabs - 1)

    @torch.no_grad()
    def resample(self, step: int, count: int, squared_residual: Callable[[Tensor], Tensor]) -> None:
        """`count` new points (a grid has a few more), some of them where `squared_residual` [M, d] -> [M] is large."""
        fresh = self.data.draw(count, 1, step).to(self.at.device)
        chosen = int(self.adaptive * count) if step else 0
        if chosen:
            candidates = self.data.draw(self.pool * chosen, 2, step).to(self.at.device)
            size = squared_residual(candidates).double().sqrt() ** self.power
            density = size / size.mean().clamp_min(1e-30) + self.floor
            if torch.isfinite(density).all():
                index = torch.multinomial(density.cpu(), chosen, generator=generator(self.data.seed, 3, step))
                fresh[:chosen] = candidates[index.to(candidates.device)]
        self.at = fresh
        self.own_weight = torch.ones(len(fresh), dtype=torch.float64, device=fresh.device)

    @torch.no_grad()
    def learn(self) -> None:
        """Weights from the squared residuals of the last evaluation."""
        if self.self_adaptive:
            self.own_weight += self.self_adaptive * self.squares / self.squares.mean().clamp_min(1e-30)
        if self.causal:
            slab = self._slab()
            total = torch.zeros_like(self.slab_loss).index_add_(0, slab, self.squares)
            self.slab_loss.copy_(total / torch.bincount(slab, minlength=self.slabs).clamp(min=1))
            if self._slab_weights().min() > 0.99 and int(self.stage) + 1 < len(self.stages):
                self.stage += 1

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *args: Any) -> None:
        """Takes the number of points from the checkpoint: phase two may have more."""
        for name in ("at", "own_weight"):
            if prefix + name in state:
                setattr(self, name, torch.empty_like(state[prefix + name], device=self.at.device))
        super()._load_from_state_dict(state, prefix, *args)
