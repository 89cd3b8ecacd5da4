"""From tokens to one vector."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from zoo.attention.base import BiasFactors
from zoo.attention.slots import AttentionFactory
from zoo.errors import ConfigError


def mean_pool(x: Tensor, key_mask: Tensor | None = None) -> Tensor:
    """Mean of the tokens kept by `key_mask` (bool [B, N]), [B, N, C] -> [B, C]; zeros where none is kept."""
    if key_mask is None:
        return x.mean(dim=1)
    keep = key_mask.unsqueeze(-1)
    return x.masked_fill(~keep, 0.0).sum(dim=1) / keep.sum(dim=1).clamp(min=1).to(x.dtype)


class AttentionPool(nn.Module):
    """Learned queries read the tokens through any cross attention.

    Args:
        attention: Factory of a cross slot.
        dim: Width C of the tokens.
        num_heads: Heads of the attention.
        queries: Number Q of learned queries.
        geometry: Passed on to the attention's constructor.
    """

    def __init__(
        self,
        attention: AttentionFactory,
        dim: int,
        num_heads: int,
        *,
        queries: int = 1,
        **geometry: object,
    ) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.empty(1, queries, dim))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.attn = attention(dim, num_heads, **geometry)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.trunc_normal_(self.query, std=0.02)

    def forward(
        self,
        x: Tensor,
        *,
        key_mask: Tensor | None = None,
        bias: Tensor | BiasFactors | None = None,
    ) -> Tensor:
        """[B, N, C] -> [B, Q, C]."""
        query = self.query.expand(x.shape[0], -1, -1)
        return self.attn(query, self.norm(x), key_mask=key_mask, bias=bias)


class EfficientProbe(nn.Module):
    """Efficient probing: learned queries pool frozen or trained tokens, each its own slice of the value channels.

    ``out_q = softmax_n(u_q . x_n / sqrt(C)) (x W_v)[slice q]``; the keys are the tokens themselves. One query with `reduction` 1 is classic
    attentive pooling.

    Paper: Attention, Please! Revisiting Attentive Probing, arXiv:2506.10178, ICLR 2026. Official code: billpsomas/efficient-probing,
    Apache-2.0. Differs from the official code in: one head only (its reshape is right for no other number); a head on top, with batch
    norm there, is the caller's.

    Args:
        dim: Width C of the tokens.
        queries: Number Q of learned queries.
        reduction: C over the width of the output, which Q must divide.
    """

    def __init__(self, dim: int, *, queries: int = 32, reduction: int = 1) -> None:
        super().__init__()
        if queries < 1 or reduction < 1 or dim % reduction or (dim // reduction) % queries:
            raise ConfigError(
                f"ep pooling: the output width dim / reduction = {dim} / {reduction} must be whole and divisible by "
                f"queries={queries}"
            )
        self.out_dim = dim // reduction
        self.query = nn.Parameter(torch.empty(queries, dim))
        self.value = nn.Linear(dim, self.out_dim, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.query, std=0.02)

    def attention_map(
        self, x: Tensor, *, key_mask: Tensor | None = None, bias: Tensor | None = None
    ) -> Tensor:
        """Weights of the tokens, [B, Q, N]; rows of samples without a kept token are zero."""
        scores = self.query @ x.mT * x.shape[-1] ** -0.5
        if bias is not None:
            scores = scores + bias
        if key_mask is None:
            return scores.softmax(-1)
        some = key_mask.any(-1)[:, None, None]
        scores = scores.masked_fill(~key_mask[:, None] & some, -torch.inf)
        return scores.softmax(-1).masked_fill(~some, 0.0)

    def forward(self, x: Tensor, *, key_mask: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        """Pool tokens [B, N, C] to [B, C / reduction].

        Args:
            x: Tokens.
            key_mask: Tokens to keep, bool [B, N].
            bias: Added to the scores, broadcastable to [B, Q, N].
        """
        if key_mask is not None:
            x = x.masked_fill(~key_mask[..., None], 0.0)
        weights = self.attention_map(x, key_mask=key_mask, bias=bias)
        values = self.value(x).unflatten(-1, (self.query.shape[0], -1))  # [B, N, Q, C']
        return torch.einsum("bqn,bnqc->bqc", weights, values).flatten(1)

    def forward_flops(self, inputs: tuple, output: Tensor) -> float:
        """Of the scores and of the weighted sums."""
        batch, tokens, dim = inputs[0].shape
        return 2.0 * batch * tokens * (self.query.shape[0] * dim + self.out_dim)
