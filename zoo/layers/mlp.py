"""The position-wise network of a transformer block, plain or gated."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from zoo.errors import ConfigError, unknown
from zoo.layers.drop import dropout_or_none

_PLAIN: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "relu": F.relu,
    "silu": F.silu,
    "tanh": F.tanh,
}
_GATED: dict[str, Callable[[Tensor], Tensor]] = {
    "swiglu": F.silu,
    "geglu": F.gelu,
    "reglu": F.relu,
}
ACTIVATIONS = (*_PLAIN, *_GATED)


class Mlp(nn.Module):
    """Two linear layers with an activation between them.

    Gated activations (swiglu, geglu, reglu) make the first layer twice as wide and multiply its activated first
    half by its second: `fc2(act(a) * b)`.

    Args:
        dim: Width of the input.
        hidden: Width between the layers.
        out_dim: Width of the output; `dim` when left out.
        activation: One of `ACTIVATIONS`.
        dropout: Dropout probability after each layer.
        bias: Whether the layers have a bias.

    Source of the gated forms: Shazeer, "GLU variants improve transformer", arXiv:2002.05202.
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        *,
        out_dim: int | None = None,
        activation: str = "gelu",
        dropout: float = 0.0,
        bias: bool = True,
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise unknown("activation", activation, ACTIVATIONS)
        if hidden < 1:
            raise ConfigError(f"hidden width {hidden} of the MLP must be at least 1; raise mlp_ratio")
        self.activation, self.gated = activation, activation in _GATED
        self._act = _GATED[activation] if self.gated else _PLAIN[activation]
        self.fc1 = nn.Linear(dim, 2 * hidden if self.gated else hidden, bias=bias)
        self.drop1 = dropout_or_none(dropout)
        self.fc2 = nn.Linear(hidden, out_dim or dim, bias=bias)
        self.drop2 = dropout_or_none(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """[..., dim] -> [..., out_dim]."""
        x = self.fc1(x)
        if self.gated:
            a, b = x.chunk(2, dim=-1)
            x = self._act(a) * b
        else:
            x = self._act(x)
        return self.drop2(self.fc2(self.drop1(x)))

    def extra_repr(self) -> str:
        return f"activation={self.activation}"
