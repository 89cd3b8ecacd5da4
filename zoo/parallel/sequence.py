"""Attention over a sequence of which every process holds one contiguous part, in rank order.

Source: LASP-2 and LASP-2H, arXiv:2502.07563. Letters: W processes, B batch, H heads, N own queries, M own keys, D, E head widths.

Whatever sums keys into a state (linear, MALA, decay, delta rule) needs one all-gather of states forward and one reduce-scatter
backward, B H D E numbers each whatever the length; each process then reads what lies before its part (causal) or everything. Softmax
(LASP-2H) gathers keys and values, whose size grows with the length.

Differs from the paper in: the gather does not overlap with the products inside the own part, since the kernels take the incoming state as
their initial state and so normalise once. The delta rule is this project's: a process's part acts on a state as a D x D matrix,
which travels beside its state. Parts may differ in length for all but softmax.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kernels import decay, delta, linear, softmax
from kernels._common.checks import work_dtype
from zoo.parallel.collectives import all_gather

Group = dist.ProcessGroup | None


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    feature: Any = "elu1",
    key_mask: Tensor | None = None,
    causal: bool = False,
    normalize: str = "denom",
    eps: float = 1e-6,
    group: Group = None,
) -> Tensor:
    """`kernels.linear.linear_attention` over all processes' keys.

    Args:
        q: Own queries, [B, H, N, D].
        k: Own keys, [B, H, M, D].
        v: Own values, [B, H, M, E].
        feature: Feature map, not "softmax", which normalises over all positions.
        key_mask: Own keys to keep, bool [B, M].
        causal: Queries read what lies before them.
        normalize: "denom" or "none".
        eps: Added to the denominator.
        group: Process group.

    Returns:
        [B, H, N, E].
    """
    place = {"feature": feature, "key_mask": key_mask, "causal": causal, "group": group}
    options = {"normalize": normalize, "eps": eps}
    return _by_state(linear.linear_attention, linear.linear_read, q, k, v, **place, options=options)


def mala(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    feature: Any = "elu1",
    key_norm: str = "mean",
    key_mask: Tensor | None = None,
    causal: bool = False,
    eps: float = 1e-6,
    group: Group = None,
) -> Tensor:
    """`kernels.linear.mala` over all processes' keys; arguments as in `linear_attention`."""
    place = {"feature": feature, "key_mask": key_mask, "causal": causal, "group": group}
    options = {"key_norm": key_norm, "eps": eps}
    return _by_state(linear.mala, linear.mala_read, q, k, v, **place, options=options)


def _by_state(
    scan: Callable[..., Tensor],
    read: Callable[..., Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    feature: Any,
    key_mask: Tensor | None,
    causal: bool,
    group: Group,
    options: dict[str, Any],
) -> Tensor:
    """Read the state of all processes; or scan the own part, starting from the state of those before it."""
    if feature == "softmax":
        raise NotImplementedError(
            "sequence parallelism has no feature 'softmax', which normalises keys over all positions; use elu1, relu or exp"
        )
    phi_k = linear.apply_feature(feature, k, side="k", key_mask=key_mask)
    own = linear.global_state(phi_k, v, key_mask, want_v=True)
    if causal and scan is linear.linear_attention:  # which has no use for it
        own = own._replace(vsum=None)
    fields = {name: t for name, t in own._asdict().items() if t is not None}
    parts = _gather(list(fields.values()), group)
    until = dist.get_rank(group) if causal else dist.get_world_size(group)
    state = own._replace(**{name: part[:until].sum(0) for name, part in zip(fields, parts, strict=True)})
    q = linear.apply_feature(feature, q)
    if not causal:
        return read(q, state, **options)
    rest = {"feature": "identity", "key_mask": key_mask, "causal": True}
    return scan(q, phi_k, v, initial_state=state, **rest, **options)


def decay_scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    log_g: Tensor | None = None,
    normalizer: str = "none",
    key_mask: Tensor | None = None,
    group: Group = None,
) -> Tensor:
    """`kernels.decay.decay_scan` over all processes' keys; scalar or per-channel decay, without mLSTM's input gate.

    Args:
        q: Own queries, already scaled, [B, H, N, D], N = M.
        k: Own keys, [B, H, M, D].
        v: Own values, [B, H, M, E].
        log_g: Log decay before each write, [B, H, M] or [B, H, M, D].
        normalizer: "none" or "denom".
        key_mask: Own keys to keep, bool [B, M].
        group: Process group.

    Returns:
        [B, H, N, E].
    """
    if normalizer not in ("none", "denom"):
        raise NotImplementedError(f"sequence parallelism has no normalizer {normalizer!r}; use none or denom")
    options = {"log_g": log_g, "normalizer": normalizer, "key_mask": key_mask}
    own = decay.decay_state(k, v, **options).kv
    if log_g is None:
        (states,) = _gather([own], group)
        start = _carried(states, lambda part, state: state, group)
    else:
        total = log_g if key_mask is None else log_g.masked_fill(~_over_heads(key_mask, log_g), 0.0)
        total = total.to(own.dtype).sum(2)  # [B, H] or [B, H, D]
        states, totals = _gather([own, total], group)
        factors = totals.exp().reshape(*totals.shape[:3], -1, 1)  # [W, B, H, 1 or D, 1]
        start = _carried(states, lambda part, state: factors[part] * state, group)
    return decay.decay_scan(q, k, v, initial_state=decay.DecayState(start), **options)


def delta_scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    *,
    log_g: Tensor | None = None,
    key_mask: Tensor | None = None,
    group: Group = None,
) -> Tensor:
    """`kernels.delta.delta_scan` over all processes' keys; states and their D x D transitions travel.

    Args:
        q: Own queries, already scaled, [B, H, N, D], N = M.
        k: Own keys, [B, H, M, D].
        v: Own values, [B, H, M, E].
        beta: Strength of each write, [B, H, M].
        log_g: Log decay before each write, None, [B, H, M] or [B, H, M, D].
        key_mask: Own keys to keep, bool [B, M].
        group: Process group.

    Returns:
        [B, H, N, E].
    """
    options = {"log_g": log_g, "key_mask": key_mask}
    width = k.shape[-1]
    # Values beside zeros, started from nothing beside the identity: the last columns become the transition.
    wide = torch.cat((v, v.new_zeros(*v.shape[:3], width)), -1)
    work = work_dtype(v.dtype)
    empty = k.new_zeros(*k.shape[:2], width, v.shape[-1], dtype=work)
    unit = torch.eye(width, dtype=work, device=k.device).expand(*k.shape[:2], width, width)
    last = delta.delta_state(k, wide, beta, initial_state=torch.cat((empty, unit), -1), **options)
    (parts,) = _gather([last], group)
    states, transitions = parts.split((v.shape[-1], width), -1)
    start = _carried(states, lambda part, state: transitions[part] @ state, group)
    return delta.delta_scan(q, k, v, beta, initial_state=start, **options)


def softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    key_mask: Tensor | None = None,
    causal: bool = False,
    group: Group = None,
    **options: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """`kernels.softmax.attention` over all processes' keys (LASP-2H): keys and values are gathered, queries stay.

    Args:
        q: Own queries, [B, H, N, D].
        k: Own keys, [B, Hk, M, D]; the same M everywhere. Grouped heads make what travels smaller.
        v: Own values, [B, Hk, M, E].
        key_mask: Own keys to keep, bool [B, M], on all processes or on none.
        causal: Queries read what lies before them; N = M.
        group: Process group.
        **options: Of the kernel: scale, softcap, window, return_lse, higher_order.

    Returns:
        [B, H, N, E]; with `return_lse` also [B, H, N].
    """
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    lengths = [None] * world
    dist.all_gather_object(lengths, k.shape[2], group=group)
    if len(set(lengths)) > 1:
        raise ValueError(
            f"softmax_attention: parts have {lengths} keys; pad them to one length and mask the padding"
        )
    k, v = (_join(part) for part in _gather([k, v], group))
    if key_mask is not None:
        masks = [torch.empty_like(key_mask) for _ in range(world)]
        dist.all_gather(masks, key_mask.contiguous(), group=group)
        key_mask = torch.cat(masks, 1)
    positions = torch.arange(q.shape[2], device=q.device) + rank * lengths[0]
    banded = causal or options.get("window") is not None
    return softmax.attention(
        q,
        k,
        v,
        key_mask=key_mask,
        causal=causal,
        positions=positions if banded else None,
        **options,
    )


def _carried(states: Tensor, onward: Callable[[int, Tensor], Tensor], group: Group) -> Tensor:
    """The state that reaches this process: every part before it lets through what came and adds its own.

    Args:
        states: What each part makes of nothing, [W, ...].
        onward: What a part, by number, lets through of a state.
        group: Process group.
    """
    # Zeros that hang on what was gathered: the first process, too, has to take part in the backward collective.
    start = states[:0].sum(0)
    for part in range(dist.get_rank(group)):
        start = onward(part, start) + states[part]
    return start


def _join(parts: Tensor) -> Tensor:
    """[W, B, H, M, D] to [B, H, W M, D]."""
    return parts.permute(1, 2, 0, 3, 4).flatten(2, 3)


def _gather(tensors: list[Tensor], group: Group) -> list[Tensor]:
    """Gather several tensors in one collective; each comes back as [W, *shape]."""
    flat = all_gather(torch.cat([t.flatten() for t in tensors]), group)
    sizes = [t.numel() for t in tensors]
    parts = flat.split(sizes, 1)
    return [part.unflatten(1, t.shape) for part, t in zip(parts, tensors, strict=True)]


def _over_heads(key_mask: Tensor, log_g: Tensor) -> Tensor:
    return key_mask[:, None, :] if log_g.dim() == 3 else key_mask[:, None, :, None]
