"""Checks of the prefix operations' Triton kernel under the interpreter; run by test_triton.py in a process of its own."""

import os

import pytest
import torch

from kernels.prefix import diag_scan, ops, prefix_softmax

assert os.environ.get("TRITON_INTERPRET") == "1", "run through tests/kernels/test_triton.py"
pytestmark = pytest.mark.usefixtures("unwritten")


def new(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def derivatives(call, leaves, dtype, again=False):
    leaves = [t.to(dtype).requires_grad_() for t in leaves]
    out = call(*leaves)
    first = torch.autograd.grad(out.double().sin().sum(), leaves, create_graph=again)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves) if again else ()
    return [t.double() for t in (out, *first, *second)]


def compare(call, leaves, dtype=torch.float32, again=False):
    """Within twice the torch path's error and a few roundings of the largest entry."""
    leaves = [t.to(dtype).double() for t in leaves]
    want = derivatives(lambda *t: call(*t, impl="reference"), leaves, torch.float64, again)
    low = derivatives(lambda *t: call(*t, impl="torch"), leaves, dtype, again)
    for have, other, expected in zip(
        derivatives(lambda *t: call(*t, impl="triton"), leaves, dtype, again), low, want, strict=True
    ):
        band = 24 * torch.finfo(dtype).eps * (expected.abs().max() + 1e-3)
        assert (have - expected).abs().max() <= 2 * (other - expected).abs().max() + band


@pytest.mark.parametrize("m", [1, 7, 33])
@pytest.mark.parametrize("read", ["inclusive", "exclusive"])
def test_prefix_softmax(m, read):
    mask = torch.rand(2, m, generator=torch.Generator().manual_seed(1)) > 0.35
    mask[-1] = False
    s, v = 3 * new(2, 1, m), new(2, 1, m, 5)
    compare(lambda s, v, impl: prefix_softmax(s, v, read=read, impl=impl), (s, v))
    compare(
        lambda s, v, impl: prefix_softmax(s, v, read=read, key_mask=mask, reverse=True, impl=impl), (s, v)
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_half(dtype):
    compare(lambda s, v, impl: prefix_softmax(s, v, impl=impl), (new(1, 1, 34), new(1, 1, 34, 20)), dtype)


def test_extreme_scores_stay_finite():
    s = torch.tensor([-1e4, 1e4, 0.0, 1e4, -1e4]).expand(1, 1, 5).clone().requires_grad_()
    v = torch.randn(1, 1, 5, 3, requires_grad=True)
    out = prefix_softmax(s, v, impl="triton")
    torch.testing.assert_close(out, prefix_softmax(s, v, impl="reference"))
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), (s, v)))


@pytest.mark.parametrize(
    "options", [{}, {"segment": 5}, {"reverse": True}], ids=["plain", "segment", "reverse"]
)
def test_recurrence(options):
    a, x, h0 = new(1, 2, 35, 20).sigmoid(), new(1, 2, 35, 20, seed=1), new(1, 2, 20, seed=2)
    compare(lambda a, x, impl: diag_scan(a, x, impl=impl, **options), (a, x))
    if "segment" not in options:
        compare(lambda a, x, h0, impl: diag_scan(a, x, h0=h0, impl=impl, **options), (a, x, h0))


def test_second_derivatives_are_exact():
    a, x, h0 = new(1, 1, 6, 3), new(1, 1, 6, 3, seed=1), new(1, 1, 3, seed=2)
    compare(lambda a, x, h0, impl: diag_scan(a, x, h0=h0, impl=impl), (a, x, h0), again=True)
    compare(lambda s, v, impl: prefix_softmax(s, v, impl=impl), (a[..., 0], x), again=True)


def test_opcheck_and_one_graph():
    a, x, h0 = (torch.randn(s, requires_grad=True) for s in ((2, 3, 4), (2, 3, 4), (2, 4)))
    torch.library.opcheck(ops.diag_scan_fwd, (a, x, h0))
    torch.library.opcheck(ops.diag_scan_fwd, (a[..., :1].detach().requires_grad_(), x, None))
    s, v = torch.randn(1, 1, 5, requires_grad=True), torch.randn(1, 1, 5, 3, requires_grad=True)
    compiled = torch.compile(
        lambda s, v: prefix_softmax(s, v, impl="triton"), fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(compiled(s, v), prefix_softmax(s, v, impl="torch"))


def test_zero_sizes():
    for shape in ((0, 2, 3, 4), (2, 2, 0, 4)):
        x = torch.randn(shape)
        assert diag_scan(x, x, impl="triton").shape == shape
        assert prefix_softmax(x[..., 0], x, impl="triton").shape == shape
