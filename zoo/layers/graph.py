"""Attention between the nodes of a graph: in groups, along edges, and embeddings of nodes from the graph.

Letters: B batch, H heads, N nodes, G groups, M nodes of a group, E edges, D head width.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.attention.base import merge_heads, split_heads
from zoo.attention.slots import AttentionFactory
from zoo.errors import ConfigError


class GroupAttention(nn.Module):
    """Attention inside random groups of nodes, plus attention between the groups' maxima.

    Every node gets the sum of both. Cost per layer is about N M + (N / M)^2 pairs, least near M = (2 N)^(1/3), where it
    is (3/2) 2^(1/3) N^(4/3).

    Args:
        attention: Factory of a self slot; fills both places.
        dim: Width C.
        num_heads: Heads.
        num_nodes: N.
        group_size: M; 0 takes the size of least cost.
        seed: Of the random partition, which is a buffer and stays as it is.
        geometry: Passed on to the attention's constructor.

    Source: GMAN, arXiv:1911.08415, section on group spatial attention (absent from its code; the optimum given there,
    2^(-1/3) N^(4/3), is not the minimum of its own cost, see above).
    """

    def __init__(
        self,
        attention: AttentionFactory,
        dim: int,
        num_heads: int,
        *,
        num_nodes: int,
        group_size: int = 0,
        seed: int = 0,
        **geometry: Any,
    ) -> None:
        super().__init__()
        if group_size < 0 or group_size > num_nodes:
            raise ConfigError(
                f"group_size={group_size} must lie between 1 and the {num_nodes} sensors, or be 0"
            )
        self.group_size = group_size or best_group_size(num_nodes)
        self.groups = -(-num_nodes // self.group_size)
        self.num_nodes, self.seed = num_nodes, seed
        self.within = attention(dim, num_heads, length=self.group_size, **geometry)
        self.between = attention(dim, num_heads, length=self.groups, **geometry)
        self.register_buffer("order", torch.empty(num_nodes, dtype=torch.long))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the partition."""
        self.order.copy_(torch.randperm(self.num_nodes, generator=torch.Generator().manual_seed(self.seed)))

    def forward(self, x: Tensor, *, key_mask: Tensor | None = None) -> Tensor:
        """[B, N, C] -> [B, N, C']; `key_mask` bool [B, N] leaves nodes out as keys."""
        batch, nodes, _ = x.shape
        if nodes != self.num_nodes:
            raise ConfigError(f"group attention was built for {self.num_nodes} nodes, got {nodes}")
        spare = self.groups * self.group_size - nodes
        shape = (batch * self.groups, self.group_size)
        members = F.pad(x[:, self.order], (0, 0, 0, spare)).reshape(*shape, -1)
        keep = None
        if key_mask is not None or spare:
            keep = x.new_ones(batch, nodes, dtype=torch.bool) if key_mask is None else key_mask
            keep = F.pad(keep[:, self.order], (0, spare)).reshape(shape)
        inside = self.within(members, key_mask=keep)
        if keep is None:
            tops, group_mask = members.amax(dim=1), None
        else:
            some = keep.any(dim=1)
            lowest = torch.finfo(x.dtype).min
            tops = members.masked_fill(~keep[..., None], lowest).amax(dim=1).masked_fill(~some[:, None], 0.0)
            group_mask = None if key_mask is None else some.reshape(batch, self.groups)
        between = self.between(tops.reshape(batch, self.groups, -1), key_mask=group_mask)
        mixed = inside.reshape(batch, self.groups, self.group_size, -1) + between[:, :, None]
        back = torch.empty_like(self.order)
        back[self.order] = torch.arange(nodes, device=x.device)
        return mixed.flatten(1, 2)[:, back]


def best_group_size(num_nodes: int) -> int:
    """Group size with the fewest attended pairs, N M + (N / M)^2."""
    return max(1, min(num_nodes, round((2 * num_nodes) ** (1 / 3))))


class SparseGraphAttention(nn.Module):
    """Softmax attention along edges alone, with torch-geometric's segment softmax; linear in the number of edges.

    Parameters have the names and shapes of dense softmax attention, so that weights go back and forth.

    Args:
        dim: Width C.
        num_heads: Heads.
        head_dim: D; dim / num_heads when left out.
        dropout: On the output.
    """

    def __init__(
        self, dim: int, num_heads: int, *, head_dim: int | None = None, dropout: float = 0.0, **_: Any
    ) -> None:
        super().__init__()
        try:
            import torch_geometric  # noqa: F401  (a clear error at construction, not in the first step)
        except ImportError:
            raise ConfigError(
                "graph=sparse needs torch-geometric; pip install torch-geometric, or use graph=mask"
            ) from None
        if head_dim is None and dim % num_heads:
            raise ConfigError(f"num_heads={num_heads} must divide dim={dim}; change one of them")
        self.num_heads, self.head_dim = num_heads, head_dim or dim // num_heads
        self.qkv = nn.Linear(dim, 3 * num_heads * self.head_dim)
        self.proj = nn.Linear(num_heads * self.head_dim, dim)
        self.proj_drop = nn.Dropout(dropout)

    def forward(self, x: Tensor, *, edges: Tensor, **_: Any) -> Tensor:
        """Attend.

        Args:
            x: [B, N, C].
            edges: int64 [2, E]: row 0 is heard by row 1, as in torch-geometric.

        Returns:
            [B, N, C]; a node without incoming edges gets zeros from the mixing.
        """
        q, k, v = (split_heads(t, self.num_heads) for t in self.qkv(x).chunk(3, dim=-1))
        return self.proj_drop(self.proj(merge_heads(edge_attention(q, k, v, edges))))


def edge_attention(q: Tensor, k: Tensor, v: Tensor, edges: Tensor) -> Tensor:
    """softmax over incoming edges; [B, H, N, D] each, `edges` int64 [2, E] from source to target."""
    from torch_geometric.utils import softmax as segment_softmax

    source, target = edges
    nodes = q.shape[2]
    scores = (q[:, :, target] * k[:, :, source]).sum(-1) * q.shape[-1] ** -0.5  # [B, H, E]
    weights = segment_softmax(scores, target, num_nodes=nodes, dim=-1)
    return torch.zeros_like(v).index_add(2, target, weights[..., None] * v[:, :, source])


def edges_of(adjacency: Tensor) -> Tensor:
    """Edges [2, E] of an adjacency [N, N] whose row i lists whom node i listens to."""
    target, source = (adjacency > 0).nonzero(as_tuple=True)
    return torch.stack((source, target))


def laplacian_eigenvectors(adjacency: Tensor, dim: int) -> Tensor:
    """The `dim` smoothest eigenvectors of the symmetric normalised Laplacian, float32 [N, dim]; zero columns if N < dim.

    Scaled to unit variance per column; the sign of each is fixed by its largest entry.
    """
    weights = torch.maximum(adjacency, adjacency.T).double()
    weights = weights - torch.diag(weights.diagonal())
    scale = weights.sum(1).clamp_min(1e-12).rsqrt() * (weights.sum(1) > 0)
    laplacian = torch.eye(len(weights), dtype=torch.float64) - scale[:, None] * weights * scale
    vectors = torch.linalg.eigh(laplacian).eigenvectors[:, :dim]
    vectors = vectors * vectors.gather(0, vectors.abs().argmax(0, keepdim=True)).sign()
    vectors = vectors * len(weights) ** 0.5
    return F.pad(vectors, (0, dim - vectors.shape[1])).float()


def node2vec(
    adjacency: Tensor,
    dim: int,
    *,
    p: float = 2.0,
    q: float = 1.0,
    walks: int = 20,
    length: int = 40,
    window: int = 5,
    epochs: int = 3,
    seed: int = 0,
) -> Tensor:
    """Node embeddings from biased random walks and skip-gram with negative sampling, float32 [N, dim].

    Args:
        adjacency: Edge weights, [N, N]; row i lists the neighbours that a walk may go to from i.
        dim: Width.
        p: Return parameter; larger values make going straight back less likely.
        q: In-out parameter; larger values keep walks near their start.
        walks: Walks from each node (the official GMAN files use 100).
        length: Steps of a walk (80 there).
        window: Largest distance of a pair within a walk (10 there).
        epochs: Passes over the pairs (1,000 of word2vec there).
        seed: Of walks and training.

    Source: node2vec, arXiv:1607.00653.
    """
    paths = _random_walks(adjacency.numpy(), p, q, walks, length, np.random.default_rng(seed))
    pairs = [
        np.stack((paths[:, :-d].ravel(), paths[:, d:].ravel())) for d in range(1, min(window, length - 1) + 1)
    ]
    pairs = torch.from_numpy(np.concatenate([*pairs, *(pair[::-1] for pair in pairs)], axis=1))
    source = torch.Generator().manual_seed(seed)
    nodes = len(adjacency)
    part_size = min(4096, max(256, pairs.shape[1] // 200))
    inner = torch.empty(nodes, dim).uniform_(-0.5, 0.5, generator=source).requires_grad_()
    outer = torch.zeros(nodes, dim, requires_grad=True)
    optimizer = torch.optim.Adam((inner, outer), lr=0.02)
    with torch.enable_grad():
        for _ in range(epochs):
            for part in torch.randperm(pairs.shape[1], generator=source).split(part_size):
                centre, context = pairs[:, part]
                wrong = torch.randint(nodes, (len(part), 5), generator=source)
                hit = (inner[centre] * outer[context]).sum(-1)
                miss = (inner[centre][:, None] * outer[wrong]).sum(-1)
                loss = -F.logsigmoid(hit).mean() - F.logsigmoid(-miss).sum(-1).mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    return inner.detach()


def _random_walks(
    adjacency: np.ndarray, p: float, q: float, walks: int, length: int, rng: np.random.Generator
) -> np.ndarray:
    """Second-order random walks, int64 [N * walks, length]; a walk at a dead end stays where it is."""
    weights = adjacency.astype(np.float64).copy()
    np.fill_diagonal(weights, 0.0)
    linked = weights > 0
    at = np.tile(np.arange(len(weights)), walks)
    path = [at]
    before = None
    for _ in range(length - 1):
        chance = weights[at]
        if before is not None:
            bias = np.where(linked[before], 1.0, 1.0 / q)
            bias[np.arange(len(at)), before] = 1.0 / p
            chance = chance * bias
        total = chance.cumsum(axis=1)
        stuck = total[:, -1] <= 0
        draw = rng.random(len(at)) * total[:, -1]
        step = (total <= draw[:, None]).sum(axis=1).clip(max=len(weights) - 1)
        before, at = at, np.where(stuck, at, step)
        path.append(at)
    return np.stack(path, axis=1)
