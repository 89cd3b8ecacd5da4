"""Registered operators ``zoo::softmax_fwd`` and ``zoo::softmax_bwd``; torch only, Triton inside.

Opaque to torch.compile. A backward that runs under ``create_graph=True`` recomputes the attention from differentiable torch functions: second
derivatives are exact, at the price of the explicit path. ``left`` and ``right`` are -1 where the window has no limit.
"""

import torch
from torch import Tensor


@torch.library.custom_op("zoo::softmax_fwd", mutates_args=())
def softmax_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    key_mask: Tensor | None,
    pos_q: Tensor | None,
    pos_k: Tensor | None,
    left: int,
    right: int,
    aligned: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """O [B, H, N, E] in the dtype of q and lse [B, H, N] in float32."""
    from kernels.softmax import launch

    return launch.fwd(q, k, v, bias, key_mask, pos_q, pos_k, left, right, aligned, scale)


@softmax_fwd.register_fake
def _(q, k, v, bias, key_mask, pos_q, pos_k, left, right, aligned, scale):
    return q.new_empty(*q.shape[:3], v.shape[-1]), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("zoo::softmax_bwd", mutates_args=())
def softmax_bwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    key_mask: Tensor | None,
    pos_q: Tensor | None,
    pos_k: Tensor | None,
    left: int,
    right: int,
    aligned: bool,
    scale: float,
    lse: Tensor,
    do: Tensor,
    delta: Tensor,
    want_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and bias (empty if not wanted; float32)."""
    from kernels.softmax import launch

    return launch.bwd(
        q, k, v, bias, key_mask, pos_q, pos_k, left, right, aligned, scale, lse, do, delta, want_bias
    )


@softmax_bwd.register_fake
def _(q, k, v, bias, key_mask, pos_q, pos_k, left, right, aligned, scale, lse, do, delta, want_bias):
    dense = lambda t: t.new_empty(t.shape)  # noqa: E731
    db = q.new_empty(bias.shape if want_bias else (0,), dtype=torch.float32)
    return dense(q), dense(k), dense(v), db


def _again(q, k, v, bias, key_mask, pos_q, pos_k, left, right, scale):
    """The same outputs in differentiable operations."""
    from kernels.softmax import reference
    from kernels.softmax.torch import _visible

    if key_mask is not None:
        k, v = (t.masked_fill(~key_mask[:, None, :, None], 0.0) for t in (k, v))
    window = (None if left < 0 else left, None if right < 0 else right)
    banded = left >= 0 or right >= 0
    n, m = q.shape[2], k.shape[2]
    visible = None
    if key_mask is not None or banded:
        visible = _visible(key_mask, pos_q if banded else None, pos_k, window, 0, n, 0, m)
    bias = None if bias is None else bias.float()
    out, lse = reference.attention(q.float(), k.float(), v.float(), visible=visible, bias=bias, scale=scale)
    return out.to(q.dtype), lse


def _bias_kernel(q: Tensor, v: Tensor) -> bool:
    """Elsewhere the bias gradient comes from torch, with a matrix of N x M."""
    from kernels.softmax import launch

    return launch.bias_kernel(str(q.dtype)[6:], q.shape[-1], v.shape[-1])


def _setup(ctx, inputs, output):
    q, k, v, bias, key_mask, pos_q, pos_k, left, right, aligned, scale = inputs
    out, lse = output
    ctx.save_for_backward(q, k, v, bias, key_mask, pos_q, pos_k, out, lse)
    ctx.options = (left, right, aligned, scale)


def _backward(ctx, do, dlse):
    q, k, v, bias, key_mask, pos_q, pos_k, out, lse = ctx.saved_tensors
    left, right, aligned, scale = ctx.options
    rest = (None,) * 7
    if torch.is_grad_enabled():
        # Aliases cut paths between the inputs: k may itself be a function of q.
        alias = [None if t is None else t.view_as(t) for t in (q, k, v, bias)]
        wanted = [i for i, t in enumerate(alias) if t is not None and t.requires_grad]
        found = torch.autograd.grad(
            _again(*alias, key_mask, pos_q, pos_k, left, right, scale), [alias[i] for i in wanted],
            [do, dlse.masked_fill(lse == -torch.inf, 0.0)], create_graph=True, allow_unused=True,
        )  # fmt: skip
        grads = [None] * 4
        for i, g in zip(wanted, found, strict=True):
            grads[i] = g
        return *grads, *rest
    # Rows without a key have no gradient, whatever arrives for their lse.
    dlse = dlse.float().masked_fill(lse == -torch.inf, 0.0)
    delta = (do.float() * out.float()).sum(-1) - dlse
    want_bias = bias is not None and ctx.needs_input_grad[3]
    kernel = want_bias and _bias_kernel(q, v)
    dq, dk, dv, db = softmax_bwd(
        q, k, v, bias, key_mask, pos_q, pos_k, left, right, aligned, scale, lse, do, delta, kernel
    )
    if want_bias and not kernel:
        with torch.enable_grad():
            leaf = bias.detach().requires_grad_()
            found = _again(*(t.detach() for t in (q, k, v)), leaf, key_mask, pos_q, pos_k, left, right, scale)
            (db,) = torch.autograd.grad(found, leaf, [do, dlse])
    return dq, dk, dv, db.to(bias.dtype) if want_bias else None, *rest


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
) -> tuple[Tensor, Tensor]:
    """Through the registered operators; see ``kernels.softmax.attention``."""
    left, right = (-1 if side is None else side for side in window)
    if key_mask is not None:
        # NaN or infinity in a masked row would survive a weight of zero.
        drop = ~key_mask[:, None, :, None]
        k, v = k.masked_fill(drop, 0.0), v.masked_fill(drop, 0.0)
    if bias is not None and bias.shape[3] == 1:
        bias = bias.expand(*bias.shape[:3], k.shape[2])
    return softmax_fwd(q, k, v, bias, key_mask, pos_q, pos_k, left, right, aligned, float(scale))
