"""Muon: the momentum of each weight matrix, made orthogonal, is its step; AdamW moves everything else.

Source: Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024. The step's size follows AdamW's, after
Liu et al., arXiv:2502.16982, so that one learning rate serves both. Differs from torch.optim.Muon in: one optimiser for both kinds
of parameters, all matrices of a shape at once, and float32 iterations outside of GPUs.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

# Quintic whose iteration pulls singular values from (0, 1] to near 1, steepest at 0.
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)


class Muon(torch.optim.AdamW):
    """AdamW whose groups with ``"orthogonal": True`` take Muon's step instead.

    Args:
        params: Parameter groups; those marked orthogonal hold matrices alone.
        momentum: Of the orthogonal groups, [0, 1).
        iterations: Of the orthogonalisation.
        common: AdamW's options; `lr` and `weight_decay` hold for both kinds.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        *,
        momentum: float = 0.95,
        iterations: int = 5,
        **common: Any,
    ) -> None:
        super().__init__([{"orthogonal": False, **group} for group in params], **common)
        self.momentum, self.iterations = momentum, iterations

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of all groups."""
        every = self.param_groups
        self.param_groups = [g for g in every if not g["orthogonal"]]
        try:
            loss = super().step(closure)
        finally:
            self.param_groups = every
        for group in every:
            if group["orthogonal"]:
                self._step_matrices(group)
        return loss

    def _step_matrices(self, group: dict[str, Any]) -> None:
        shapes: dict[tuple[int, ...], list[tuple[Tensor, Tensor]]] = defaultdict(list)
        for p in group["params"]:
            if p.grad is None:
                continue
            state = self.state[p]
            if not state:
                # AdamW looks for a step count in every loaded state.
                state["step"], state["momentum"] = torch.zeros(()), torch.zeros_like(p)
            state["step"] += 1
            average = state["momentum"].lerp_(p.grad, 1 - self.momentum)
            ahead = p.grad.lerp(average, self.momentum)  # Nesterov
            wide = p.shape[0] <= p.shape[1]
            shapes[tuple(sorted(p.shape))].append((p if wide else p.T, ahead if wide else ahead.T))
        for (_, longer), pairs in shapes.items():
            steps = orthogonalise(torch.stack([ahead for _, ahead in pairs]), self.iterations)
            size = 0.2 * longer**0.5  # root mean square of AdamW's usual step
            for (p, _), step in zip(pairs, steps, strict=True):
                p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(step, alpha=group["lr"] * size)


def orthogonalise(x: Tensor, iterations: int = 5) -> Tensor:
    """Matrices with the singular vectors of `x` and singular values of roughly 1 (0.7 .. 1.2), [K, M, N] with M <= N."""
    a, b, c = _COEFFICIENTS
    kind = x.dtype
    x = x.to(torch.bfloat16 if x.is_cuda else torch.float32)
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
    for _ in range(iterations):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x.to(kind)
