"""Temporal GATv2: graph attention along roads in each time segment, then attention over segments for each sensor.

After EEG-tGAT (an EEG-temporal graph attention network, of which we know the abstract alone; sizes are ours), turned to
forecasting: each sensor keeps its own vector. Whole-graph classification: `zoo.layers.graph_time.TemporalGraphClassifier`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from zoo.attention.base import Pattern
from zoo.attention.slots import AttentionFactory, Slot
from zoo.errors import ConfigError, unknown
from zoo.layers.graph import edges_of
from zoo.layers.graph_time import SegmentAttention, SegmentGat
from zoo.layers.traffic import CalendarEmbedding, SensorScaler
from zoo.models.registry import register_model


@register_model
class TemporalGatv2(nn.Module):
    """GATv2 over the adjacency's edges (torch-geometric) and a learned query over the segments.

    Args:
        attention: Factory for slot "temporal", where `temporal` is "slot".
        num_sensors: N.
        slots_per_day: S.
        history_steps: P.
        horizon_steps: Q.
        lag_steps: Distance in steps of each earlier look that the data give.
        residual: See `SensorScaler`.
        segment_steps: Steps of a segment; divides P.
        dim: Width.
        num_heads: Heads of both attentions; must divide `dim`.
        depth: GATv2 layers.
        temporal: "slot" (any cross attention with a learned query) or "additive" (v . tanh(W g)).
        temporal_dropout: Probability of removing a segment in training.
        dropout: On the attention weights of edges.
    """

    name: ClassVar[str]

    def __init__(
        self,
        attention: Mapping[str, AttentionFactory],
        *,
        num_sensors: int = 21,
        slots_per_day: int = 24,
        history_steps: int = 12,
        horizon_steps: int = 12,
        lag_steps: Sequence[int] = (),
        residual: bool = True,
        segment_steps: int = 3,
        dim: int = 64,
        num_heads: int = 4,
        depth: int = 1,
        temporal: str = "slot",
        temporal_dropout: float = 0.1,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if segment_steps < 1 or history_steps % segment_steps:
            raise ConfigError(
                f"segment_steps={segment_steps} must divide history_steps={history_steps}; change one of them"
            )
        _check(temporal)
        self.scaler = SensorScaler(
            num_sensors=num_sensors,
            slots_per_day=slots_per_day,
            history_steps=history_steps,
            horizon_steps=horizon_steps,
            lag_steps=lag_steps,
            residual=residual,
        )
        self.history_steps, self.segment = history_steps, segment_steps
        self.embed = nn.Linear(segment_steps * self.scaler.history_features, dim)
        self.sensors = nn.Parameter(torch.empty(num_sensors, dim))
        self.calendar = CalendarEmbedding(slots_per_day, 0, 0, dim)
        self.register_buffer("adjacency", torch.ones(num_sensors, num_sensors))
        self.graph = SegmentGat(dim, dim, num_heads, depth=depth, dropout=dropout)
        factory = attention["temporal"] if temporal == "slot" else None
        self.time = SegmentAttention(dim, num_heads, attention=factory, drop=temporal_dropout)
        looks = self.scaler.known_features if len(lag_steps) else 0
        self.known = nn.Linear(horizon_steps * looks, dim) if looks else None
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, horizon_steps))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Small tables; a small last layer where residuals are forecast."""
        nn.init.normal_(self.sensors, std=0.3)
        if self.scaler.residual:
            nn.init.normal_(self.head[-1].weight, std=0.01)
            nn.init.zeros_(self.head[-1].bias)

    @classmethod
    def slots(cls, **options: Any) -> dict[str, Slot]:
        if _check(options.get("temporal", "slot")) == "additive":
            return {}
        return {"temporal": Slot(Pattern.CROSS, key_mask=True)}

    def no_weight_decay(self) -> set[str]:
        """The table of sensors, like other embeddings."""
        return {"sensors"}

    def set_graph(self, adjacency: Tensor) -> None:
        """Take edge weights [N, N]; row i lists whom sensor i listens to."""
        self.adjacency.copy_(adjacency)

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
        x = self.scaler.history(history, history_seen, past)  # [B, P, N, F]
        batch, _, sensors, _ = x.shape
        x = x.unflatten(1, (-1, self.segment)).transpose(2, 3).flatten(3)
        last = past[:, self.segment - 1 :: self.segment]
        x = self.embed(x) + self.sensors + self.calendar(last)[:, :, None]
        edges = edges_of(self.adjacency)
        x = self.graph(x, edges, self.adjacency[edges[1], edges[0]])
        # Sensors of a window share the segments that are removed: a segment goes as a whole.
        keep = self.time.keep(batch, x.shape[1], x.device)
        if keep is not None:
            keep = keep.repeat_interleave(sensors, dim=0)
        h = self.time(x.transpose(1, 2).flatten(0, 1), keep).view(batch, sensors, -1)
        if self.known is not None:
            if known is None:
                raise ConfigError("the model was built with lag_steps and needs known and known_seen")
            h = h + self.known(self.scaler.known(known, known_seen, future).transpose(1, 2).flatten(2))
        z = self.head(self.norm(h)).transpose(1, 2)
        return self.scaler.forecast(z, future)


def _check(temporal: str) -> str:
    if temporal not in ("slot", "additive"):
        raise unknown("temporal", str(temporal), ("slot", "additive"))
    return temporal
