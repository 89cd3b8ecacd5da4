"""Parts that traffic models share: scaling to and from readings, calendar embeddings, the graph as a bias.

Letters: B batch, P history steps, Q steps ahead, N sensors, L earlier looks, S slots a day, W = 7 S slots a week.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.errors import ConfigError

GRAPHS = ("none", "bias", "mask", "sparse")


class SensorScaler(nn.Module):
    """Readings to features and back; its statistics are buffers and travel with the weights.

    Args:
        num_sensors: N.
        slots_per_day: S.
        history_steps: P.
        horizon_steps: Q.
        lag_steps: Distance in steps of each earlier look.
        residual: Forecast the distance from the sensor's weekly profile, in units of its usual distance; without it
            the z-score, as in the papers.
    """

    def __init__(
        self,
        *,
        num_sensors: int,
        slots_per_day: int,
        history_steps: int,
        horizon_steps: int,
        lag_steps: Sequence[int],
        residual: bool,
    ) -> None:
        super().__init__()
        for name, value in (
            ("num_sensors", num_sensors),
            ("slots_per_day", slots_per_day),
            ("history_steps", history_steps),
            ("horizon_steps", horizon_steps),
        ):
            if not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name}={value!r} must be a positive whole number")
        self.residual, self.slots_per_day, self.week = residual, slots_per_day, 7 * slots_per_day
        self.history_steps, self.horizon_steps = history_steps, horizon_steps
        self.register_buffer("mean", torch.zeros(num_sensors))
        self.register_buffer("std", torch.ones(num_sensors))
        if residual:
            self.register_buffer("spread", torch.ones(num_sensors))
            self.register_buffer("profile", torch.zeros(self.week, num_sensors))
        self.register_buffer("lags", torch.tensor(list(lag_steps), dtype=torch.long), persistent=False)
        per_cell = 3 if residual else 2  # z-score, distance from the profile, seen
        self.history_features = per_cell + 2
        self.known_features = per_cell * len(lag_steps) + (1 if residual else 0)

    def set_statistics(self, mean: Tensor, std: Tensor, profile: Tensor, spread: Tensor) -> None:
        """Take the training rows' mean [N], deviation [N], weekly profile [W, N] and deviation from it [N]."""
        self.mean.copy_(mean)
        self.std.copy_(std)
        if self.residual:
            self.profile.copy_(profile)
            self.spread.copy_(spread)

    def slots(self, clock: Tensor) -> Tensor:
        """Slot of the week of each history and forecast step, int64 [B, P + Q], from the first one's [B]."""
        steps = torch.arange(self.history_steps + self.horizon_steps, device=clock.device)
        return (clock[:, None] + steps) % self.week

    def _cells(self, values: Tensor, seen: Tensor, slots: Tensor) -> list[Tensor]:
        cells = [((values - self.mean) / self.std).masked_fill(~seen, 0.0)]
        if self.residual:
            away = (values - self.profile[slots]) / self.spread
            cells.append(away.masked_fill(~seen, 0.0))
        return [*cells, seen.to(values.dtype)]

    def history(self, values: Tensor, seen: Tensor, slots: Tensor) -> Tensor:
        """Features of the history [B, P, N, F]: scaled readings, whether seen, time of day and day of week in [0, 1).

        Args:
            values: Readings, [B, P, N].
            seen: bool [B, P, N]; values elsewhere have no influence.
            slots: Slot of the week, [B, P].
        """
        day = (slots % self.slots_per_day).to(values.dtype) / self.slots_per_day
        week = torch.div(slots, self.slots_per_day, rounding_mode="floor").to(values.dtype) / 7
        calendar = [c[..., None].expand_as(values) for c in (day, week)]
        return torch.stack((*self._cells(values, seen, slots), *calendar), dim=-1)

    def known(self, values: Tensor, seen: Tensor, slots: Tensor) -> Tensor:
        """Features of the forecast steps [B, Q, N, G]: the earlier looks and the profile.

        Args:
            values: Readings, [B, L, Q, N].
            seen: bool [B, L, Q, N].
            slots: Slot of the week of the forecast steps, [B, Q].
        """
        earlier = (slots[:, None] - self.lags[:, None]) % self.week
        cells = self._cells(values, seen, earlier)
        features = torch.stack(cells, dim=-1).permute(0, 2, 3, 1, 4).flatten(3)
        if self.residual:
            usual = (self.profile[slots] - self.mean) / self.std
            features = torch.cat((features, usual[..., None]), dim=-1)
        return features

    def forecast(self, z: Tensor, slots: Tensor) -> Tensor:
        """The network's output [B, Q, N] to readings; `slots` [B, Q]."""
        if self.residual:
            return self.profile[slots] + self.spread * z
        return self.mean + self.std * z


class CalendarEmbedding(nn.Module):
    """Learned tables for the time of day, the day of the week and, where wanted, the slot of the week.

    Args:
        slots_per_day: S.
        day_dim: Width of the time-of-day table; 0 for none.
        weekday_dim: Width of the day-of-week table; 0 for none.
        week_dim: Width of the slot-of-week table; 0 for none.
    """

    def __init__(self, slots_per_day: int, day_dim: int, weekday_dim: int, week_dim: int = 0) -> None:
        super().__init__()
        self.slots_per_day = slots_per_day
        self.day = nn.Embedding(slots_per_day, day_dim) if day_dim else None
        self.weekday = nn.Embedding(7, weekday_dim) if weekday_dim else None
        self.week = nn.Embedding(7 * slots_per_day, week_dim) if week_dim else None
        self.dim = day_dim + weekday_dim + week_dim
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for table in (self.day, self.weekday, self.week):
            if table is not None:
                nn.init.normal_(table.weight, std=0.3)

    def forward(self, slots: Tensor) -> Tensor:
        """Slots of the week [...] to [..., dim]."""
        parts = []
        if self.day is not None:
            parts.append(self.day(slots % self.slots_per_day))
        if self.weekday is not None:
            parts.append(self.weekday(torch.div(slots, self.slots_per_day, rounding_mode="floor")))
        if self.week is not None:
            parts.append(self.week(slots))
        return torch.cat(parts, dim=-1)


class GraphBias(nn.Module):
    """The adjacency as an addition to attention scores: hard mask, or log weights with a learned factor per head.

    Args:
        num_sensors: N.
        num_heads: H.
        mode: "none", "mask" (only neighbours are seen) or "bias".
        floor: Smallest weight before the logarithm in "bias" mode.
    """

    def __init__(self, num_sensors: int, num_heads: int, mode: str, *, floor: float = 1e-2) -> None:
        super().__init__()
        if mode not in ("none", "mask", "bias"):
            raise ConfigError(f"graph={mode!r}: choose none, mask or bias")
        self.mode, self.floor = mode, floor
        if mode != "none":
            self.register_buffer("adjacency", torch.ones(num_sensors, num_sensors))
        if mode == "bias":
            self.strength = nn.Parameter(torch.zeros(num_heads))
            nn.init.constant_(self.strength, 0.5 / math.log(1 / floor))

    def set_graph(self, adjacency: Tensor) -> None:
        """Take edge weights [N, N]; row i lists whom sensor i listens to."""
        if self.mode != "none":
            self.adjacency.copy_(adjacency)

    def forward(self) -> Tensor | None:
        """[1, H | 1, N, N] or None."""
        if self.mode == "none":
            return None
        if self.mode == "mask":
            off = self.adjacency <= 0
            return torch.zeros_like(self.adjacency).masked_fill(off, -torch.inf)[None, None]
        logs = self.adjacency.clamp_min(self.floor).log()
        return (self.strength[:, None, None] * logs)[None]


class StepHead(nn.Module):
    """Forecast of each step from its sensor's token and from the earlier looks at that very step.

    z = sum_h o_qh gelu(W x + U k_q + e_q)_h + sum_g w_qg k_qg: a perceptron with one hidden layer, and a direct line
    from each look to the forecast, which a token that squeezes all steps' looks into one vector cannot keep.

    Args:
        dim: Width of x.
        known_features: G, features of a step's looks.
        hidden_dim: Hidden width.
        steps: Q.
    """

    def __init__(self, dim: int, known_features: int, hidden_dim: int, steps: int) -> None:
        super().__init__()
        self.token = nn.Linear(dim, hidden_dim)
        self.known = nn.Linear(known_features, hidden_dim, bias=False)
        self.step = nn.Parameter(torch.empty(steps, 1, hidden_dim))
        self.out = nn.Parameter(torch.empty(steps, 1, hidden_dim))
        self.direct = nn.Parameter(torch.empty(steps, 1, known_features))
        self.no_weight_decay = ("step",)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.step, std=0.1)
        nn.init.normal_(self.out, std=0.01)
        nn.init.zeros_(self.direct)

    def forward(self, x: Tensor, known: Tensor) -> Tensor:
        """[B, N, C] and [B, Q, N, G] to [B, Q, N]."""
        hidden = F.gelu(self.token(x)[:, None] + self.known(known) + self.step)
        return (hidden * self.out).sum(-1) + (known * self.direct).sum(-1)
