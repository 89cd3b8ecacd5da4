"""Online memory in chunks with written-out gradients, in plain differentiable torch operations.

Within a chunk the gradients of all tokens are rank-one (input times error), taken at the chunk's first weights, so the weights after token t act
on a query as: decayed start weights + decayed start momentum - a masked product over the chunk's own tokens. No weights per token are formed.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels._common.checks import work_dtype

LN_EPS = 1e-5


@dataclass
class Inputs:
    """Tokens to learn, kept ones first, so that skipped ones do not shift chunks. count [B] of them are real."""

    k: Tensor
    v: Tensor
    lr: Tensor
    log_keep: Tensor
    log_momentum: Tensor
    keep: Tensor  # [B, M], in the new order
    before: Tensor  # [B, M + 1]: kept tokens among the first j in the old (scan) order
    momentum: bool

    @staticmethod
    def prepare(k, v, lr, log_keep, log_momentum, key_mask, reverse: bool) -> "Inputs":
        work = work_dtype(v.dtype)
        m = k.shape[2]
        momentum = log_momentum is not None
        lr = lr.to(work)
        log_keep = torch.zeros_like(lr) if log_keep is None else log_keep.to(work)
        log_momentum = torch.zeros_like(lr) if log_momentum is None else log_momentum.to(work)
        parts = [k.to(work), v.to(work), lr, log_keep, log_momentum]
        keep = torch.ones(k.shape[0], m, dtype=torch.bool, device=k.device) if key_mask is None else key_mask
        if reverse:
            parts, keep = [t.flip(2) for t in parts], keep.flip(1)
        before = F.pad(keep.cumsum(1), (1, 0))
        if key_mask is not None:
            order = (~keep).to(torch.uint8).argsort(dim=1, stable=True)
            keep = keep.gather(1, order)
            moved = []
            for t in parts:
                index = order[:, None] if t.dim() == 3 else order[:, None, :, None]
                t = t.gather(2, index.expand(t.shape))
                hide = ~keep[:, None] if t.dim() == 3 else ~keep[:, None, :, None]
                moved.append(t.masked_fill(hide, 0.0))
            parts = moved
        return Inputs(*parts, keep, before, momentum)

    def learned(self, place: Tensor) -> Tensor:
        """Kept tokens up to and including scan position `place` [B|1, N] (negative: none)."""
        index = (place + 1).clamp(0, self.before.shape[1] - 1).expand(self.before.shape[0], -1)
        return self.before.gather(1, index)

    def part(self, start: int, stop: int):
        cut = [t[:, :, start:stop] for t in (self.k, self.v, self.lr, self.log_keep, self.log_momentum)]
        return (*cut, self.keep[:, start:stop])


class Chunk(NamedTuple):
    """What a chunk of T tokens begins with and learns; weights and momenta as in ``MemoryState``.

    Attributes:
        weights: At its start.
        momenta: At its start.
        grads: Per layer input and error of each token, see ``errors``.
        lr: theta, [B, H, T].
        factors: See ``mixing``.
    """

    weights: tuple[Tensor, ...]
    momenta: tuple[Tensor, ...]
    grads: list[tuple[Tensor, Tensor]]
    lr: Tensor
    factors: tuple[Tensor, ...]

    def split(self, batch: int) -> list["Chunk"]:
        """The chunks that stand behind one another in each of ``batch`` rows."""
        count = self.lr.shape[0] // batch
        one = lambda t, c: t.unflatten(0, (batch, count))[:, c]
        return [
            Chunk(
                *(tuple(one(t, c) for t in ts) for ts in (self.weights, self.momenta)),
                [tuple(one(t, c) for t in pair) for pair in self.grads], one(self.lr, c), tuple(one(t, c) for t in self.factors),
            )
            for c in range(count)
        ]  # fmt: skip


def predict(x: Tensor, weights: tuple[Tensor, ...], gain: Tensor | None) -> Tensor:
    """Mem(x), [B, H, T, E]."""
    if len(weights) == 1:
        return x @ weights[0]
    return _head(x, F.gelu(x @ weights[0]) @ weights[1], gain)


def _head(x: Tensor, z: Tensor, gain: Tensor) -> Tensor:
    y = F.layer_norm(z, z.shape[-1:], eps=LN_EPS) * gain[:, None]
    return x + y if x.shape[-1] == y.shape[-1] else y


def errors(
    k: Tensor, v: Tensor, weights: tuple[Tensor, ...], gain: Tensor | None
) -> list[tuple[Tensor, Tensor]]:
    """Per layer (input, error): the gradient of |Mem(k) - v|^2 at token t is the outer product of the two at t."""
    if len(weights) == 1:
        return [(k, 2 * (k @ weights[0] - v))]
    first, second = weights
    a = k @ first
    bell = torch.exp(-0.5 * a * a) * (2 * torch.pi) ** -0.5
    step = 0.5 * (1 + torch.erf(a * 2**-0.5))
    hidden = a * step
    z = hidden @ second
    centred = z - z.mean(-1, keepdim=True)
    scale = (centred.square().mean(-1, keepdim=True) + LN_EPS).rsqrt()
    unit = centred * scale
    y = unit * gain[:, None]
    y = k + y if k.shape[-1] == y.shape[-1] else y
    d_unit = 2 * (y - v) * gain[:, None]
    d_z = scale * (d_unit - d_unit.mean(-1, keepdim=True) - unit * (d_unit * unit).mean(-1, keepdim=True))
    d_a = (d_z @ second.mT) * (step + a * bell)
    return [(k, d_a), (hidden, d_z)]


def mixing(log_keep: Tensor, log_momentum: Tensor, keep: Tensor, momentum: bool):
    """How far start weights, start momentum and each token's gradient have come after each of T tokens.

    Returns:
        b [B, H, T], f [B, H, T], g [B, H, T, T] for the weights and e [B, H, T], l [B, H, T, T] for the momentum.
    """
    t = log_keep.shape[-1]
    tri = torch.ones(t, t, dtype=torch.bool, device=log_keep.device).tril()
    real = keep[:, None].to(log_keep.dtype)

    def fade(log: Tensor) -> tuple[Tensor, Tensor]:
        cum = log.cumsum(-1)
        gap = (cum[..., :, None] - cum[..., None, :]).masked_fill(~tri, float("-inf"))
        return cum.exp(), gap.exp()

    b, weight_fade = fade(log_keep)
    if not momentum:
        return b, torch.zeros_like(b), weight_fade, torch.zeros_like(b), torch.zeros_like(weight_fade)
    e, momentum_fade = fade(log_momentum)
    # Skipped tokens pass the momentum on and do not add it to the weights.
    weight_fade = weight_fade * real[..., None, :]
    f = (weight_fade @ e[..., None]).squeeze(-1)
    return b, f, weight_fade @ momentum_fade, e, momentum_fade


def _after(weights, momenta, grads, lr, b, f, g, e, fade):
    """Weights and momenta after the chunk's last token."""
    new_weights, new_momenta = [], []
    for w, m, (x, d) in zip(weights, momenta, grads, strict=True):
        pull = (lr * g[..., -1, :])[..., None]
        new_weights.append(b[..., -1:, None] * w + f[..., -1:, None] * m - (x * pull).mT @ d)
        push = (lr * fade[..., -1, :])[..., None]
        new_momenta.append(e[..., -1:, None] * m - (x * push).mT @ d)
    return tuple(new_weights), tuple(new_momenta)


def _chunks(inputs: Inputs, weights, gain, chunk: int) -> list[Chunk]:
    momenta = tuple(torch.zeros_like(w) for w in weights)
    out = []
    for start in range(0, inputs.k.shape[2], chunk):
        k, v, lr, log_keep, log_momentum, keep = inputs.part(start, start + chunk)
        grads = errors(k, v, weights, gain)
        factors = mixing(log_keep, log_momentum, keep, inputs.momentum)
        out.append(Chunk(weights, momenta, grads, lr, factors))
        weights, momenta = _after(weights, momenta, grads, lr, *factors)
    return out


def read(q: Tensor, chunk: Chunk, gain: Tensor | None, at: Tensor) -> Tensor:
    """Memory after token ``at`` [B, N] (-1: the chunk's start) of one chunk, asked with q [B, H, N, D]."""
    weights, momenta, grads, lr, (b, f, g, _, _) = chunk
    index = (at + 1)[:, None]
    rows = F.pad(b, (1, 0), value=1.0).gather(2, index.expand(-1, b.shape[1], -1))[..., None]
    lean = F.pad(f, (1, 0)).gather(2, index.expand(-1, b.shape[1], -1))[..., None]
    pull = F.pad(g * lr[..., None, :], (0, 0, 1, 0))
    pull = pull.gather(2, index[..., None].expand(-1, g.shape[1], -1, g.shape[-1]))  # [B, H, N, T]

    def layer(x: Tensor, i: int) -> Tensor:
        inputs, error = grads[i]
        return rows * (x @ weights[i]) + lean * (x @ momenta[i]) - ((x @ inputs.mT) * pull) @ error

    if len(weights) == 1:
        return layer(q, 0)
    return _head(q, layer(F.gelu(layer(q, 0)), 1), gain)


def scan(q: Tensor, inputs: Inputs, weights, gain, seen: Tensor, chunk: int) -> Tensor:
    """Read after ``seen`` [B, N] learned tokens; q [B, H, N, D]."""
    return read_all(q, _chunks(inputs, weights, gain, chunk), gain, seen, chunk)


def read_all(q: Tensor, chunks: list[Chunk], gain: Tensor | None, seen: Tensor, chunk: int) -> Tensor:
    """Queries are sorted by chunk, each chunk answers its own."""
    batch, n = q.shape[0], q.shape[2]
    at = (seen - 1).clamp(min=0)
    home = at.div(chunk, rounding_mode="floor")  # [B, N]
    within = at - home * chunk
    rows = []
    if bool((home == home[:1]).all()) and bool((home.diff(dim=1) >= 0).all()):
        # The usual causal case: the same consecutive queries belong to each chunk in every batch row.
        sizes = torch.bincount(home[0], minlength=len(chunks)).tolist()
        pieces = zip(q.split(sizes, 2), within.split(sizes, 1), chunks, strict=True)
        rows = [read(part, state, gain, place) for part, place, state in pieces if part.shape[2]]
        out = torch.cat(rows, 2)
    else:
        # Any order: queries are sorted by chunk; per chunk the rows differ in number, so each takes the largest share and masks.
        order = home.argsort(dim=1, stable=True)
        counts = F.one_hot(home, len(chunks)).sum(1)  # [B, C]
        first = counts.cumsum(1) - counts
        total = 0.0
        for c, state in enumerate(chunks):
            width = int(counts[:, c].max())
            if width == 0:
                continue
            slot = torch.arange(width, device=q.device).expand(batch, -1)
            real = slot < counts[:, c : c + 1]
            which = order.gather(1, (first[:, c : c + 1] + slot).clamp(max=n - 1))
            part = q.gather(2, which[:, None, :, None].expand(-1, q.shape[1], -1, q.shape[3]))
            place = within.gather(1, which).masked_fill(~real, 0)
            y = read(part, state, gain, place).masked_fill(~real[:, None, :, None], 0.0)
            index = which[:, None, :, None].expand(-1, q.shape[1], -1, y.shape[-1])
            total = total + y.new_zeros(batch, q.shape[1], n, y.shape[-1]).scatter_add(2, index, y)
        out = total
    return out.masked_fill((seen == 0)[:, None, :, None], 0.0)


def learn(inputs: Inputs, weights, gain, chunk: int):
    """(weights, momenta, start of the running chunk, steps) after all tokens."""
    momenta = tuple(torch.zeros_like(w) for w in weights)
    start = weights
    count = inputs.keep.sum(1)
    for begin in range(0, inputs.k.shape[2], chunk):
        k, v, lr, log_keep, log_momentum, keep = inputs.part(begin, begin + chunk)
        grads = errors(k, v, weights, gain)
        factors = mixing(log_keep, log_momentum, keep, inputs.momentum)
        # Rows whose tokens have run out stay as they are (all factors are then neutral).
        running = (count > begin)[:, None, None, None]
        start = tuple(torch.where(running, w, s) for w, s in zip(weights, start, strict=True))
        weights, momenta = _after(weights, momenta, grads, lr, *factors)
        full = (count >= begin + chunk)[:, None, None, None]
        start = tuple(torch.where(full, w, s) for w, s in zip(weights, start, strict=True))
    if not inputs.momentum:
        momenta = tuple(torch.zeros_like(w) for w in weights)
    return weights, momenta, start, count


def step(state, k, v, gain, lr, log_keep, log_momentum, chunk: int):
    """One token; every batch row is at the same step."""
    weights, momenta, start, steps = state
    wide = lambda t: t.to(k.dtype)[..., None]
    new_weights, new_momenta = [], []
    for w, m, (x, d) in zip(weights, momenta, errors(k, v, start, gain), strict=True):
        push = -(x * wide(lr)).mT @ d
        m = push if log_momentum is None else wide(log_momentum).exp() * m + push
        w = w if log_keep is None else wide(log_keep).exp() * w
        new_weights.append(w + m)
        new_momenta.append(m)
    steps = steps + 1
    ends = (steps % chunk == 0)[:, None, None, None]
    start = tuple(torch.where(ends, w, s) for w, s in zip(new_weights, start, strict=True))
    return tuple(new_weights), tuple(new_momenta), start, steps
