"""Checks of the softmax kernels under the interpreter; run by test_triton_softmax.py as ``pytest tests/kernels/interpreted_softmax.py``.

Not collected on its own (the name does not start with test_): it needs TRITON_INTERPRET=1 before triton is imported.
"""

import os

import pytest
import torch

from kernels.softmax import attention, launch, ops

assert os.environ.get("TRITON_INTERPRET") == "1", "run through tests/kernels/test_triton_softmax.py"

# name: (queries, keys, D, E, heads, key heads, options); bias is a shape with None for "as wide as the scores".
CASES = {
    "plain": (7, 65, 8, 20, 2, 2, {}),
    "grouped-mask": (33, 40, 20, 8, 4, 2, {"mask": True}),
    "causal": (65, 65, 16, 16, 2, 1, {"causal": True}),
    "causal-short": (70, 9, 16, 16, 1, 1, {"causal": True, "mask": True}),
    "window": (40, 66, 16, 8, 1, 1, {"window": (5, 2)}),
    "window-left": (40, 66, 16, 8, 1, 1, {"window": (3, None), "causal": True}),
    "positions": (9, 35, 8, 8, 2, 2, {"causal": True, "positions": True}),
    "bias": (33, 35, 16, 8, 2, 2, {"bias": (2, 2, 33, 35), "mask": True}),
    "bias-shared": (33, 35, 16, 8, 2, 1, {"bias": (1, 2, 33, 35), "causal": True}),
    "bias-keys": (33, 35, 16, 8, 2, 2, {"bias": (2, 1, 1, 35), "mask": True}),
    "bias-heads": (5, 35, 16, 8, 2, 2, {"bias": (1, 2, 1, 1)}),
    "bias-rows": (5, 35, 16, 8, 2, 2, {"bias": (1, 1, 5, 1)}),
    "one": (1, 130, 64, 64, 1, 1, {"bias": (1, 1, 1, 130)}),
}


@pytest.fixture(autouse=True)
def nan_scratch(monkeypatch):
    """Memory that a kernel forgets to write must show; small tiles give several of them."""

    def new(like, *shape, dtype=torch.float32):
        return torch.full(shape, torch.nan, device=like.device, dtype=dtype)

    monkeypatch.setattr(launch, "_new", new)
    monkeypatch.setattr(launch, "tiles", lambda *a: launch.Tiles(32, 16, 4, 1))


def inputs(case):
    n, m, d, e, h, hk, extra = CASES[case]
    gen = torch.Generator().manual_seed(0)
    new = lambda *s: torch.randn(*s, generator=gen, dtype=torch.float64)
    leaves = [new(2, h, n, d), new(2, hk, m, d), new(2, hk, m, e)]
    options = {k: v for k, v in extra.items() if k in ("causal", "window")}
    if extra.get("positions"):
        options["positions"] = torch.randint(-1, m, (2, n), generator=gen)
    if extra.get("mask"):
        options["key_mask"] = torch.rand(2, m, generator=gen) > 0.3
        options["key_mask"][-1] = False
    if "bias" in extra:
        leaves.append(new(*extra["bias"]))
    return leaves, options, new(2, h, n, e), new(2, h, n)


def run(leaves, options, weight, lse_weight, impl, dtype):
    leaves = [t.to(dtype).requires_grad_() for t in leaves]
    bias = leaves[3] if len(leaves) > 3 else None
    out, lse = attention(*leaves[:3], bias=bias, return_lse=True, impl=impl, **options)
    assert out.dtype == dtype
    empty = lse == -torch.inf
    loss = (out.double() * weight).sum() + (lse.double().masked_fill(empty, 0.0) * lse_weight).sum()
    grads = torch.autograd.grad(loss, leaves)
    return [out.double(), lse.double().masked_fill(empty, -1e3), *(g.double() for g in grads)]


def compare(case, dtype):
    leaves, options, weight, lse_weight = inputs(case)
    leaves = [t.to(dtype).double() for t in leaves]  # the reference sees the same rounded numbers
    want = run(leaves, options, weight, lse_weight, "reference", torch.float64)
    have = run(leaves, options, weight, lse_weight, "triton", dtype)
    low = run(leaves, options, weight, lse_weight, "torch", dtype)
    # Band: twice the error of the torch path plus roundings of the largest entry; the kernels round P and dS to the input type.
    band = (24 if dtype == torch.float32 else 8) * torch.finfo(dtype).eps
    for name, a, b, c in zip(("out", "lse", "dq", "dk", "dv", "dbias"), have, want, low, strict=False):
        error, limit = (a - b).abs().max(), 2 * (c - b).abs().max() + band * (b.abs().max() + 1e-3)
        assert error <= limit, f"{case} {name}: {error:.2e} > {limit:.2e}"


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_fp32(case):
    compare(case, torch.float32)


@pytest.mark.parametrize("case", ["grouped-mask", "bias-keys"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_values_and_gradients_half(case, dtype):
    compare(case, dtype)


@pytest.mark.parametrize("case", ["bias-shared", "bias-keys", "bias-rows"])
def test_bias_gradient_without_its_kernel(case, monkeypatch):
    monkeypatch.setattr(launch, "bias_kernel", lambda *a: False)
    compare(case, torch.float32)


def test_masked_infinities_and_strides():
    q, k, v = (torch.randn(2, 9, 3, 16).transpose(1, 2) for _ in range(3))
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[:, 4] = False
    k, v = k.clone(), v.clone()
    k[:, :, 4], v[:, :, 4] = torch.inf, torch.nan
    have = attention(q, k, v, key_mask=mask, impl="triton")
    torch.testing.assert_close(
        have, attention(q, k, v, key_mask=mask, impl="reference"), rtol=1e-4, atol=1e-5
    )
    q, k, v = (torch.randn(2, 3, 16, 9).transpose(2, 3) for _ in range(3))
    torch.testing.assert_close(
        attention(q, k, v, impl="triton"), attention(q, k, v, impl="reference"), rtol=1e-4, atol=1e-5
    )


def test_extreme_scores():
    q, k, v = (torch.randn(1, 1, 9, 16) for _ in range(3))
    for size in (0.0, 1e4):
        args = [(size * q).requires_grad_(), k.clone().requires_grad_(), v.clone().requires_grad_()]
        out, lse = attention(*args, impl="triton", return_lse=True)
        want, want_lse = attention(size * q, k, v, impl="reference", return_lse=True)
        torch.testing.assert_close(out, want, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(lse, want_lse, rtol=1e-5, atol=1e-4)
        assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum() + lse.sum(), args))


@pytest.mark.parametrize("shape", [(0, 2, 3, 5), (2, 2, 0, 5), (2, 2, 3, 0)], ids=["B0", "N0", "M0"])
def test_zero_sizes(shape):
    b, h, n, m = shape
    q, k, v = (torch.randn(b, h, s, 8, requires_grad=True) for s in (n, m, m))
    out = attention(q, k, v, impl="triton")
    assert out.shape == (b, h, n, 8) and (out == 0).all()
    for grad in torch.autograd.grad(out.sum(), (q, k, v)):
        assert (grad == 0).all()


def test_second_derivative_is_exact():
    x = torch.randn(1, 1, 5, 8, dtype=torch.float64)

    def second(impl, dtype):
        leaf = x.to(dtype).requires_grad_()
        out, lse = attention(leaf, leaf.sin(), leaf.cos(), impl=impl, return_lse=True, causal=True)
        (first,) = torch.autograd.grad(out.pow(2).sum() + lse.sum(), leaf, create_graph=True)
        (again,) = torch.autograd.grad(first.pow(2).sum(), leaf)
        return first.double(), again.double()

    for have, want in zip(second("triton", torch.float32), second("reference", torch.float64), strict=True):
        assert (have - want).abs().max() < 1e-4 * want.abs().max()


def test_opcheck_and_one_graph():
    q, k, v = (torch.randn(1, 2, 5, 8, requires_grad=True) for _ in range(3))
    bias, mask = torch.randn(1, 2, 1, 5, requires_grad=True), torch.tensor([[True, True, False, True, True]])
    torch.library.opcheck(ops.softmax_fwd, (q, k, v, bias, mask, None, None, -1, 0, True, 0.3))
    call = lambda q, k, v: attention(q, k, v, impl="triton", causal=True)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    want, have = attention(q, k, v, impl="torch", causal=True), compiled(q, k, v)
    torch.testing.assert_close(have, want, rtol=1e-4, atol=1e-5)
    for a, b in zip(
        torch.autograd.grad(have.sum(), (q, k, v)), torch.autograd.grad(want.sum(), (q, k, v)), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_what_the_kernels_lack_names_the_way_out():
    q, k, v = (torch.randn(1, 1, 3, 8) for _ in range(3))
    for options in ({"dropout": 0.1}, {"softcap": 2.0}, {"skip_threshold": 0.1}):
        with pytest.raises(NotImplementedError, match="impl='torch'"):
            attention(q, k, v, impl="triton", **options)
