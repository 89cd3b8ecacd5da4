"""GMAN: attention over sensors and over time side by side, merged by a gate; one cross attention carries past to future.

Paper: "GMAN: A Graph Multi-Attention Network for Traffic Prediction", arXiv:1911.08415, AAAI 2020. Official code:
zhengchuanpan/GMAN (TensorFlow 1). Paper and code differ; sizes `paper`, `metr_la` and `pems_bay` reproduce each.
Adds to both: group attention over sensors (in the paper, not in the code), the weekly profile and earlier looks
(`residual`), the graph as mask, bias or sparse edges, embeddings of sensors from node2vec, the Laplacian or a table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from zoo.attention.base import Pattern
from zoo.attention.slots import AttentionFactory, Slot
from zoo.errors import ConfigError, unknown
from zoo.layers.gated_blocks import Dense, SpatioTemporalBlock, TokenNorm, official_projections
from zoo.layers.graph import edges_of, laplacian_eigenvectors, node2vec
from zoo.layers.traffic import GRAPHS, GraphBias, SensorScaler
from zoo.models.registry import register_model

_PAPER = {
    "residual": False,
    "depth": 3,
    "num_heads": 8,
    "head_dim": 8,
    "temporal_causal": True,
    "value_input": "features",
    "extra_dense": False,
    "norm": "batch",
    "output_dropout": 0.0,
    "embedding": "node2vec",
    "embedding_dim": 64,
    "group_size": 0,
    "graph": "none",
}


@register_model
class Gman(nn.Module):
    """Encoder over P steps, transform attention to Q steps, decoder over Q steps; width D = heads x head width.

    Arguments left out take the value of `size`.

    Args:
        attention: Factories for slots "spatial", "temporal" and "transform".
        size: "micro" (some twenty sensors on a CPU), "paper", or the released "metr_la" and "pems_bay".
        num_sensors: N.
        slots_per_day: S.
        history_steps: P.
        horizon_steps: Q.
        lag_steps: Distance in steps of each earlier look that the data give.
        residual: See `SensorScaler`; earlier looks enter the decoder.
        depth: Blocks of the encoder, and of the decoder.
        num_heads: K.
        head_dim: d.
        temporal_causal: Steps look back only, in encoder and decoder.
        value_input: Values of spatial and temporal attention: "features" (H, the paper's eq. 7) or "joint" (H beside E,
            the code); over sensors joint in any case with `graph=sparse` and in groups.
        extra_dense: Two dense layers after each attention, as in the code.
        norm: "batch" as published, "layer" or "none", after each projection.
        output_dropout: Dropout before both output layers.
        embedding: Of sensors: "node2vec", "laplacian" or "learned".
        embedding_dim: Its width.
        group_size: Sensors of a group in group attention; 0 for full attention, -1 for the size of least cost.
        graph: "none", "mask", "bias" or "sparse" (torch-geometric, edges alone) over sensors.
        mask_dead: Sensors without a reading in the window are no keys for others.
    """

    name: ClassVar[str]
    sizes: ClassVar[dict[str, dict[str, Any]]] = {
        "micro": {
            **_PAPER,
            "residual": True,
            "depth": 1,
            "num_heads": 4,
            "temporal_causal": False,
            "value_input": "joint",
            "norm": "layer",
            "embedding": "learned",
            "embedding_dim": 16,
        },
        "paper": _PAPER,
        "metr_la": {**_PAPER, "depth": 5, "value_input": "joint", "extra_dense": True, "output_dropout": 0.1},
        "pems_bay": {
            **_PAPER,
            "depth": 1,
            "value_input": "joint",
            "extra_dense": True,
            "temporal_causal": False,
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
        depth: int | None = None,
        num_heads: int | None = None,
        head_dim: int | None = None,
        temporal_causal: bool | None = None,
        value_input: str | None = None,
        extra_dense: bool | None = None,
        norm: str | None = None,
        output_dropout: float | None = None,
        embedding: str | None = None,
        embedding_dim: int | None = None,
        group_size: int | None = None,
        graph: str | None = None,
        mask_dead: bool = False,
    ) -> None:
        super().__init__()
        o = _resolve(size, {k: v for k, v in locals().items() if k in _PAPER})
        dim = o["num_heads"] * o["head_dim"]
        self.scaler = SensorScaler(
            num_sensors=num_sensors,
            slots_per_day=slots_per_day,
            history_steps=history_steps,
            horizon_steps=horizon_steps,
            lag_steps=lag_steps,
            residual=o["residual"],
        )
        self.history_steps, self.horizon_steps, self.mask_dead = history_steps, horizon_steps, mask_dead
        self.slots_per_day, self.graph_mode, self.embedding = slots_per_day, o["graph"], o["embedding"]
        # The papers feed the scaled reading alone; the calendar enters through the embedding.
        self.features = self.scaler.history_features - 2 if o["residual"] else 1
        self.input = Dense(self.features, dim, dim, o["norm"])
        looks = o["residual"] and len(lag_steps) > 0
        self.known = Dense(self.scaler.known_features, dim, dim, o["norm"]) if looks else None
        table = torch.zeros(num_sensors, o["embedding_dim"])
        if o["embedding"] == "learned":
            self.sensor_table: Tensor = nn.Parameter(table)
        else:
            self.register_buffer("sensor_table", table)
        self.sensor_embed = Dense(o["embedding_dim"], dim, dim, o["norm"])
        # One-hot vectors through a dense layer are rows of a table.
        self.day_table, self.weekday_table = nn.Embedding(slots_per_day, dim), nn.Embedding(7, dim)
        self.time_norm, self.time_second = TokenNorm(dim, o["norm"]), nn.Linear(dim, dim)
        heads = o["num_heads"]
        dense_graph = o["graph"] if o["graph"] in ("mask", "bias") else "none"
        self.graph = GraphBias(num_sensors, heads, dense_graph)
        if o["graph"] == "sparse":
            self.register_buffer("adjacency", torch.ones(num_sensors, num_sensors))
        self.encoder = nn.ModuleList(
            SpatioTemporalBlock(attention, {**o, "steps": history_steps}, num_sensors)
            for _ in range(o["depth"])
        )
        self.transform = attention["transform"](
            dim, heads, context_dim=dim, value_dim=dim, head_dim=o["head_dim"], length=history_steps
        )
        official_projections(self.transform, dim, {**o, "extra_dense": True})
        self.decoder = nn.ModuleList(
            SpatioTemporalBlock(attention, {**o, "steps": horizon_steps}, num_sensors)
            for _ in range(o["depth"])
        )
        self.output_norm = TokenNorm(dim, o["norm"])
        self.output_first, self.output_second = nn.Linear(dim, dim), nn.Linear(dim, 1)
        self.output_drop = nn.Dropout(o["output_dropout"])
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Glorot-uniform matrices and zero biases, as published; tables small."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for table in (self.day_table.weight, self.weekday_table.weight):
            nn.init.normal_(table, std=0.1)
        if self.embedding == "learned":
            nn.init.normal_(self.sensor_table, std=1.0)
        if self.scaler.residual:
            nn.init.normal_(self.output_second.weight, std=0.01)

    @classmethod
    def slots(cls, **options: Any) -> dict[str, Slot]:
        o = _resolve(options.get("size") or "micro", options)
        causal = Pattern.CAUSAL_SELF if o["temporal_causal"] else Pattern.SELF
        slots = {
            "spatial": Slot(
                Pattern.SELF,
                key_mask=bool(options.get("mask_dead")) or o["group_size"] != 0,
                bias="full" if o["graph"] in ("mask", "bias") else None,
                ordered=False,
                length_known=True,
            ),
            "temporal": Slot(causal, length_known=True),
            "transform": Slot(Pattern.CROSS, length_known=True),
        }
        if o["graph"] == "sparse":
            del slots["spatial"]
        return slots

    def no_weight_decay(self) -> set[str]:
        """The table of sensors, where it is learned."""
        return {"sensor_table"}

    def set_graph(self, adjacency: Tensor) -> None:
        """Embed the sensors from edge weights [N, N], and keep them where attention goes along edges."""
        width = self.sensor_table.shape[1]
        if self.embedding == "node2vec":
            self.sensor_table.copy_(node2vec(adjacency.cpu(), width))
        elif self.embedding == "laplacian":
            self.sensor_table.copy_(laplacian_eigenvectors(adjacency.cpu(), width))
        if self.graph_mode == "sparse":
            self.adjacency.copy_(adjacency)

    def embed(self, slots: Tensor) -> Tensor:
        """The spatio-temporal embedding E, [B, T, N, D], of slots of the week [B, T]."""
        day = self.day_table(slots % self.slots_per_day)
        weekday = self.weekday_table(torch.div(slots, self.slots_per_day, rounding_mode="floor"))
        time = self.time_second(self.time_norm(day + weekday).relu())
        return self.sensor_embed(self.sensor_table) + time[:, :, None]

    def encode(
        self, history: Tensor, history_seen: Tensor, slots: Tensor
    ) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """Encoder output [B, P, N, D], its embedding, and the arguments of the spatial attention."""
        past = slots[:, : self.history_steps]
        features = self.scaler.history(history, history_seen, past)[..., : self.features]
        h, e = self.input(features), self.embed(past)
        spatial: dict[str, Any] = {}
        if self.graph_mode == "sparse":
            spatial["edges"] = edges_of(self.adjacency)
        elif (bias := self.graph()) is not None:
            spatial["bias"] = bias
        if self.mask_dead:
            spatial["key_mask"] = history_seen.any(dim=1).repeat_interleave(self.history_steps, dim=0)
        for block in self.encoder:
            h = block(h, e, **spatial)
        return h, e, spatial

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
        future = slots[:, self.history_steps :]
        h, e_past, spatial = self.encode(history, history_seen, slots)
        e = self.embed(future)
        h = _fold(self.transform(_rows(e), _rows(e_past), _rows(h)), e)
        if self.known is not None:
            if known is None:
                raise ConfigError("the model was built with lag_steps and needs known and known_seen")
            h = h + self.known(self.scaler.known(known, known_seen, future))
        if self.mask_dead:
            spatial["key_mask"] = history_seen.any(dim=1).repeat_interleave(self.horizon_steps, dim=0)
        for block in self.decoder:
            h = block(h, e, **spatial)
        h = self.output_norm(self.output_first(self.output_drop(h))).relu()
        z = self.output_second(self.output_drop(h)).squeeze(-1)
        return self.scaler.forecast(z, future)


def _rows(x: Tensor) -> Tensor:
    """[B, T, N, D] to one sequence a sensor, [B * N, T, D]."""
    return x.transpose(1, 2).flatten(0, 1)


def _fold(x: Tensor, like: Tensor) -> Tensor:
    """[B * N, T, D] back to [B, T, N, D]."""
    return x.unflatten(0, (like.shape[0], like.shape[2])).transpose(1, 2)


def _resolve(size: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a size with the given ones on top, checked."""
    if size not in Gman.sizes:
        raise unknown("size of model 'gman':", size, Gman.sizes)
    preset = Gman.sizes[size]
    o = {**preset, **{k: v for k, v in options.items() if k in preset and v is not None}}
    for key, choices in (
        ("value_input", ("features", "joint")),
        ("norm", ("batch", "layer", "none")),
        ("embedding", ("node2vec", "laplacian", "learned")),
        ("graph", GRAPHS),
    ):
        if o[key] not in choices:
            raise unknown(key, str(o[key]), choices)
    if o["group_size"] and o["graph"] != "none":
        raise ConfigError(
            f"group_size={o['group_size']} and graph={o['graph']} exclude each other; set one of them"
        )
    if o["depth"] < 1 or o["group_size"] < -1:
        raise ConfigError(
            f"depth={o['depth']} must be at least 1 and group_size={o['group_size']} at least -1"
        )
    return o
