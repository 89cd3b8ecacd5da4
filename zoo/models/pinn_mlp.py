"""Plain and modified multilayer perceptrons: the control beside every attention PINN.

The modified form gates every layer between two encodings of the input, h <- a * u + (1 - a) * v with a = act(W h).
Source: Wang, Teng, Perdikaris, "Understanding and mitigating gradient flow pathologies", arXiv:2001.04536.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from zoo.attention.slots import AttentionFactory, Slot
from zoo.errors import ConfigError
from zoo.layers.pointwise import PointNetwork, activation, init_linear
from zoo.models.registry import register_model


@register_model
class PinnMlp(PointNetwork):
    """Points [N, d] -> fields [N, F] without attention.

    Args:
        attention: Unused; the model has no slots.
        dim: Width C.
        depth: Hidden layers, >= 1.
        act: tanh, sin, wavelet, gelu or silu.
        modified: Gate the layers between two encodings of the input.
        lower, upper, fields, periods, harmonics, mixed, fourier, fourier_scale, ansatz, ansatz_options: `PointNetwork`.
    """

    def __init__(
        self,
        attention: Mapping[str, AttentionFactory],
        *,
        dim: int = 32,
        depth: int = 4,
        act: str = "tanh",
        modified: bool = False,
        lower: Sequence[float] = (-1.0, 0.0),
        upper: Sequence[float] = (1.0, 1.0),
        fields: int = 1,
        periods: Sequence[float | None] | None = None,
        harmonics: int = 1,
        mixed: int = 0,
        fourier: int = 0,
        fourier_scale: float = 1.0,
        ansatz: str = "none",
        ansatz_options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(
            lower=lower,
            upper=upper,
            fields=fields,
            periods=periods,
            harmonics=harmonics,
            mixed=mixed,
            fourier=fourier,
            fourier_scale=fourier_scale,
            ansatz=ansatz,
            ansatz_options=ansatz_options,
        )
        if depth < 1:
            raise ConfigError(f"depth={depth} must be at least 1")
        width = self.features.width
        self.layers = nn.ModuleList(nn.Linear(dim if n else width, dim) for n in range(depth))
        self.acts = nn.ModuleList(activation(act) for _ in range(depth))
        self.modified = modified
        if modified:
            self.encode = nn.ModuleList(nn.Linear(width, dim) for _ in range(2))
            self.encode_acts = nn.ModuleList(activation(act) for _ in range(2))
        self.head = nn.Linear(dim, fields)
        init_linear(self, bias=0.0)

    @classmethod
    def slots(cls, **options: Any) -> dict[str, Slot]:
        """None: there is no attention here."""
        return {}

    def raw(self, points: Tensor) -> Tensor:
        h = x = self.features(points)
        if self.modified:
            u, v = (act(layer(x)) for act, layer in zip(self.encode_acts, self.encode, strict=True))
        for layer, act in zip(self.layers, self.acts, strict=True):
            h = act(layer(h))
            if self.modified:
                h = v + h * (u - v)
        return self.head(h)
