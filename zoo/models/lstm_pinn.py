"""LSTM-PINN: depth as the recurrence axis of one LSTM cell.

Paper: arXiv:2604.14201 (electrothermal flow); no code known, wiring inferred and sizes ours: at every depth l
(h, c) <- LSTMCell(z(x), (h, c)) with the embedded coordinates z and one shared cell, then a linear read-out of h. The cell
is written out, because fused recurrent kernels on GPUs have no second derivative.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from zoo.attention.slots import AttentionFactory, Slot
from zoo.errors import ConfigError
from zoo.layers.pointwise import PointNetwork, init_linear
from zoo.models.registry import register_model


@register_model
class LstmPinn(PointNetwork):
    """Points [N, d] -> fields [N, F] without attention.

    Args:
        attention: Unused; the model has no slots.
        dim: Width C of state and memory.
        depth: Steps of the recurrence, >= 1.
        lower, upper, fields, periods, harmonics, mixed, fourier, fourier_scale, ansatz, ansatz_options: `PointNetwork`.
    """

    def __init__(
        self,
        attention: Mapping[str, AttentionFactory],
        *,
        dim: int = 32,
        depth: int = 4,
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
        self.depth = depth
        self.embed = nn.Linear(self.features.width, dim)
        self.inputs = nn.Linear(dim, 4 * dim)
        self.recurrent = nn.Linear(dim, 4 * dim, bias=False)
        self.head = nn.Linear(dim, fields)
        init_linear(self)

    @classmethod
    def slots(cls, **options: Any) -> dict[str, Slot]:
        """None: there is no attention here."""
        return {}

    def raw(self, points: Tensor) -> Tensor:
        driven = self.inputs(torch.tanh(self.embed(self.features(points))))
        h = c = None
        for _ in range(self.depth):
            gates = driven if h is None else driven + self.recurrent(h)
            enter, keep, new, out = gates.chunk(4, dim=-1)
            added = torch.sigmoid(enter) * torch.tanh(new)
            c = added if c is None else torch.sigmoid(keep) * c + added
            h = torch.sigmoid(out) * torch.tanh(c)
        return self.head(h)
