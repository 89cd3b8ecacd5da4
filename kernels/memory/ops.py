"""Registered operator ``zoo::memory_walk_fwd``, and the scan of a linear memory on top of it; torch only, Triton inside.

Its gradient is the same operator (see ``triton.py``), so derivatives of every order are exact. What happens inside chunks is parallel over them and
made of batched products: torch's.
"""

import torch
from torch import Tensor

from kernels._common.prefix import chunked
from kernels.delta.ops import pairs
from kernels.memory import torch as torch_path


@torch.library.custom_op("zoo::memory_walk_fwd", mutates_args=())
def memory_walk_fwd(
    u: Tensor,
    w1: Tensor,
    w2: Tensor | None,
    k1: Tensor,
    k2: Tensor | None,
    gate: Tensor,
    extra1: Tensor | None,
    extra2: Tensor | None,
    start1: Tensor,
    start2: Tensor,
    adjoint: bool,
    dtype: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Walk over C chunks of T tokens with two states; all float32, products run as for inputs of ``dtype``.

    Args:
        u: [Z, C, T, E].
        w1: What is read from the first state, [Z, C, T, D]; w2 from the second.
        k1: Where x is written in the first state, [Z, C, T, D]; k2 in the second.
        gate: a, f, l, s, [Z, C, 4].
        extra1: Added to the first state after each chunk, [Z, C, D, E]; extra2 to the second.
        start1: First state that the walk begins with, [Z, D, E]; start2 the second.
        adjoint: From the last chunk to the first, with the signs of the products turned.

    Returns:
        x [Z, C, T, E], both states that each chunk meets [Z, C, D, E], both last states [Z, D, E].
    """
    from kernels.memory import launch

    return launch.walk(u, w1, w2, k1, k2, gate, extra1, extra2, start1, start2, adjoint, dtype)


@memory_walk_fwd.register_fake
def _(u, w1, w2, k1, k2, gate, extra1, extra2, start1, start2, adjoint, dtype):
    met = [u.new_empty(*u.shape[:2], w1.shape[-1], u.shape[-1]) for _ in range(2)]
    return u.new_empty(u.shape), *met, *(t.new_empty(t.shape) for t in (start1, start2))


def _setup(ctx, inputs, output):
    _, w1, w2, k1, k2, gate, extra1, extra2, _, _, ctx.adjoint, ctx.dtype = inputs
    ctx.extra = extra1 is not None, extra2 is not None
    ctx.save_for_backward(w1, w2, k1, k2, gate, *output[:3])


def _backward(ctx, dx, dmet1, dmet2, dlast1, dlast2):
    w1, w2, k1, k2, gate, x, met1, met2 = ctx.saved_tensors
    sign = 1 if ctx.adjoint else -1
    turned = gate[..., [0, 2, 1, 3]]
    du, after1, after2, dstart1, dstart2 = memory_walk_fwd(
        dx, k1, k2, w1, w2, turned, dmet1, dmet2, dlast1, dlast2, not ctx.adjoint, ctx.dtype
    )
    dw1, dk1 = sign * pairs(du, met1, ctx.dtype), -sign * pairs(x, after1, ctx.dtype)
    dw2 = None if w2 is None else sign * pairs(du, met2, ctx.dtype)
    dk2 = None if k2 is None else -sign * pairs(x, after2, ctx.dtype)
    dgate = torch.stack(
        [(after * met).sum((-2, -1)) for after in (after1, after2) for met in (met1, met2)], -1
    )
    extra = (after if given else None for after, given in zip((after1, after2), ctx.extra, strict=True))
    return du, dw1, dw2, dk1, dk2, dgate, *extra, dstart1, dstart2, None, None


memory_walk_fwd.register_autograd(_backward, setup_context=_setup)


def _learned(inputs: torch_path.Inputs, weights: Tensor, chunk: int, dtype: str) -> torch_path.Chunk:
    """What chunks begin with and what they learn, as ``torch_path.Chunk`` with the chunks as further batch rows: [B C, H, ...]."""
    cut = [chunked(t, chunk) for t in (inputs.k, inputs.v, inputs.lr, inputs.log_keep, inputs.log_momentum)]
    keep = chunked(inputs.keep[:, None].to(cut[0].dtype), chunk)[:, 0].flatten(0, 1) > 0
    batch, heads, chunks = cut[0].shape[:3]
    fold = lambda t: t.transpose(1, 2).flatten(0, 1)  # [B, H, C, *] -> [B C, H, *]
    flat = lambda t: t.unflatten(0, (batch, chunks)).transpose(1, 2).flatten(0, 1)  # ... -> [B H, C, *]
    back = lambda t: fold(t.unflatten(0, (batch, heads)))
    k, v, lr, log_keep, log_momentum = map(fold, cut)
    factors = torch_path.mixing(log_keep, log_momentum, keep, inputs.momentum)
    b, f, g, e, fade = factors
    gate = torch.stack((b[..., -1], f[..., -1], torch.zeros_like(lr[..., -1]), e[..., -1]), -1)
    # The gradient is -2 x: what the weights miss of the values, twice.
    pull, push = (2 * (lr * t[..., -1, :])[..., None] * k for t in (g, fade))
    start = weights.flatten(0, 1)
    x, met1, met2, _, _ = memory_walk_fwd(
        flat(v), flat(k), None, flat(pull), flat(push) if inputs.momentum else None, flat(gate), None, None,
        start, torch.zeros_like(start), False, dtype,
    )  # fmt: skip
    return torch_path.Chunk((back(met1),), (back(met2),), [(k, -2 * back(x))], lr, factors)


def scan(
    q: Tensor, inputs: torch_path.Inputs, weights: tuple[Tensor], seen: Tensor, chunk: int, dtype: str
) -> Tensor:
    """Arguments and result as in ``torch_path.scan``, for a memory that is one matrix; products run as for inputs of ``dtype``."""
    batch, n = q.shape[0], q.shape[2]
    found = _learned(inputs, weights[0], chunk, dtype)
    own = torch.arange(1, n + 1, device=q.device)
    if n == inputs.k.shape[2] and bool((seen == own).all()):
        # The usual causal case: every chunk is read by its own queries, all chunks at once.
        part = chunked(q, chunk)
        place = torch.arange(chunk, device=q.device).expand(part.shape[2] * batch, -1)
        out = torch_path.read(part.transpose(1, 2).flatten(0, 1), found, None, place)
        return out.unflatten(0, (batch, -1)).transpose(1, 2).flatten(2, 3)[:, :, :n]
    return torch_path.read_all(q, found.split(batch), None, seen, chunk)
