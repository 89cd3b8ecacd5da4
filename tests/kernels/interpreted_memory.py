"""Checks of the linear memory's kernel under the interpreter; run by test_triton.py as ``pytest tests/kernels/interpreted_memory.py``.

Not collected on its own (the name does not start with test_): it needs TRITON_INTERPRET=1 before triton is imported.
"""

import os

import pytest
import torch
import torch.nn.functional as F

from kernels.memory import memory_scan, ops

assert os.environ.get("TRITON_INTERPRET") == "1", "run through tests/kernels/test_triton.py"
pytestmark = pytest.mark.usefixtures("unwritten")

# queries, keys, D, E, chunk, options
CASES = {
    "plain": (34, 34, 8, 20, 16, {}),
    "gates": (21, 21, 20, 8, 5, {"gates": True}),
    "short": (1, 1, 8, 8, 4, {"gates": True}),
    "reverse": (9, 9, 8, 20, 4, {"gates": True, "read": "exclusive", "reverse": True, "mask": True}),
    "placed": (7, 18, 8, 8, 4, {"gates": True, "positions": True, "mask": True}),
    "cross": (5, 19, 8, 8, 8, {}),
}


def make(name, dtype=torch.float64):
    n, m, d, e, chunk, extra = CASES[name]
    gen = torch.Generator().manual_seed(0)
    new = lambda *s: torch.randn(*s, generator=gen, dtype=torch.float64).to(dtype).double()
    unit = lambda *s: F.normalize(new(*s), dim=-1).to(dtype).double()
    leaves = {
        "q": unit(2, 2, n, d),
        "k": unit(2, 2, m, d),
        "v": new(2, 2, m, e),
        "lr": 0.3 * new(2, 2, m).sigmoid(),
        "w": new(2, d, e),
    }
    options = {"chunk": chunk, **{name: extra[name] for name in ("read", "reverse") if name in extra}}
    if extra.get("gates"):
        leaves |= {"log_keep": F.logsigmoid(2 + new(2, 2, m)), "log_momentum": F.logsigmoid(new(2, 2, m))}
    if extra.get("mask"):
        options["key_mask"] = torch.rand(2, m, generator=gen) > 0.3
        options["key_mask"][1] = False
    if extra.get("positions"):
        options["positions"] = torch.randint(-1, m, (2, n), generator=gen)
    return leaves, options


def call(leaves, options, impl, dtype):
    """Values, and gradients of everything."""
    data = {
        k: t.to(dtype if k in "qkv" else torch.promote_types(dtype, torch.float32)).requires_grad_()
        for k, t in leaves.items()
    }
    args = {k: t for k, t in data.items() if k != "w"}
    out = memory_scan(**args, weights=(data["w"],), impl=impl, **options)
    assert out.dtype == dtype
    grads = torch.autograd.grad(
        out.double().sin().sum(), list(data.values()), allow_unused=True, materialize_grads=True
    )
    return {"out": out.detach(), **dict(zip(data, grads, strict=True))}


@pytest.mark.parametrize("name", CASES)
def test_memory(name, dtype=torch.float32):
    leaves, options = make(name, dtype)
    want, have, low = (
        call(leaves, options, impl, t)
        for impl, t in (("reference", torch.float64), ("triton", dtype), ("torch", dtype))
    )
    # Band: twice the error of the torch path plus roundings of the largest entry.
    band = 24 * torch.finfo(dtype).eps
    for key in want:
        a, b, c = (r[key].double() for r in (have, want, low))
        error, limit = (a - b).abs().max(), 2 * (c - b).abs().max() + band * (b.abs().max() + 1e-3)
        assert error <= limit, f"{key}: {error:.2e} > {limit:.2e}"


def test_memory_in_half_precision():
    test_memory("gates", torch.float16)


def test_second_derivatives_through_both_directions():
    """Of the operator itself: every input, a walk forwards and one backwards with all that may be absent given."""
    gen = torch.Generator().manual_seed(0)
    new = lambda *s: (0.5 * torch.randn(*s, generator=gen, dtype=torch.float64)).requires_grad_()
    rows, states, ends = (1, 2, 3, 2), (1, 2, 2, 2), (1, 2, 2)
    full = (
        [new(*rows) for _ in range(5)]
        + [new(1, 2, 4)]
        + [new(*states) for _ in range(2)]
        + [new(*ends) for _ in range(2)]
    )

    def plain(u, w1, w2, k1, k2, gate, g1, g2, s1, s2, adjoint):
        sign = 1 if adjoint else -1
        x, met = [None, None], [None, None]
        for c in (1, 0) if adjoint else (0, 1):
            met[c] = torch.stack((s1, s2))
            x[c] = u[:, c] + sign * (w1[:, c] @ s1 + w2[:, c] @ s2)
            a, f, l, s = (gate[:, c, i, None, None] for i in range(4))
            s1, s2 = a * s1 + f * s2, l * s1 + s * s2
            s1, s2 = (t + g[:, c] - sign * k[:, c].mT @ x[c] for t, g, k in ((s1, g1, k1), (s2, g2, k2)))
        met = torch.stack(met, 2)
        return torch.stack(x, 1), met[0], met[1], s1, s2

    for adjoint in (False, True):
        found = []
        for function in (plain, lambda *t: ops.memory_walk_fwd(*t[:-1], t[-1], "float32")):
            double = function is plain
            leaves = [
                t.detach().to(torch.float64 if double else torch.float32).requires_grad_() for t in full
            ]
            outs = function(*leaves, adjoint)
            first = torch.autograd.grad(sum(o.sin().sum() for o in outs), leaves, create_graph=True)
            second = torch.autograd.grad(sum(g.cos().sum() for g in first), leaves)
            found.append([*outs, *first, *second])
        for want, have in zip(*found, strict=True):
            torch.testing.assert_close(have.double(), want, rtol=1e-4, atol=1e-5)


def test_registration():
    leaves, _ = make("gates")
    k = leaves["k"].float()[:, :, :20].unflatten(2, (4, 5)).flatten(0, 1).requires_grad_()
    start = torch.zeros(4, 20, 20, requires_grad=True)
    gate = torch.rand(4, 4, 4, requires_grad=True)
    quick = {"test_utils": ("test_schema", "test_autograd_registration", "test_faketensor")}
    torch.library.opcheck(
        ops.memory_walk_fwd, (k, k, None, k, None, gate, None, None, start, start, False, "float32"), **quick
    )
