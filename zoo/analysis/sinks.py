"""Attention sinks and how spread the rows of attention maps are.

The score of key j in head h is the mean weight that the queries which see it give it, ``A_hj = mean_i P_ij``; it is a sink where that exceeds
a threshold, usually 0.3 ("Unveiling and harnessing hidden attention sinks", arXiv:2406.15765; "When attention sink emerges in language
models", arXiv:2410.10781). The first token as a sink in all layers from an early one on is the primary kind; other tokens that
become one in some layers are secondary. Sinks tend to have small values: they hold what a head does not want to spend.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zoo.analysis.modules import attention_modules, evaluating
from zoo.attention.base import Attention, visible_keys

THRESHOLD = 0.3
LEAST_QUERIES = 8  # the last keys of a causal pattern are seen by few queries, whose mean says little


@dataclass
class LayerSinks:
    """What the maps of one attention module show; means over samples, and over heads where there is one number.

    Attributes:
        layer: Name in the model.
        attention: Its variant.
        rate: Share of samples in which each head has a sink, [H].
        first: Share of samples and heads in which the first token is one.
        others: Other sinks of a sample and head.
        value_norm: Norm of a sink's value over the mean norm of all values; NaN without sinks or such values.
        alignment: Cosine between the inputs of the other sinks and the first token's; NaN without such sinks.
        entropy: Of the rows, over that of equal weights on the visible keys: 0 one key, 1 all alike.
        effective_rank: exp of the entropy of the maps' normalised singular values.
    """

    layer: str
    attention: str
    rate: list[float]
    first: float
    others: float
    value_norm: float
    alignment: float
    entropy: float
    effective_rank: float


def sink_scores(weights: Tensor, seen: Tensor) -> Tensor:
    """Mean weight of each key over the queries that see it, [B, H, N, M] and bool broadcastable to it -> [B, H, M].

    Zero for keys that fewer than 8 queries (half of them, where there are fewer than 16) see.
    """
    n = weights.shape[2]
    count = seen.expand(seen.shape[0], 1, *weights.shape[2:]).sum(2)
    scores = (weights * seen).sum(2) / count.clamp(min=1)
    return scores.masked_fill(count < min(LEAST_QUERIES, max(1, n // 2)), 0.0)


@torch.no_grad()
def sinks(
    model: nn.Module,
    batches: Iterable[Any],
    run: Callable[[Any], Any],
    *,
    threshold: float = THRESHOLD,
) -> list[LayerSinks]:
    """Look at the maps of every module that has unsigned ones, while `run(batch)` calls the model.

    Args:
        model: With attention of the zoo.
        batches: What `run` takes.
        run: Passes a batch through the model.
        threshold: Mean weight from which on a key is a sink, in (0, 1).

    Returns:
        One entry a module that was called, in the model's order; none for variants without a map or with a signed one.
    """
    modules = attention_modules(model)
    seen = {name: _Sums() for name, m in modules.items() if _has_weights(m)}
    handles = [
        modules[name].register_forward_pre_hook(
            lambda module, args, call, sums=sums: sums.add(module, args, call, threshold), with_kwargs=True
        )
        for name, sums in seen.items()
    ]
    try:
        with evaluating(model):
            for batch in batches:
                run(batch)
    finally:
        for handle in handles:
            handle.remove()
    return [sums.report(name, modules[name].name) for name, sums in seen.items() if sums.maps]


def _has_weights(module: Attention) -> bool:
    return module.capabilities.has_map and not module.capabilities.signed_map


def _inputs(
    x: Tensor, context: Tensor | None = None, value: Tensor | None = None, **_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs of queries, keys and values, as a module takes them."""
    context = x if context is None else context
    return x, context, context if value is None else value


class _Sums:
    """Running sums over the maps of one module."""

    def __init__(self) -> None:
        self.maps = 0  # samples seen
        self.heads_with: Tensor | float = 0.0  # [H]
        self.first = self.others = self.rank = 0.0
        self.norm, self.norms, self.cosine, self.cosines = 0.0, 0, 0.0, 0
        self.entropy, self.rows = 0.0, 0

    def add(self, module: Attention, args: tuple[Any, ...], call: dict[str, Any], threshold: float) -> None:
        weights = module.attention_map(*args, **call).float()
        x, context, value = _inputs(*args, **call)
        batch, heads, n, m = weights.shape
        seen = (
            visible_keys(n, m, call.get("positions"), x.device) if module.causal else x.new_ones(1, 1).bool()
        )
        seen = seen.expand(n, m) if seen.dim() == 2 else seen
        seen = seen if seen.dim() == 4 else seen[None, None]
        if (mask := call.get("key_mask")) is not None:
            seen = seen & mask[:, None, None, :]
            if not module.pattern.cross:  # the queries are the same tokens
                seen = seen & mask[:, None, :, None]
        scores = sink_scores(weights, seen)
        sink = scores > threshold
        self.maps += batch
        self.heads_with = self.heads_with + sink.any(-1).sum(0)
        self.first += float(sink[..., 0].sum()) / heads
        self.others += float(sink[..., 1:].sum()) / heads
        self._values(module, x, context, value, sink)
        beside = sink[..., 1:].any(1)  # [B, M - 1]
        if bool(beside.any()):
            alike = torch.cosine_similarity(context[:, 1:], context[:, :1], dim=-1)
            self.cosine += float(alike[beside].sum())
            self.cosines += int(beside.sum())
        visible = seen.sum(-1).expand(batch, heads, n)
        entropy = torch.special.entr(weights * seen).sum(-1) / visible.clamp(min=2).log()
        self.entropy += float(entropy[visible > 1].sum())
        self.rows += int((visible > 1).sum())
        values = torch.linalg.svdvals(weights * seen)
        shares = values / values.sum(-1, keepdim=True).clamp(min=1e-12)
        self.rank += float(torch.special.entr(shares).sum(-1).exp().mean(1).sum())

    def _values(self, module: Attention, x: Tensor, context: Tensor, value: Tensor, sink: Tensor) -> None:
        values = module.project(x, context, value)[2]
        if values.dim() != 4 or values.shape[2] != sink.shape[2] or sink.shape[1] % values.shape[1]:
            return  # of blocks, or of several branches
        norms = values.norm(dim=-1).repeat_interleave(sink.shape[1] // values.shape[1], 1)
        self.norm += float((norms / norms.mean(-1, keepdim=True).clamp(min=1e-12))[sink].sum())
        self.norms += int(sink.sum())

    def report(self, layer: str, attention: str) -> LayerSinks:
        return LayerSinks(
            layer,
            attention,
            rate=(self.heads_with / self.maps).tolist(),
            first=self.first / self.maps,
            others=self.others / self.maps,
            value_norm=self.norm / self.norms if self.norms else math.nan,
            alignment=self.cosine / self.cosines if self.cosines else math.nan,
            entropy=self.entropy / self.rows if self.rows else math.nan,
            effective_rank=self.rank / self.maps,
        )
