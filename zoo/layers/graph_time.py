"""Graph attention inside each time segment and attention over segments: the core of EEG-tGAT.

Letters: B batch, T segments, N nodes, F features, C width, H heads, E edges.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from zoo.attention.slots import AttentionFactory
from zoo.errors import ConfigError


class SegmentGat(nn.Module):
    """GATv2 layers of torch-geometric on every segment's graph, heads side by side.

    Args:
        in_dim: F.
        dim: C, divisible by `num_heads`.
        num_heads: H.
        depth: Layers.
        dropout: On the attention weights of edges.

    Source: GATv2, "How attentive are graph attention networks?", arXiv:2105.14491.
    """

    def __init__(
        self, in_dim: int, dim: int, num_heads: int, *, depth: int = 1, dropout: float = 0.0
    ) -> None:
        super().__init__()
        try:
            from torch_geometric.nn import GATv2Conv
        except ImportError:
            raise ConfigError("model 'tgatv2' needs torch-geometric; pip install torch-geometric") from None
        if dim % num_heads or depth < 1:
            raise ConfigError(f"num_heads={num_heads} must divide dim={dim}, and depth={depth} be at least 1")
        self.layers = nn.ModuleList(
            GATv2Conv(
                in_dim if i == 0 else dim,
                dim // num_heads,
                num_heads,
                dropout=dropout,
                edge_dim=1,
                residual=True,
            )
            for i in range(depth)
        )

    def forward(self, x: Tensor, edges: Tensor, weight: Tensor | None = None) -> Tensor:
        """Features of nodes after each other's.

        Args:
            x: [B, T, N, F].
            edges: int64 [2, E], source above target, the same graph for all; self-loops are added.
            weight: Edge weights, [E]; ones when left out.

        Returns:
            [B, T, N, C].
        """
        batch, steps, nodes, _ = x.shape
        graphs = batch * steps
        flat = x.reshape(graphs * nodes, -1)
        keep = edges[0] != edges[1]
        edges = edges[:, keep]
        weight = x.new_ones(edges.shape[1]) if weight is None else weight[keep].to(x.dtype)
        offset = torch.arange(graphs, device=x.device).repeat_interleave(edges.shape[1]) * nodes
        many = edges.repeat(1, graphs) + offset
        attribute = weight.repeat(graphs)[:, None]
        for layer in self.layers:
            flat = torch.nn.functional.elu(layer(flat, many, attribute))
        return flat.view(batch, steps, nodes, -1)

    def forward_flops(self, inputs: tuple, output: Tensor) -> float:
        """Of the maps of nodes (source, target, residual) and, per edge, of its attribute, score and message."""
        x, edges = inputs[:2]
        graphs, nodes, dim = x.shape[0] * x.shape[1], x.shape[2], output.shape[-1]
        linked = int((edges[0] != edges[1]).sum()) + nodes
        widths = [x.shape[-1]] + [dim] * (len(self.layers) - 1)
        return sum(2.0 * graphs * dim * (3 * nodes * width + 3 * linked) for width in widths)


class SegmentAttention(nn.Module):
    """One vector from T segments by a learned query, with dropout that removes whole segments in training.

    Removed segments are masked before the softmax, so that no weight stays on them; one at least is kept.

    Args:
        dim: Width C.
        num_heads: Heads of the slot's attention.
        attention: Factory of a cross slot; None scores with v . tanh(W g), as EEG-tGAT is described.
        drop: Probability of removing a segment, [0, 1).
    """

    def __init__(
        self, dim: int, num_heads: int, *, attention: AttentionFactory | None = None, drop: float = 0.0
    ) -> None:
        super().__init__()
        if not 0 <= drop < 1:
            raise ConfigError(f"temporal_dropout={drop} is outside [0, 1)")
        self.drop = drop
        if attention is None:
            self.hidden, self.score = nn.Linear(dim, dim), nn.Linear(dim, 1, bias=False)
            self.attention = None
        else:
            self.query = nn.Parameter(torch.empty(1, 1, dim))
            nn.init.normal_(self.query, std=0.5)
            self.attention = attention(dim, num_heads, context_dim=dim)

    def keep(self, batch: int, segments: int, device: torch.device) -> Tensor | None:
        """Segments that stay, bool [B, T]; None outside training."""
        if not self.training or not self.drop:
            return None
        draw = torch.rand(batch, segments, device=device)
        return (draw >= self.drop) | (draw == draw.amax(dim=1, keepdim=True))

    def weights(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        """Weight of each segment, [B, T], heads averaged."""
        if self.attention is not None:
            query = self.query.expand(x.shape[0], -1, -1)
            return self.attention.attention_map(query, x, key_mask=keep).mean(1)[:, 0]
        scores = self.score(torch.tanh(self.hidden(x)))[..., 0]
        if keep is not None:
            scores = scores.masked_fill(~keep, -torch.inf)
        return scores.softmax(-1)

    def forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        """[B, T, C] -> [B, C]; `keep` bool [B, T] overrides the random choice."""
        keep = self.keep(x.shape[0], x.shape[1], x.device) if keep is None else keep
        if self.attention is not None:
            return self.attention(self.query.expand(x.shape[0], -1, -1), x, key_mask=keep)[:, 0]
        return (self.weights(x, keep)[:, None] @ x)[:, 0]


class TemporalGraphClassifier(nn.Module):
    """EEG-tGAT for whole graphs: GATv2 in each segment, mean over nodes, attention over segments, a linear head.

    Args:
        in_dim: Features of a node in a segment.
        num_classes: Classes.
        dim: Width.
        num_heads: Heads of both attentions.
        depth: GATv2 layers.
        temporal_dropout: Probability of removing a segment in training.
        attention: Factory of a cross slot for the segments; None for additive scores.

    The paper's sizes are not known to us (abstract only); these are ours.
    """

    def __init__(
        self,
        in_dim: int,
        num_classes: int,
        *,
        dim: int = 32,
        num_heads: int = 4,
        depth: int = 1,
        temporal_dropout: float = 0.2,
        attention: AttentionFactory | None = None,
    ) -> None:
        super().__init__()
        self.graph = SegmentGat(in_dim, dim, num_heads, depth=depth)
        self.time = SegmentAttention(dim, num_heads, attention=attention, drop=temporal_dropout)
        self.head = nn.Linear(dim, num_classes)

    def segments(self, x: Tensor, edges: Tensor, **graph: Any) -> Tensor:
        """[B, T, N, F] to one vector a segment, [B, T, C]."""
        return self.graph(x, edges, **graph).mean(dim=2)

    def forward(self, x: Tensor, edges: Tensor, **graph: Any) -> Tensor:
        """Logits [B, num_classes] of graphs with features [B, T, N, F] and shared edges [2, E]."""
        return self.head(self.time(self.segments(x, edges, **graph)))
