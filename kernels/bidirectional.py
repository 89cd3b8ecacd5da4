"""Two-direction form of a causal scan: forward inclusive plus backward exclusive, so that each token's own term counts once.

For a linear scan with scalar decay and the gates shared by both directions this is attention with weights ``q_i.k_j exp(-|c_i - c_j|)``,
c the cumulative log decay.
"""

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from kernels._common.prefix import drop_keys
from kernels.decay import normalise


def bidirectional(
    scan: Callable[..., Any],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *writes: Tensor,
    log_g: Tensor | None = None,
    log_g_back: Tensor | None = None,
    log_i: Tensor | None = None,
    key_mask: Tensor | None = None,
    normalizer: str | None = None,
    **options: Any,
) -> Tensor:
    """Run ``scan`` (``decay_scan`` or ``delta_scan``) in both directions over N = M tokens and add the results.

    Args:
        q: Queries, [B, H, N, D].
        k: Keys, [B, H, N, D].
        v: Values, [B, H, N, E].
        writes: Further positional key-side tensors of the scan (``beta``).
        log_g: Gates of the forward direction. A gate stands before its token's write, so the backward direction takes the same gates
            one token later: what lies between two tokens decays alike both ways.
        log_g_back: Own gates of the backward direction instead.
        log_i: Log input gates, for scans that take them.
        key_mask: Keys to keep, bool [B, N].
        normalizer: For scans that take one: numerators and sums of weights are added before the division.
        options: Passed to both scans.

    Returns:
        [B, H, N, E], dtype of ``v``.
    """
    # Masked here and not in the scans: shifted by a token, a padded place holds the gate of the kept token behind it.
    k, v, log_g, log_g_back, log_i, *writes = drop_keys(
        key_mask, (k, 0.0), (v, 0.0), (log_g, 0.0), (log_g_back, 0.0), (log_i, float("-inf")), *((w, 0.0) for w in writes)
    )  # fmt: skip
    if log_g_back is None and log_g is not None:
        later = log_g[:, :, 1:]
        log_g_back = F.pad(later, (0, 0) * (later.dim() - 3) + (0, 1))
    if log_i is not None:
        options["log_i"] = log_i
    if normalizer is not None:
        options["normalizer"] = "none" if normalizer == "none" else "raw"
    forward = scan(q, k, v, *writes, log_g=log_g, read="inclusive", **options)
    backward = scan(q, k, v, *writes, log_g=log_g_back, read="exclusive", reverse=True, **options)
    if normalizer in (None, "none"):
        return forward + backward
    return normalise([forward, backward], normalizer).to(v.dtype)


__all__ = ["bidirectional"]
