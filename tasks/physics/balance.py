"""Weights of the loss terms.

`fixed` keeps them; `grad_norm` equalises gradient norms (Wang et al., arXiv:2001.04536, with EMA); `max_mean` divides the
residual gradient's maximum by each term's mean; `ntk` uses traces of the tangent kernel (Wang, Yu, Perdikaris,
arXiv:2007.14527), estimated with random signs: E |grad sum_n s_n r_n|^2 = sum_n |grad r_n|^2; `relobralo` compares each
term with its past (Bischof, Kraus, arXiv:2110.09813). PhysicsFormer's exact dynamics-weighted formula is not public; its
loss here is `grad_norm`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from zoo.errors import ConfigError, unknown

SCHEMES = ("fixed", "grad_norm", "max_mean", "ntk", "relobralo")


class Balance(nn.Module):
    """One weight per term, part of the checkpoint.

    Args:
        terms: Names; "residual" is the anchor of `max_mean`.
        scheme: One of `SCHEMES`.
        every: Steps between updates.
        momentum: Weight of the past in the running means.
        start: First weights by name; 1 where left out.
        temperature: Of relobralo's softmax, > 0.
    """

    def __init__(
        self,
        terms: list[str],
        scheme: str = "grad_norm",
        every: int = 100,
        momentum: float = 0.9,
        start: dict[str, float] | None = None,
        temperature: float = 0.1,
    ) -> None:
        super().__init__()
        if scheme not in SCHEMES:
            raise unknown("balancing scheme", scheme, SCHEMES)
        for name in start or {}:
            if name not in terms:
                raise unknown("loss term in task.weights:", name, terms)
        if every < 1 or not 0 <= momentum < 1 or temperature <= 0:
            raise ConfigError(
                f"balance needs every >= 1, momentum in [0, 1) and temperature > 0, got {every}, {momentum}, {temperature}"
            )
        self.terms, self.scheme, self.every, self.momentum, self.temperature = (
            terms,
            scheme,
            every,
            momentum,
            temperature,
        )
        self.register_buffer(
            "weights", torch.tensor([float((start or {}).get(t, 1.0)) for t in terms], dtype=torch.float64)
        )
        self.register_buffer("first", torch.zeros(len(terms), dtype=torch.float64))
        self.register_buffer("last", torch.zeros(len(terms), dtype=torch.float64))

    def __getitem__(self, term: str) -> Tensor:
        return self.weights[self.terms.index(term)]

    def __len__(self) -> int:
        return len(self.terms)

    def items(self) -> list[tuple[str, Tensor]]:
        """Terms and their weights."""
        return list(zip(self.terms, self.weights, strict=True))

    def due(self, step: int) -> bool:
        """Whether this step updates the weights."""
        return self.scheme != "fixed" and len(self.terms) > 1 and step % self.every == 0

    def update(
        self, gradients: Callable[[str], Tensor], kernel: Callable[[str], Tensor], losses: Tensor
    ) -> None:
        """New weights.

        Args:
            gradients: Flat gradient of a term in the weights.
            kernel: Trace of a term's tangent kernel.
            losses: Values of all terms, [T].
        """
        if self.scheme == "relobralo":
            self._relobralo(losses.double())
            return
        if self.scheme == "ntk":
            trace = torch.stack([kernel(t) for t in self.terms]).double()
            new = trace.sum() / trace.clamp_min(1e-30)
            new = new / new.min()
        else:
            grads = [gradients(t) for t in self.terms]
            if self.scheme == "grad_norm":
                norms = torch.stack([g.norm() for g in grads]).double()
                new = norms.sum() / norms.clamp_min(1e-30)
                new = new / new.min()
            else:
                anchor = self.terms.index("residual") if "residual" in self.terms else 0
                top = grads[anchor].abs().max().double()
                new = torch.stack([top / g.abs().mean().double().clamp_min(1e-30) for g in grads])
                new[anchor] = 1.0
        if torch.isfinite(new).all():
            self.weights.lerp_(new.clamp(max=1e6), 1 - self.momentum)

    def _relobralo(self, losses: Tensor) -> None:
        if not self.first.any():
            self.first.copy_(losses)
            self.last.copy_(losses)
            return
        count = len(self.terms)
        recent = count * (losses / (self.temperature * self.last.clamp_min(1e-30))).softmax(0)
        overall = count * (losses / (self.temperature * self.first.clamp_min(1e-30))).softmax(0)
        history = self.momentum * self.weights + (1 - self.momentum) * overall
        self.weights.copy_(self.momentum * history + (1 - self.momentum) * recent)
        self.last.copy_(losses)
