"""Softmax attention written out. B batch, H heads, Hk key heads, N queries, M keys, D, E head sizes."""

from typing import NamedTuple

import torch
from torch import Tensor


class Skip(NamedTuple):
    """A tile of scores is dropped where exp(row maximum - running maximum) < threshold / (visible keys) in all of its rows.

    Rows that ``voting``, bool [B, N], leaves out keep no tile; None leaves none out.
    """

    threshold: float
    rows: int
    keys: int
    voting: Tensor | None = None

    def between(self, start: int, stop: int) -> "Skip":
        """For a block of rows."""
        return self if self.voting is None else self._replace(voting=self.voting[:, start:stop])


@torch.no_grad()
def skipped(scores: Tensor, visible: Tensor, skip: Skip) -> Tensor:
    """Entries in dropped tiles, bool [B, H, N, M]. The running maximum includes the tile, so the tile of a row's maximum stays."""
    n, m = scores.shape[-2:]
    pad = torch.nn.functional.pad
    scores = pad(
        scores.masked_fill(~visible, -torch.inf), (0, -m % skip.keys, 0, -n % skip.rows), value=-torch.inf
    )
    tile_max = scores.unflatten(-1, (-1, skip.keys)).amax(-1)  # [B, H, N', tiles]
    limit = (skip.threshold / visible.sum(-1, keepdim=True).clamp(min=1)).log()
    low = tile_max - tile_max.cummax(-1).values < pad(limit, (0, 0, 0, -n % skip.rows))
    low = low | (tile_max == -torch.inf)
    if skip.voting is not None:
        low = low | pad(~skip.voting, (0, -n % skip.rows), value=True)[:, None, :, None]
    low = low.unflatten(-2, (-1, skip.rows)).all(-2).repeat_interleave(skip.rows, -2)
    return low.repeat_interleave(skip.keys, -1)[..., :n, :m]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    visible: Tensor | None,
    bias: Tensor | None,
    scale: float,
    dropout: float = 0.0,
    softcap: float | None = None,
    skip: Skip | None = None,
    post: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``O = (w softmax(scale q k^T + bias)) v`` over visible keys and ``lse = log sum_j exp(S_ij)``.

    Args:
        q: [B, H, N, D].
        k: [B, Hk, M, D]; query head h reads key head ``h // (H / Hk)``.
        v: [B, Hk, M, E].
        visible: bool, broadcastable to [B, H, N, M]; a row without any gives O = 0 and lse = -inf.
        bias: Added to the scaled scores.
        scale: Factor of the scores.
        dropout: Probability of zeroing a weight.
        softcap: Scores become ``softcap tanh(scores / softcap)`` before the bias.
        skip: Threshold and tile sizes of BLASST's rule.
        post: Factor w of the weights, broadcastable to [B, H, N, M].

    Returns:
        [B, H, N, E] and [B, H, N].
    """
    group = q.shape[1] // max(k.shape[1], 1)
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = scale * (q @ k.mT)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias
    if visible is None:
        visible = torch.ones((), dtype=torch.bool, device=q.device)
    visible = (visible & (scores > -torch.inf)).expand(scores.shape)
    if skip is not None:
        visible = visible & ~skipped(scores, visible, skip)
    some = visible.any(-1, keepdim=True)
    # Rows without a key are given harmless scores before and zeros after the softmax: no NaN in value or gradient.
    scores = scores.masked_fill(~visible, -torch.inf).masked_fill(~some, 0.0)
    if scores.shape[-1] == 0:
        return v.new_zeros(*q.shape[:3], v.shape[-1]) + 0 * q.sum(), q.new_full(q.shape[:3], -torch.inf)
    weights = scores.softmax(-1).masked_fill(~some, 0.0)
    if post is not None:
        weights = weights * post
    if dropout:
        weights = torch.nn.functional.dropout(weights, dropout)
    return weights @ v, scores.logsumexp(-1).masked_fill(~some[..., 0], -torch.inf)
