"""SOAP: Adam in the slowly rotating eigenbasis of Shampoo's preconditioner.

Paper: Vyas et al., arXiv:2409.11321; for PINNs: Wang et al., arXiv:2502.00604.
Differs from the paper in: vectors use plain Adam; the basis is refreshed by one QR step every `every` steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from zoo.errors import ConfigError


class Soap(torch.optim.Optimizer):
    """SOAP without weight decay.

    Args:
        params: Parameters of one or two axes.
        lr: Step size, > 0.
        betas: Decays of the first moment, and of second moment and preconditioners.
        eps: Added to the root of the second moment.
        every: Steps between refreshes of the basis, >= 1.
        max_dim: Longer axes are not rotated.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 3e-3,
        betas: tuple[float, float] = (0.95, 0.99),
        eps: float = 1e-8,
        every: int = 10,
        max_dim: int = 512,
    ) -> None:
        if lr <= 0 or every < 1:
            raise ConfigError(f"SOAP needs lr > 0 and every >= 1, got lr={lr}, every={every}")
        super().__init__(
            params, {"lr": lr, "betas": tuple(betas), "eps": eps, "every": every, "max_dim": max_dim}
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; the first one only fills the preconditioners."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, group)
        return loss

    def _update(self, p: Tensor, group: dict[str, Any]) -> None:
        g, state, (b1, b2) = p.grad, self.state[p], group["betas"]
        first = not state
        if first:
            state["step"] = torch.zeros(())
            state["mean"], state["square"] = torch.zeros_like(p), torch.zeros_like(p)
            rotated = [n for n, size in enumerate(p.shape) if p.dim() == 2 and 1 < size <= group["max_dim"]]
            for n in rotated:
                state[f"gram{n}"] = torch.zeros(p.shape[n], p.shape[n], dtype=p.dtype, device=p.device)
        grams = [n for n in (0, 1) if f"gram{n}" in state]
        if first:
            for n in grams:
                state[f"gram{n}"].lerp_(self._gram(g, n), 1 - b2)
                state[f"basis{n}"] = torch.linalg.eigh(state[f"gram{n}"].double())[1].flip(1).to(p.dtype)
            if grams:
                return
        state["step"] += 1
        t = int(state["step"])
        turned = self._rotate(g, state, grams)
        state["mean"].lerp_(g, 1 - b1)
        state["square"].lerp_(turned.square(), 1 - b2)
        mean = self._rotate(state["mean"], state, grams)
        scale = (1 - b2**t) ** 0.5 / (1 - b1**t)
        direction = mean / (state["square"].sqrt() + group["eps"])
        p.sub_(self._rotate(direction, state, grams, back=True), alpha=group["lr"] * scale)
        for n in grams:
            state[f"gram{n}"].lerp_(self._gram(g, n), 1 - b2)
        if grams and t % group["every"] == 0:
            self._refresh(state, grams)

    @staticmethod
    def _gram(g: Tensor, axis: int) -> Tensor:
        return g @ g.T if axis == 0 else g.T @ g

    @staticmethod
    def _rotate(x: Tensor, state: dict[str, Tensor], grams: list[int], back: bool = False) -> Tensor:
        for n in grams:
            q = state[f"basis{n}"]
            if n == 0:
                x = q @ x if back else q.T @ x
            else:
                x = x @ q.T if back else x @ q
        return x

    @staticmethod
    def _refresh(state: dict[str, Tensor], grams: list[int]) -> None:
        """One step of orthogonal iteration, eigenvectors kept in descending order of their estimated values."""
        for n in grams:
            q, gram = state[f"basis{n}"], state[f"gram{n}"]
            order = torch.einsum("ij,ij->j", q, gram @ q).argsort(descending=True)
            state["square"] = state["square"].index_select(n, order)
            state[f"basis{n}"] = torch.linalg.qr(gram @ q[:, order])[0]
