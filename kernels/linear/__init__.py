"""Linear attention with a global or prefix state, and MALA's read of that state.

B batch, H heads, N queries, M keys, D head size of queries and keys, F feature size, E head size of values.

The state of a set of keys is ``S = sum_j phi(k_j) v_j^T`` with ``sum_j phi(k_j)``, ``sum_j v_j`` and the key count; queries read it in
O(F E). Self and cross attention use one global state; causal calls give query i the state of its own prefix, key index <= p(i),
``p(i) = i + M - N`` (aligned at the end) or explicit ``positions``.

Implementations: ``reference`` builds the [N, M] matrix; ``torch`` is linear in N and differentiable any number of times; ``triton`` has
forward and backward kernels for the global state and both reads (see ``triton.py``); for causal calls it takes the products over prefixes from
the kernels of ``kernels.decay`` (a scan without decay), and the running sums, which are memory bound, from torch. Features "taylor2" have kernels
that never write them (``taylor.py``); other maps that are not pointwise are written.

Sources: arXiv 2006.16236 (linear attention), arXiv 2507.00698 (MALA; the default is the official code's form, where phi(k) is divided
by the number of keys: ``key_norm="mean"``; the paper's formula is ``"sum"``). Causal and cross forms of MALA are this project's: means run
over the keys that a query sees.
"""

from torch import Tensor

from kernels._common.checks import Positions, check_key_mask, check_qkv, work_dtype
from kernels._common.choice import choose
from kernels.linear import reference
from kernels.linear import torch as torch_path
from kernels.linear.features import (
    FEATURES,
    POINTWISE,
    Feature,
    apply_feature,
    check_feature,
    feature_size,
    taylor2,
)
from kernels.linear.options import (
    check_causal,
    check_initial,
    check_key_bias,
    check_option,
    check_rotated,
    gap,
    key_weight,
    prefix,
    product,
    rounded,
    visible_keys,
)
from kernels.linear.states import cost, global_state, linear_read, mala_read
from kernels.linear.torch import LinearState, add_states

__all__ = [
    "FEATURES",
    "LinearState",
    "add_states",
    "apply_feature",
    "cost",
    "feature_size",
    "global_state",
    "linear_attention",
    "linear_read",
    "mala",
    "mala_read",
    "taylor2",
]


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    feature: Feature = "elu1",
    key_mask: Tensor | None = None,
    key_bias: Tensor | None = None,
    causal: bool = False,
    positions: Positions | None = None,
    normalize: str = "denom",
    eps: float = 1e-6,
    initial_state: LinearState | None = None,
    impl: str | None = None,
) -> Tensor:
    """Attention with weights ``phi(q_i).phi(k_j)``.

    ``o_i = sum_j phi(q_i).phi(k_j) e^{b_j} v_j / (sum_j phi(q_i).phi(k_j) e^{b_j} + eps)``; without the denominator for
    ``normalize="none"``, and for ``feature="softmax"``, whose weights sum to one by themselves.

    Args:
        q: Queries, [B, H, N, D].
        k: Keys, [B, H, M, D].
        v: Values, [B, H, M, E].
        feature: A name from ``FEATURES`` or a function [..., D] -> [..., F]; "identity" for tensors that are features already.
        key_mask: Keys to keep, bool [B, M]; rows without any kept key give zeros.
        key_bias: Log weight of each key, broadcastable to [B, H, M]; needs a feature map without negative values. Positive
            values beyond 30 are capped.
        causal: Query i reads keys up to position p(i) only.
        positions: For causal calls: p as integers [N] or [B, N] (index of the last key to read; below 0: none), or a pair of
            query and key positions. Left out: ``i + M - N``.
        normalize: "denom" or "none".
        eps: Added to the denominator.
        initial_state: State of keys that come before ``k`` and that every query sees.
        impl: "reference", "torch", "triton"; None chooses by context, environment and device.

    Returns:
        [B, H, N, E], dtype of ``v``.

    Raises:
        ValueError: Shapes or options that do not fit.
        NotImplementedError: An explicit implementation lacks what was asked.
    """
    op = "linear_attention"
    check_qkv(op, q, k, v)
    check_key_mask(op, key_mask, k.shape[0], k.shape[2])
    check_feature(op, feature)
    check_option(op, "normalize", normalize, ("denom", "none"))
    check_causal(op, feature, causal, positions)
    key_bias = check_key_bias(op, key_bias, feature, k)
    impl = choose(op, impl, q, k, v, triton_gap=gap(op, causal, initial_state, feature, q))
    if feature == "softmax":
        normalize = "none"
    dtype = v.dtype
    if impl == "triton" and feature == "taylor2" and initial_state is None:
        from kernels.linear import taylor

        side = [k, v] if key_bias is None else [k, v, key_weight(key_bias)[..., None]]
        before = None
        if causal:
            before, side, key_mask = prefix(op, positions, q, side, key_mask)
        return taylor.attention(
            q, *side, key_mask=key_mask, causal=causal, before=before, normalize=normalize, eps=eps
        ).to(dtype)
    if impl == "triton" and not causal:
        from kernels.linear import ops

        if not (isinstance(feature, str) and feature in POINTWISE):
            q = apply_feature(feature, q)
            k = apply_feature(feature, k, side="k", key_mask=key_mask)
            feature = "identity"
        return ops.linear_attention(q, k, v, key_mask, key_weight(key_bias), feature, normalize, eps)
    work = work_dtype(dtype)
    q, k, v = q.to(work), k.to(work), v.to(work)
    if impl == "reference":
        if initial_state is not None:
            raise NotImplementedError(f"{op}: the reference takes no initial_state; use impl='torch'")
        visible = visible_keys(op, causal, positions, q, k)
        return reference.linear_attention(
            q,
            k,
            v,
            feature=feature,
            key_mask=key_mask,
            key_bias=key_bias,
            visible=visible,
            normalize=normalize,
            eps=eps,
        ).to(dtype)
    (k,) = torch_path.drop_keys(key_mask, k)
    phi_q, phi_k = apply_feature(feature, q), apply_feature(feature, k, side="k", key_mask=key_mask)
    check_initial(op, initial_state, phi_k, v)
    if key_bias is not None:
        phi_k = phi_k * key_weight(key_bias)[..., None]
    if not causal:
        state = add_states(
            initial_state, torch_path.global_state(phi_k, v, key_mask, initial_state is not None, None)
        )
        return torch_path.linear_read(phi_q, state, normalize, eps).to(dtype)
    before, (phi_k, v), key_mask = prefix(op, positions, phi_q, [phi_k, v], key_mask)
    if impl == "triton":
        phi_q, phi_k = (rounded(t, dtype) for t in (phi_q, phi_k))
    return torch_path.causal(
        phi_q,
        phi_k,
        v,
        key_mask=key_mask,
        before=before,
        initial=initial_state,
        read="linear",
        normalize=normalize,
        eps=eps,
        product=product(impl, dtype),
    ).to(dtype)


def mala(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    feature: Feature = "elu1",
    key_norm: str = "mean",
    key_mask: Tensor | None = None,
    causal: bool = False,
    positions: Positions | None = None,
    rotated: tuple[Tensor, Tensor] | None = None,
    scale: float | None = None,
    eps: float = 1e-6,
    initial_state: LinearState | None = None,
    impl: str | None = None,
) -> Tensor:
    """Magnitude-aware linear attention: linear attention plus a centred term that grows with the query's magnitude.

    ``o_i = (1 + 1/(z_i + eps)) sum_j s'_ij v_j - z_i mean_j v_j`` with ``s_ij = scale phi(q_i).phi(k_j) / M``, ``z_i = sum_j s_ij`` and s'
    the same product of rotated features; ``key_norm="sum"`` leaves out the division by the number of keys M. M counts kept, visible
    keys. Computed as linear attention plus centred term in float32.

    Args:
        q: Queries before the feature map, [B, H, N, D].
        k: Keys before the feature map, [B, H, M, D].
        v: Values, [B, H, M, E].
        feature: As in ``linear_attention``; "softmax" is not defined here.
        key_norm: "mean" (official code) or "sum" (paper).
        key_mask: Keys to keep, bool [B, M]; rows without any kept key give zeros.
        causal: Query i reads keys up to position p(i) only.
        positions: As in ``linear_attention``.
        rotated: Rotary-encoded ``phi(q)`` [B, H, N, F] and ``phi(k)`` [B, H, M, F]; z uses the features without rotation. Then
            weights no longer sum to one.
        scale: Factor of the scores; ``F ** -0.5`` if left out.
        eps: Added to z in the quotient.
        initial_state: State of earlier keys, with ``vsum`` (and ``ksum_rot`` when rotated).
        impl: As in ``linear_attention``.

    Returns:
        [B, H, N, E], dtype of ``v``.

    Raises:
        ValueError: Shapes or options that do not fit.
        NotImplementedError: An explicit implementation lacks what was asked.
    """
    op = "mala"
    check_qkv(op, q, k, v)
    check_key_mask(op, key_mask, k.shape[0], k.shape[2])
    check_feature(op, feature)
    check_option(op, "key_norm", key_norm, ("mean", "sum"))
    if feature == "softmax":
        raise ValueError(
            "mala: feature 'softmax' normalises keys over positions and leaves nothing to centre; use elu1, relu or exp"
        )
    check_causal(op, feature, causal, positions)
    if initial_state is not None and (
        initial_state.vsum is None or (initial_state.ksum_rot is None) != (rotated is None)
    ):
        raise ValueError("mala: initial_state needs vsum, and ksum_rot exactly when rotated= is given")
    check_rotated(op, rotated, feature, q, k)
    impl = choose(op, impl, q, k, v, triton_gap=gap(op, causal, initial_state, feature, q))
    dtype, work = v.dtype, work_dtype(v.dtype)
    if impl == "triton" and not causal:
        from kernels.linear import ops

        if not (isinstance(feature, str) and feature in POINTWISE):
            q, k, feature = apply_feature(feature, q), apply_feature(feature, k), "identity"
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        return ops.mala(q, k, v, rotated, key_mask, feature, key_norm, scale, eps)
    q, k, v = q.to(work), k.to(work), v.to(work)
    rotated = None if rotated is None else (rotated[0].to(work), rotated[1].to(work))
    if impl == "reference":
        if initial_state is not None:
            raise NotImplementedError(f"{op}: the reference takes no initial_state; use impl='torch'")
        size = apply_feature(feature, q[..., :0, :]).shape[-1]
        visible = visible_keys(op, causal, positions, q, k)
        return reference.mala(
            q,
            k,
            v,
            feature=feature,
            rotated=rotated,
            key_mask=key_mask,
            visible=visible,
            key_norm=key_norm,
            scale=size**-0.5 if scale is None else scale,
            eps=eps,
        ).to(dtype)
    (k,) = torch_path.drop_keys(key_mask, k)
    phi_q, phi_k = apply_feature(feature, q), apply_feature(feature, k)
    check_initial(op, initial_state, phi_k, v)
    scale = phi_q.shape[-1] ** -0.5 if scale is None else scale
    if not causal:
        state = torch_path.global_state(phi_k, v, key_mask, True, None if rotated is None else rotated[1])
        state = add_states(initial_state, state)
        q_rot = None if rotated is None else rotated[0]
        return torch_path.mala_read(phi_q, state, q_rot, key_norm, scale, eps).to(dtype)
    if impl == "triton":
        phi_q, phi_k = (rounded(t, dtype) for t in (phi_q, phi_k))
    key_side = [phi_k, v] if rotated is None else [phi_k, v, rotated[1]]
    before, key_side, key_mask = prefix(op, positions, phi_q, key_side, key_mask)
    return torch_path.causal(
        phi_q,
        key_side[0],
        key_side[1],
        key_mask=key_mask,
        before=before,
        initial=initial_state,
        read="mala",
        key_norm=key_norm,
        scale=scale,
        eps=eps,
        rotated=None if rotated is None else (rotated[0], key_side[2]),
        product=product(impl, dtype),
    ).to(dtype)
