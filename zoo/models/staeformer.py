"""STAEformer: attention over time, then over sensors, on tokens with a learned table for each sensor and step.

Paper: "STAEformer: Spatio-Temporal Adaptive Embedding Makes Vanilla Transformer SOTA for Traffic Forecasting",
arXiv:2308.10425, CIKM 2023. Official code: XDZhelheim/STAEformer.
Size `paper` follows it. Differs from it in: missing readings are zero features with a flag; several steps may form one
token (`patch_steps`); earlier looks and the weekly profile may enter (`residual`, the data's lags); the graph may bias
or mask the attention over sensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from zoo.attention.base import Pattern
from zoo.attention.slots import AttentionFactory, Slot
from zoo.errors import ConfigError, unknown
from zoo.layers.blocks import TransformerBlock
from zoo.layers.traffic import CalendarEmbedding, GraphBias, SensorScaler, StepHead
from zoo.models.registry import register_model


@register_model
class Staeformer(nn.Module):
    """Tokens [B, T, N, C], T = P / patch_steps; one linear head per sensor forecasts all steps at once.

    Arguments left out take the value of `size`.

    Args:
        attention: Factories for slots "spatial" and, with `temporal_depth`, "temporal".
        size: "micro" (some twenty sensors on a CPU) or "paper".
        num_sensors: N.
        slots_per_day: S.
        history_steps: P.
        horizon_steps: Q.
        lag_steps: Distance in steps of each earlier look that the data give.
        residual: See `SensorScaler`.
        patch_steps: Neighbouring steps that form one token; divides P.
        value_dim: Width of the embedded readings of a token.
        known_dim: Width of the embedded earlier looks; 0 leaves them out.
        step_dim: Hidden width of a head that reads the looks, where there are any, at each forecast step again; 0 for none.
        day_dim: Width of the time-of-day table.
        weekday_dim: Width of the day-of-week table.
        week_dim: Width of the slot-of-week table; 0 for none.
        adaptive_dim: Width of the table of each token place and sensor.
        temporal_depth: Blocks over time.
        spatial_depth: Blocks over sensors.
        num_heads: Heads; must divide the sum of the widths.
        mlp_dim: Hidden width of the blocks' MLPs.
        activation: Of the MLPs.
        norm: "post" as in the paper, or "pre".
        dropout: Dropout in the blocks.
        graph: "none", "bias" (log weights with a learned factor) or "mask" (neighbours alone) over sensors.
        mask_dead: Sensors without a reading in the window are no keys for others.
    """

    name: ClassVar[str]
    sizes: ClassVar[dict[str, dict[str, Any]]] = {
        "micro": {
            "residual": True,
            "patch_steps": 12,
            "value_dim": 32,
            "known_dim": 32,
            "step_dim": 0,
            "day_dim": 0,
            "weekday_dim": 0,
            "week_dim": 16,
            "adaptive_dim": 16,
            "temporal_depth": 0,
            "spatial_depth": 3,
            "num_heads": 4,
            "mlp_dim": 192,
            "activation": "gelu",
            "norm": "pre",
            "dropout": 0.1,
        },
        "paper": {
            "residual": False,
            "patch_steps": 1,
            "value_dim": 24,
            "known_dim": 0,
            "step_dim": 0,
            "day_dim": 24,
            "weekday_dim": 24,
            "week_dim": 0,
            "adaptive_dim": 80,
            "temporal_depth": 3,
            "spatial_depth": 3,
            "num_heads": 4,
            "mlp_dim": 256,
            "activation": "relu",
            "norm": "post",
            "dropout": 0.1,
        },
    }

    def __init__(
        self,
        attention: Mapping[str, AttentionFactory],
        *,
        size: str = "micro",
        num_sensors: int = 21,
        slots_per_day: int = 24,
        history_steps: int = 12,
        horizon_steps: int = 12,
        lag_steps: Sequence[int] = (),
        residual: bool | None = None,
        patch_steps: int | None = None,
        value_dim: int | None = None,
        known_dim: int | None = None,
        step_dim: int | None = None,
        day_dim: int | None = None,
        weekday_dim: int | None = None,
        week_dim: int | None = None,
        adaptive_dim: int | None = None,
        temporal_depth: int | None = None,
        spatial_depth: int | None = None,
        num_heads: int | None = None,
        mlp_dim: int | None = None,
        activation: str | None = None,
        norm: str | None = None,
        dropout: float | None = None,
        graph: str = "none",
        mask_dead: bool = False,
    ) -> None:
        super().__init__()
        o = _resolve(size, {k: v for k, v in locals().items() if k in self.sizes["micro"]})
        if o["patch_steps"] < 1 or history_steps % o["patch_steps"]:
            raise ConfigError(
                f"patch_steps={o['patch_steps']} must divide history_steps={history_steps}; change one of them"
            )
        self.scaler = SensorScaler(
            num_sensors=num_sensors,
            slots_per_day=slots_per_day,
            history_steps=history_steps,
            horizon_steps=horizon_steps,
            lag_steps=lag_steps,
            residual=o["residual"],
        )
        self.patch, self.tokens = o["patch_steps"], history_steps // o["patch_steps"]
        self.history_steps, self.mask_dead = history_steps, mask_dead
        self.value = nn.Linear(self.patch * self.scaler.history_features, o["value_dim"])
        known_dim = o["known_dim"] if self.scaler.known_features and len(lag_steps) else 0
        self.known = nn.Linear(horizon_steps * self.scaler.known_features, known_dim) if known_dim else None
        self.calendar = CalendarEmbedding(slots_per_day, o["day_dim"], o["weekday_dim"], o["week_dim"])
        self.adaptive = nn.Parameter(torch.empty(self.tokens, num_sensors, o["adaptive_dim"]))
        dim = o["value_dim"] + known_dim + self.calendar.dim + o["adaptive_dim"]
        if dim % o["num_heads"]:
            raise ConfigError(
                f"num_heads={o['num_heads']} must divide the token width {dim} = value_dim + known_dim + day_dim + "
                "weekday_dim + week_dim + adaptive_dim; change one of them"
            )
        self.dim = dim
        self.graph = GraphBias(num_sensors, o["num_heads"], graph)
        common = {
            "mlp_ratio": o["mlp_dim"] / dim,
            "activation": o["activation"],
            "norm": o["norm"],
            "dropout": o["dropout"],
        }
        self.temporal = nn.ModuleList(
            TransformerBlock(attention["temporal"], dim, o["num_heads"], length=self.tokens, **common)
            for _ in range(o["temporal_depth"])
        )
        self.spatial = nn.ModuleList(
            TransformerBlock(attention["spatial"], dim, o["num_heads"], length=num_sensors, **common)
            for _ in range(o["spatial_depth"])
        )
        self.norm = nn.LayerNorm(dim) if o["norm"] == "pre" else nn.Identity()
        self.head = nn.Linear(self.tokens * dim, horizon_steps)
        self.step_head = None
        if known_dim and o["step_dim"]:
            width = self.tokens * dim
            self.step_head = StepHead(width, self.scaler.known_features, o["step_dim"], horizon_steps)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier for the adaptive table, as in the official code; a small head where residuals are forecast."""
        nn.init.xavier_uniform_(self.adaptive)
        if self.scaler.residual:
            nn.init.normal_(self.head.weight, std=0.01)
            nn.init.zeros_(self.head.bias)

    @classmethod
    def slots(cls, **options: Any) -> dict[str, Slot]:
        o = _resolve(options.get("size") or "micro", options)
        slots = {}
        if o["spatial_depth"]:
            slots["spatial"] = Slot(
                Pattern.SELF,
                key_mask=bool(options.get("mask_dead")),
                bias="full" if options.get("graph", "none") != "none" else None,
                ordered=False,
                length_known=True,
            )
        if o["temporal_depth"]:
            slots["temporal"] = Slot(Pattern.SELF, length_known=True)
        return slots

    def no_weight_decay(self) -> set[str]:
        """The table of places and sensors, like other embeddings."""
        return {"adaptive"}

    def embed(self, history: Tensor, history_seen: Tensor, past: Tensor, looks: Tensor | None) -> Tensor:
        """Tokens [B, T, N, C]; slots of the history [B, P], features of the earlier looks [B, Q, N, G]."""
        x = self.scaler.history(history, history_seen, past)  # [B, P, N, F]
        batch, _, sensors, _ = x.shape
        x = x.unflatten(1, (self.tokens, self.patch)).transpose(2, 3).flatten(3)
        parts = [self.value(x)]
        shape = (batch, self.tokens, sensors, -1)
        if looks is not None:
            parts.append(self.known(looks.transpose(1, 2).flatten(2))[:, None].expand(shape))
        last = past[:, self.patch - 1 :: self.patch]
        parts.append(self.calendar(last)[:, :, None].expand(shape))
        parts.append(self.adaptive.expand(batch, -1, -1, -1))
        return torch.cat(parts, dim=-1)

    def forward(
        self,
        history: Tensor,
        history_seen: Tensor,
        clock: Tensor,
        known: Tensor | None = None,
        known_seen: Tensor | None = None,
    ) -> Tensor:
        """Forecast.

        Args:
            history: Readings, [B, P, N]; 0 where missing.
            history_seen: bool [B, P, N].
            clock: Slot of the week of the first step, int64 [B].
            known: Earlier looks at the forecast hours, [B, L, Q, N].
            known_seen: bool [B, L, Q, N].

        Returns:
            Readings, [B, Q, N].
        """
        slots = self.scaler.slots(clock)
        past, future = slots[:, : self.history_steps], slots[:, self.history_steps :]
        looks = None
        if self.known is not None:
            if known is None:
                raise ConfigError("the model was built with lag_steps and needs known and known_seen")
            looks = self.scaler.known(known, known_seen, future)
        x = self.embed(history, history_seen, past, looks)
        batch, tokens, sensors, dim = x.shape
        if self.temporal:
            x = x.transpose(1, 2).reshape(batch * sensors, tokens, dim)
            for block in self.temporal:
                x = block(x)
            x = x.reshape(batch, sensors, tokens, dim).transpose(1, 2)
        x = x.reshape(batch * tokens, sensors, dim)
        key_mask = None
        if self.mask_dead:
            alive = history_seen.any(dim=1)
            key_mask = alive[:, None].expand(batch, tokens, sensors).reshape(batch * tokens, sensors)
        bias = self.graph()
        for block in self.spatial:
            x = block(x, key_mask=key_mask, bias=bias)
        x = self.norm(x).reshape(batch, tokens, sensors, dim)
        x = x.transpose(1, 2).flatten(2)
        z = self.head(x).transpose(1, 2)
        if self.step_head is not None:
            z = z + self.step_head(x, looks)
        return self.scaler.forecast(z, future)


def _resolve(size: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a size with the given ones on top."""
    if size not in Staeformer.sizes:
        raise unknown("size of model 'staeformer':", size, Staeformer.sizes)
    preset = Staeformer.sizes[size]
    o = {**preset, **{k: v for k, v in options.items() if k in preset and v is not None}}
    if o["norm"] not in ("pre", "post"):
        raise unknown("norm placement", str(o["norm"]), ("pre", "post"))
    if o["temporal_depth"] + o["spatial_depth"] < 1:
        raise ConfigError("temporal_depth and spatial_depth are both 0; the model would have no block")
    return o
