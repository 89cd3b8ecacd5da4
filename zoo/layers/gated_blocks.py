"""GMAN's building blocks: projections with norm and ReLU, two dense layers, gated spatial and temporal attention.

Letters: B batch, T steps, N sensors, C input width, D = heads x head width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from zoo.attention.slots import AttentionFactory
from zoo.layers.graph import GroupAttention, SparseGraphAttention


class Projected(nn.Module):
    """A linear projection followed by batch or layer norm and ReLU, in the place of an attention's own projection."""

    def __init__(self, linear: nn.Linear, norm: str) -> None:
        super().__init__()
        self.linear = linear
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.norm = TokenNorm(linear.out_features, norm)

    @property
    def weight(self) -> Tensor:
        return self.linear.weight

    @property
    def bias(self) -> Tensor | None:
        return self.linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.linear(x)).relu_()


class TokenNorm(nn.Module):
    """Batch norm (eps 1e-3, over everything but channels), layer norm or nothing, on [..., C]."""

    def __init__(self, dim: int, kind: str) -> None:
        super().__init__()
        self.kind = kind
        if kind == "batch":
            self.norm: nn.Module = nn.BatchNorm1d(dim, eps=1e-3)
        else:
            self.norm = nn.LayerNorm(dim) if kind == "layer" else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        if self.kind != "batch":
            return self.norm(x)
        return self.norm(x.reshape(-1, x.shape[-1])).view(x.shape)


class Dense(nn.Module):
    """Two dense layers: norm and ReLU after the first only, as GMAN's building block has it."""

    def __init__(self, dim: int, hidden: int, out: int, norm: str) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(dim, hidden), TokenNorm(hidden, norm)
        self.second = nn.Linear(hidden, out)

    @property
    def weight(self) -> Tensor:
        return self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.norm(self.first(x)).relu_())


class SpatioTemporalBlock(nn.Module):
    """Spatial and temporal attention on features H beside embedding E, gated fusion, residual."""

    def __init__(self, attention: Mapping[str, AttentionFactory], o: dict[str, Any], sensors: int) -> None:
        super().__init__()
        heads, d = o["num_heads"], o["head_dim"]
        dim = heads * d
        common: dict[str, Any] = {"head_dim": d}
        if o["value_input"] == "features":
            common["value_dim"] = dim
        # Values from H beside E whatever `value_input` says: edges have one projection for all three, and groups are pooled
        # with what they are compared by.
        self.spatial_value = o["value_input"] == "features" and o["graph"] != "sparse" and not o["group_size"]
        if o["graph"] == "sparse":
            self.spatial: nn.Module = SparseGraphAttention(2 * dim, heads, head_dim=d)
        elif o["group_size"]:
            size = max(0, o["group_size"])
            self.spatial = GroupAttention(
                attention["spatial"], 2 * dim, heads, num_nodes=sensors, group_size=size, head_dim=d
            )
        else:
            self.spatial = attention["spatial"](2 * dim, heads, length=sensors, **common)
        self.temporal_value = o["value_input"] == "features"
        self.temporal = attention["temporal"](2 * dim, heads, length=o["steps"], **common)
        inner = [self.spatial.within, self.spatial.between] if o["group_size"] else [self.spatial]
        for module in (*inner, self.temporal):
            official_projections(module, dim, o)
        self.gate_spatial = nn.Linear(dim, dim, bias=False)
        self.gate_temporal = nn.Linear(dim, dim)
        self.fuse = Dense(dim, dim, dim, o["norm"])

    def forward(self, h: Tensor, e: Tensor, **spatial: Any) -> Tensor:
        """[B, T, N, D] and [B, T, N, D] to [B, T, N, D]."""
        batch, steps, sensors, dim = h.shape
        z = torch.cat((h, e), dim=-1)
        flat = z.reshape(batch * steps, sensors, 2 * dim)
        value = {"value": h.reshape(batch * steps, sensors, dim)} if self.spatial_value else {}
        over_sensors = self.spatial(flat, **value, **spatial).view(batch, steps, sensors, dim)
        flat = z.transpose(1, 2).reshape(batch * sensors, steps, 2 * dim)
        value = (
            {"value": h.transpose(1, 2).reshape(batch * sensors, steps, dim)} if self.temporal_value else {}
        )
        over_time = self.temporal(flat, **value).view(batch, sensors, steps, dim).transpose(1, 2)
        gate = torch.sigmoid(self.gate_spatial(over_sensors) + self.gate_temporal(over_time))
        mixed = torch.lerp(over_time, over_sensors, gate)
        return h + self.fuse(mixed)


def official_projections(module: nn.Module, dim: int, o: dict[str, Any]) -> None:
    """Norm and ReLU after each projection; the output is the heads themselves or two dense layers, width D."""
    for name in ("qkv", "q", "k", "v"):
        linear = getattr(module, name, None)
        if isinstance(linear, nn.Linear):
            setattr(module, name, Projected(linear, o["norm"]))
    out = module.proj.in_features
    if o["extra_dense"]:
        module.proj = Dense(out, dim, dim, o["norm"])
    else:
        module.proj = nn.Linear(out, dim)
