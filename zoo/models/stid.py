"""STID: an MLP on each sensor's history beside tables for sensor, time of day and day of the week. No attention.

Paper: "Spatial-Temporal Identity: A Simple yet Effective Baseline for Multivariate Time Series Forecasting",
arXiv:2208.05233, CIKM 2022. Official code: zezhishao/STID. The control that every attention over sensors has to beat.
Differs from it in: earlier looks and the weekly profile may enter (`residual`, the data's lags).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from zoo.attention.slots import Slot
from zoo.errors import ConfigError
from zoo.layers.mlp import Mlp
from zoo.layers.traffic import CalendarEmbedding, SensorScaler
from zoo.models.registry import register_model


@register_model
class Stid(nn.Module):
    """Each sensor by itself; what it shares with the others are the weights.

    Args:
        attention: Unused; there is no slot.
        num_sensors: N.
        slots_per_day: S.
        history_steps: P.
        horizon_steps: Q.
        lag_steps: Distance in steps of each earlier look that the data give.
        residual: See `SensorScaler`; false as in the paper.
        embed_dim: Width of the embedded history and of each table.
        depth: Residual MLPs.
        dropout: Dropout inside them; 0.15 in the official code.
    """

    name: ClassVar[str]

    def __init__(
        self,
        attention: Any = None,
        *,
        num_sensors: int = 21,
        slots_per_day: int = 24,
        history_steps: int = 12,
        horizon_steps: int = 12,
        lag_steps: Sequence[int] = (),
        residual: bool = True,
        embed_dim: int = 32,
        depth: int = 3,
        dropout: float = 0.15,
    ) -> None:
        super().__init__()
        if embed_dim < 1 or depth < 1:
            raise ConfigError(f"embed_dim={embed_dim} and depth={depth} must be at least 1")
        self.scaler = SensorScaler(
            num_sensors=num_sensors,
            slots_per_day=slots_per_day,
            history_steps=history_steps,
            horizon_steps=horizon_steps,
            lag_steps=lag_steps,
            residual=residual,
        )
        self.history_steps = history_steps
        self.history = nn.Linear(history_steps * self.scaler.history_features, embed_dim)
        looks = self.scaler.known_features if len(lag_steps) else 0
        self.known = nn.Linear(horizon_steps * looks, embed_dim) if looks else None
        self.sensors = nn.Parameter(torch.empty(num_sensors, embed_dim))
        self.calendar = CalendarEmbedding(slots_per_day, embed_dim, embed_dim)
        dim = embed_dim * (5 if looks else 4)
        self.blocks = nn.ModuleList(Mlp(dim, dim, activation="relu", dropout=dropout) for _ in range(depth))
        self.head = nn.Linear(dim, horizon_steps)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier for the sensors' table, as in the official code; a small head where residuals are forecast."""
        nn.init.xavier_uniform_(self.sensors)
        if self.scaler.residual:
            nn.init.normal_(self.head.weight, std=0.01)
            nn.init.zeros_(self.head.bias)

    @classmethod
    def slots(cls, **options: Any) -> dict[str, Slot]:
        return {}

    def no_weight_decay(self) -> set[str]:
        """The table of sensors, like other embeddings."""
        return {"sensors"}

    def forward(
        self,
        history: Tensor,
        history_seen: Tensor,
        clock: Tensor,
        known: Tensor | None = None,
        known_seen: Tensor | None = None,
    ) -> Tensor:
        """Forecast [B, Q, N]; arguments as in `Staeformer.forward`."""
        slots = self.scaler.slots(clock)
        past, future = slots[:, : self.history_steps], slots[:, self.history_steps :]
        x = self.scaler.history(history, history_seen, past).transpose(1, 2).flatten(2)
        parts = [self.history(x)]
        shape = (*x.shape[:2], -1)
        if self.known is not None:
            if known is None:
                raise ConfigError("the model was built with lag_steps and needs known and known_seen")
            parts.append(self.known(self.scaler.known(known, known_seen, future).transpose(1, 2).flatten(2)))
        parts.append(self.sensors.expand(shape))
        parts.append(self.calendar(past[:, -1:]).expand(shape))
        h = torch.cat(parts, dim=-1)
        for block in self.blocks:
            h = h + block(h)
        return self.scaler.forecast(self.head(h).transpose(1, 2), future)
