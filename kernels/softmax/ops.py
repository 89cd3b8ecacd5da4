"""Registered operators ``zoo::softmax_fwd`` and ``zoo::softmax_bwd``; torch only, Triton inside.

Opaque to torch.compile. A backward that runs under ``create_graph=True`` recomputes the attention from differentiable torch functions: second
derivatives are exact, at the price of the explicit path. ``left`` and ``right`` are -1 where the window has no limit, ``softcap`` 0 and ``mod`` empty
where there is none. Gradients that no kernel computes (tables of score mods; the bias where its kernel does not fit) come from torch, a block of rows at a time.
"""

from typing import Any

import torch
from torch import Tensor

from kernels.softmax import reference
from kernels.softmax.skipping import log_limit
from kernels.softmax.torch import BLOCK_ELEMENTS, Mod, _block, _visible

_CALL = (
    "Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? phi_q, Tensor? phi_k, Tensor? table_a, Tensor? table_b, Tensor? post, "
    "Tensor? key_mask, Tensor? pos_q, Tensor? pos_k, Tensor? limit, int left, int right, bool aligned, float scale, float softcap, int[] mod, int[] skip"
)
# q ... table_b may have gradients; limit is the last tensor.
_LEAVES, _TENSORS = 8, 13


@torch.library.custom_op("zoo::softmax_fwd", mutates_args=(), schema=f"({_CALL}) -> (Tensor, Tensor, Tensor)")
def softmax_fwd(*call: Any) -> tuple[Tensor, Tensor, Tensor]:
    """O [B, H, N, E] in the dtype of q, lse [B, H, N] in float32 and marks of kept tiles (empty without ``skip``)."""
    from kernels.softmax import launch

    return launch.fwd(launch.Problem(*call))


@softmax_fwd.register_fake
def _(q, k, v, *rest):
    kept = (0,)
    if rest[-1]:
        rows, keys = rest[-1]
        kept = (q.shape[0] * q.shape[1], -(-q.shape[2] // rows), -(-k.shape[2] // keys))
    out = q.new_empty(*q.shape[:3], v.shape[-1])
    return out, q.new_empty(q.shape[:3], dtype=torch.float32), q.new_empty(kept, dtype=torch.uint8)


@torch.library.custom_op(
    "zoo::softmax_bwd",
    mutates_args=(),
    schema=f"({_CALL}, Tensor lse, Tensor do, Tensor delta, bool want_bias, Tensor kept) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def softmax_bwd(*call: Any) -> tuple[Tensor, ...]:
    """Gradients of q, k, v, the factors (per sample and head) and the bias; the last three are float32, empty where there are none."""
    from kernels.softmax import launch

    found = launch.bwd(launch.Problem(*call[:-5]), *call[-5:])
    return tuple(call[0].new_empty(0, dtype=torch.float32) if g is None else g for g in found)


@softmax_bwd.register_fake
def _(q, k, v, bias, phi_q, phi_k, *rest):
    single = lambda *shape: q.new_empty(shape, dtype=torch.float32)  # noqa: E731
    factors = [single(0) if f is None else single(*q.shape[:2], *f.shape[2:]) for f in (phi_q, phi_k)]
    db = single(*bias.shape) if rest[-2] else single(0)
    return *(t.new_empty(t.shape) for t in (q, k, v)), *factors, db


def _some_rows(call: tuple, start: int, stop: int, kept: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Output and lse of queries ``start ... stop`` in differentiable operations; ``kept`` marks tiles as the forward left them."""
    q, k, v, bias, phi_q, phi_k, a, b, post, key_mask, pos_q, pos_k, _ = call[:_TENSORS]
    left, right, _, scale, softcap, mod, skip = call[_TENSORS:]
    if key_mask is not None:
        k, v = (t.masked_fill(~key_mask[:, None, :, None], 0.0) for t in (k, v))
    m = k.shape[2]
    window = (None if left < 0 else left, None if right < 0 else right)
    banded = left >= 0 or right >= 0
    visible = None
    if key_mask is not None or banded:
        visible = _visible(key_mask, pos_q if banded else None, pos_k, window, start, stop, 0, m)
    if skip:
        met = kept.bool().repeat_interleave(skip[0], 1).repeat_interleave(skip[1], 2)
        met = met.unflatten(0, q.shape[:2])[:, :, start:stop, :m]
        visible = met if visible is None else visible & met
    added = [] if bias is None else [_block(bias, start, stop, 0, m).float()]
    if phi_q is not None:
        added.append(phi_q[:, :, start:stop].float() @ phi_k.float().mT)
    if mod:
        tables = tuple(t for t in (a, b) if t is not None)
        added.append(Mod(tuple(mod), tables, pos_q, pos_k).block(start, stop, 0, m))
    out, lse = reference.attention(
        q[:, :, start:stop].float(), k.float(), v.float(), visible=visible, bias=sum(added[1:], added[0]) if added else None,
        scale=scale, softcap=softcap or None, post=None if post is None else _block(post, start, stop, 0, m),
    )  # fmt: skip
    return out.to(q.dtype), lse


def _by_rows(call: tuple, wanted: list[int], do: Tensor, dlse: Tensor) -> list[Tensor]:
    """Gradients of some inputs without a matrix of N x M."""
    batch, heads, n = call[0].shape[:3]
    rows = max(1, min(n, BLOCK_ELEMENTS // max(1, batch * heads * call[1].shape[2])))
    call = [t.detach() if isinstance(t, Tensor) else t for t in call]
    for i in wanted:
        call[i].requires_grad_()
    total = [torch.zeros_like(call[i]) for i in wanted]
    with torch.enable_grad():
        for start in range(0, n, rows):
            part = slice(start, start + rows)
            found = _some_rows(tuple(call), start, min(start + rows, n))
            grads = torch.autograd.grad(found, [call[i] for i in wanted], [do[:, :, part], dlse[:, :, part]])
            total = [t + g for t, g in zip(total, grads, strict=True)]
    return total


def _bias_kernel() -> bool:
    from kernels.softmax import tiles

    return tiles.bias_kernel()


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:_TENSORS], *output)
    ctx.options = inputs[_TENSORS:]


def _backward(ctx, do, dlse, _):
    *tensors, out, lse, kept = ctx.saved_tensors
    call = (*tensors, *ctx.options)
    rest = (None,) * (len(call) - _LEAVES)
    # Rows without a key have no gradient, whatever arrives for their lse.
    dlse = dlse.float().masked_fill(lse == -torch.inf, 0.0)
    needed = [t is not None and need for t, need in zip(call, ctx.needs_input_grad[:_LEAVES], strict=False)]
    if torch.is_grad_enabled():
        # Aliases cut paths between the inputs: k may itself be a function of q.
        call = [t.view_as(t) if isinstance(t, Tensor) else t for t in call]
        wanted = [i for i, need in enumerate(needed) if need]
        found = torch.autograd.grad(
            _some_rows(tuple(call), 0, call[0].shape[2], kept), [call[i] for i in wanted], [do, dlse], create_graph=True, allow_unused=True
        )  # fmt: skip
        grads: list[Tensor | None] = [None] * _LEAVES
        for i, g in zip(wanted, found, strict=True):
            grads[i] = g
        return *grads, *rest
    delta = (do.float() * out.float()).sum(-1) - dlse
    q = call[0]
    kernel = needed[3] and _bias_kernel()
    grads = list(softmax_bwd(*call, lse, do, delta, kernel, kept))
    grads = [*grads[:3], grads[5] if kernel else None, *grads[3:5], None, None]
    for i in (4, 5):
        grads[i] = grads[i].sum_to_size(call[i].shape) if needed[i] else None
    others = [i for i in (3, 6, 7) if needed[i] and grads[i] is None]
    if others and 0 not in (*q.shape[:3], call[1].shape[2]):
        for i, g in zip(others, _by_rows(call, others, do, dlse), strict=True):
            grads[i] = g
    grads = [None if g is None else g.to(t.dtype) for g, t in zip(grads, call, strict=False)]
    return *grads, *rest


softmax_fwd.register_autograd(_backward, setup_context=_setup)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    key_mask: Tensor | None,
    bias: Tensor | None,
    pos_q: Tensor | None,
    pos_k: Tensor | None,
    aligned: bool,
    window: tuple[int | None, int | None],
    scale: float,
    softcap: float | None,
    factors: tuple[Tensor, Tensor] | None,
    mod: Mod | None,
    post: Tensor | None,
    skip: reference.Skip | None,
) -> tuple[Tensor, Tensor]:
    """Through the registered operators; see ``kernels.softmax.attention``."""
    left, right = (-1 if side is None else side for side in window)
    if key_mask is not None:
        # NaN or infinity in a masked row would survive a weight of zero.
        drop = ~key_mask[:, None, :, None]
        k, v = k.masked_fill(drop, 0.0), v.masked_fill(drop, 0.0)
    wide = lambda t: t.expand(*t.shape[:3], k.shape[2]) if t is not None and t.shape[3] == 1 else t  # noqa: E731
    tables: tuple[Tensor | None, ...] = (None, None)
    if mod is not None:
        tables, pos_q, pos_k = (*mod.tables, None)[:2], mod.pos_q, mod.pos_k
    b, h, n, d = q.shape
    hk = k.shape[1]
    # One query (decoding): the heads of a group become its rows, so that they share the reads of their keys.
    packed = n == 1 and h != hk and left < 0 and (right < 0 or aligned)
    packed = packed and all(option is None for option in (bias, post, factors, mod, skip))
    if packed:
        q, right, pos_q, pos_k = q.reshape(b, hk, h // hk, d), -1, None, None
    limit = None
    if skip is not None:
        limit = log_limit(skip, k, key_mask, pos_q, pos_k, window).expand(-1, n)
        if skip.voting is not None:
            limit = limit.masked_fill(~skip.voting, 1e30)  # finite: it is added to maxima of -inf
    out, lse, _ = softmax_fwd(
        q, k, v, wide(bias), *(factors or (None, None)), *tables, wide(post), key_mask, pos_q, pos_k, limit,
        left, right, aligned, float(scale), float(softcap or 0.0), list(mod.code) if mod is not None else [],
        [skip.rows, skip.keys] if skip is not None else [],
    )  # fmt: skip
    return (out.reshape(b, h, 1, -1), lse.reshape(b, h, 1)) if packed else (out, lse)
