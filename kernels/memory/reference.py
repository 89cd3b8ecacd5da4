"""Online memory token by token, gradients from autograd."""

import torch
import torch.nn.functional as F
from torch import Tensor


def scan(q: Tensor, inputs, weights, gain, seen: Tensor, chunk: int) -> Tensor:
    """Every batch row on its own: learn its kept tokens one after the other, then read each query after ``seen`` [B, N] of them."""
    rows = []
    for b in range(q.shape[0]):
        now = tuple(w[b] for w in weights)
        momenta = tuple(torch.zeros_like(w) for w in now)
        history, start = [now], now
        for t in range(int(inputs.keep[b].sum())):
            if t % chunk == 0:
                start = now
            leaves = tuple(w if w.requires_grad else w.detach().requires_grad_() for w in start)
            with torch.enable_grad():
                error = _memory(inputs.k[b, :, t : t + 1], leaves, gain) - inputs.v[b, :, t : t + 1]
                grads = torch.autograd.grad(error.square().sum(), leaves, create_graph=True)
            at = lambda t_: t_[b, :, t, None, None]  # noqa: B023
            keep, eta, theta = at(inputs.log_keep).exp(), at(inputs.log_momentum).exp(), at(inputs.lr)
            if not inputs.momentum:
                eta = torch.zeros_like(eta)
            momenta = tuple(eta * m - theta * g for m, g in zip(momenta, grads, strict=True))
            now = tuple(keep * w + m for w, m in zip(now, momenta, strict=True))
            history.append(now)
        out = []
        for i in range(q.shape[2]):
            s = int(seen[b, i])
            y = _memory(q[b, :, i : i + 1], history[s], gain)
            out.append(y if s else torch.zeros_like(y))
        rows.append(torch.cat(out, 1))
    return torch.stack(rows)


def _memory(x: Tensor, weights, gain) -> Tensor:
    if len(weights) == 1:
        return x @ weights[0]
    z = F.gelu(x @ weights[0]) @ weights[1]
    y = F.layer_norm(z, z.shape[-1:], eps=1e-5) * gain[:, None]
    return x + y if x.shape[-1] == y.shape[-1] else y
