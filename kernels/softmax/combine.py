"""What is done with outputs and log-sum-exps afterwards: merging disjoint key sets, sinks."""

import torch
from torch import Tensor


def apply_sink(out: Tensor, lse: Tensor, logit: Tensor, value: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Add one more key to every row after the fact: a sink that takes weight away from the others.

    ``O' = O sigmoid(lse - b) + v_s sigmoid(b - lse)`` and ``lse' = logaddexp(lse, b)``.

    Args:
        out: Attention over the real keys, [B, H, N, E].
        lse: Its log-sum-exp, [B, H, N].
        logit: Score b of the sink, broadcastable to [B, H, N].
        value: Value of the sink, broadcastable to [B, H, N, E]; zero if left out.

    Returns:
        Output and log-sum-exp with the sink. Rows without a real key stay zero, whatever the sink's value.
    """
    empty = lse == -torch.inf
    # Empty rows get a harmless finite score, so that no infinity meets a zero in any derivative.
    kept = (lse.masked_fill(empty, 0.0) - logit).sigmoid().to(out.dtype)
    mixed = out * kept[..., None]
    if value is not None:
        mixed = mixed + (1 - kept)[..., None] * value
    return mixed.masked_fill(empty[..., None], 0.0), lse.logaddexp(logit.expand(lse.shape).to(lse.dtype))


def merge_lse(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Attention over the union of disjoint key sets from the attention over each.

    Args:
        parts: Pairs of output [..., N, E] and log-sum-exp [..., N] as ``attention(..., return_lse=True)`` returns them.

    Returns:
        Output and log-sum-exp over all keys; rows without any key are 0 and -torch.inf.
    """
    if not parts:
        raise ValueError("merge_lse: needs at least one (output, lse) pair, got an empty list")
    lse = torch.stack([part[1] for part in parts])
    peak = lse.detach().amax(0)
    peak = peak.masked_fill(peak == -torch.inf, 0.0)
    weights = (lse - peak).exp()
    total = weights.sum(0)
    empty = total == 0
    safe = total.masked_fill(empty, 1.0)
    out = sum(
        (w / safe)[..., None].to(part[0].dtype) * part[0]
        for w, part in zip(weights.unbind(0), parts, strict=True)
    )
    return out, (safe.log() + peak).masked_fill(empty, -torch.inf)
