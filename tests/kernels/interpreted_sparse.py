"""Checks of block-sparse and selected attention under the interpreter; run by test_triton.py as ``pytest tests/kernels/interpreted_sparse.py``.

Not collected on its own (the name does not start with test_): it needs TRITON_INTERPRET=1 before triton is imported.
"""

import os

import pytest
import torch

from kernels import block_sparse, selected
from kernels.block_sparse import ops as sparse_ops
from kernels.selected import launch as selected_launch
from kernels.selected import ops as selected_ops
from kernels.softmax import tiles

assert os.environ.get("TRITON_INTERPRET") == "1", "run through tests/kernels/test_triton.py"

RULES = {
    "1d-dilated": block_sparse.Neighborhood((37,), (4,), (3,)),
    "2d-stride-prefix": block_sparse.Neighborhood((8, 5), (4, 3), (2, 1), (3, 2), prefix=2),
    "3d-causal": block_sparse.Neighborhood((3, 4, 5), (3, 2, 3), causal=(True, False, False)),
    "disc": block_sparse.Disc((6, 7), 2.3, prefix=1),
    "segments": block_sparse.Segments((0,) * 19 + (1,) * 2 + (2,) * 14, causal=True),
    "prefix": block_sparse.PrefixLM(50, 7),
    "window": block_sparse.GlobalWindow(70, 4, leading=3),
    "one": block_sparse.PrefixLM(1, 0),
}
# name: (queries, keys, block size, chosen blocks, heads, key heads, options)
CHOICES = {
    "grouped": (5, 37, 4, 3, 4, 2, {}),
    "mask-positions": (5, 37, 4, 3, 2, 2, {"mask": True, "causal": True, "positions": True}),
    "causal": (9, 45, 20, 2, 2, 1, {"causal": True}),
    "one": (1, 5, 8, 1, 1, 1, {}),
}


@pytest.fixture(autouse=True)
def small_pieces(unwritten, monkeypatch):
    """Several tiles at the sizes of these tests."""
    monkeypatch.setattr(tiles, "table", lambda *_: tiles.Tiles(32, 16, 4, 1))
    monkeypatch.setattr(selected_launch, "tiles", lambda *_: tiles.Tiles(16, 16, 4, 1))


def results(call, tensors, weight, lse_weight, impl, dtype):
    leaves = [t.to(dtype).requires_grad_() for t in tensors]
    out, lse = call(*leaves, impl=impl, return_lse=True)
    assert out.dtype == dtype
    lse = lse.double().masked_fill(lse == -torch.inf, 0.0)
    loss = (out.double() * weight).sum() + (lse * lse_weight).sum()
    return [out.double(), lse, *(g.double() for g in torch.autograd.grad(loss, leaves))]


def compare(call, n, m, d, e, h, hk, dtype, gen):
    new = lambda *s: torch.randn(2, *s, generator=gen, dtype=torch.float64).to(dtype).double()
    tensors = new(h, n, d), new(hk, m, d), new(hk, m, e)
    weights = new(h, n, e), new(h, n)
    want, have, low = (
        results(call, tensors, *weights, impl, t)
        for impl, t in (("reference", torch.float64), ("triton", dtype), ("torch", dtype))
    )
    # Band: twice the error of the torch path plus roundings of the largest entry; the kernels round P and dS to the input type.
    band = (24 if dtype == torch.float32 else 8) * torch.finfo(dtype).eps
    for name, a, b, c in zip(("out", "lse", "dq", "dk", "dv"), have, want, low, strict=True):
        error, limit = (a - b).abs().max(), 2 * (c - b).abs().max() + band * (b.abs().max() + 1e-3)
        assert error <= limit, f"{name}: {error:.2e} > {limit:.2e}"


@pytest.mark.parametrize("name", RULES)
def test_rules(name, dtype=torch.float32):
    rule, gen = RULES[name], torch.Generator().manual_seed(0)
    mask = torch.rand(2, rule.tokens, generator=gen) > 0.3
    mask[1, : rule.tokens // 2] = False
    call = lambda q, k, v, **o: block_sparse.attention(q, k, v, rule, key_mask=mask, **o)
    compare(call, rule.tokens, rule.tokens, 8, 20, 2 if name in ("disc", "prefix") else 1, 1, dtype, gen)


def test_rules_in_half_precision():
    test_rules("disc", torch.float16)


@pytest.mark.parametrize("name", CHOICES)
def test_selected(name, monkeypatch, dtype=torch.float32):
    if name == "grouped" and dtype == torch.float32:  # wide rows in pieces
        monkeypatch.setattr(selected_launch, "tiles", lambda *_: tiles.Tiles(16, 16, 4, 1, piece=16))
    n, m, size, count, h, hk, extra = CHOICES[name]
    gen = torch.Generator().manual_seed(0)
    index = selected.select_blocks(torch.rand(2, hk, n, -(-m // size), generator=gen), count)
    index[0, 0, n // 2] = -1  # a query without a block
    index[-1, -1, :, 1:] = -1
    options = {"block_size": size, "causal": extra.get("causal", False)}
    if extra.get("mask"):
        options["key_mask"] = torch.rand(2, m, generator=gen) > 0.3
    if extra.get("positions"):
        options["positions"] = torch.arange(n) * 4
    compare(lambda *t, **o: selected.attention(*t, index, **options, **o), n, m, 8, 20, h, hk, dtype, gen)


def test_selected_in_half_precision(monkeypatch):
    test_selected("grouped", monkeypatch, torch.float16)


def test_scores_and_choice():
    gen = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 2, 9, 8, generator=gen), torch.randn(2, 1, 41, 8, generator=gen)
    stencil = selected.overlap_stencil(41, 21, 8, 4, 8, torch.device("cpu"))
    visible = torch.rand(2, 1, 9, 41, generator=gen) > 0.4
    visible[0, 0, 2] = False
    for seen in (None, visible, visible[:1, :, :1]):
        want = selected.block_scores(q, k, stencil, visible=seen)
        have = selected.block_scores(q, k, stencil, visible=seen, impl="triton")
        torch.testing.assert_close(have, want, rtol=1e-4, atol=1e-5)
    ties = want.mul(8).round()  # equal scores, forced and forbidden blocks
    forced, valid = torch.zeros(21, dtype=torch.bool), torch.ones(21, dtype=torch.bool)
    forced[[3, 20]], valid[5:] = True, False
    for count, options in (
        (4, {}),
        (4, {"forced": forced}),
        (7, {"forced": forced, "valid": valid}),
        (30, {}),
    ):
        have = selected.select_blocks(ties, count, impl="triton", **options)
        assert torch.equal(have, selected.select_blocks(ties, count, impl="torch", **options))


@pytest.mark.parametrize("op", ["block_sparse", "selected"])
def test_registration_one_graph_and_second_derivative(op):
    q, k, v = (torch.randn(1, 2, 6, 8, requires_grad=True) for _ in range(3))
    mask = torch.tensor([[True, True, False, True, True, True]])
    if op == "block_sparse":
        rule = block_sparse.Neighborhood((2, 3), (1, 3))
        call = lambda q, k, v, **o: block_sparse.attention(q, k, v, rule, key_mask=mask, **o)
        torch.library.opcheck(sparse_ops.block_sparse_fwd, (q, k, v, mask, list(rule.code()), 0.3))
    else:
        index = torch.tensor([0, 2]).expand(1, 2, 6, 2)
        call = lambda q, k, v, **o: selected.attention(
            q, k, v, index, block_size=2, causal=True, key_mask=mask, **o
        )
        torch.library.opcheck(
            selected_ops.selected_fwd, (q, k, v, index, mask, None, None, 2, True, 0.3, "triton")
        )
        torch.library.opcheck(selected_ops.selected_top, (torch.rand(2, 5), 3))
    have = torch.compile(lambda *t: call(*t, impl="triton"), fullgraph=True, backend="aot_eager")(q, k, v)
    torch.testing.assert_close(have, call(q, k, v, impl="torch"), rtol=1e-4, atol=1e-5)

    def second(impl, dtype):
        leaf = q.detach().to(dtype).requires_grad_()
        out, lse = call(leaf, leaf.sin(), leaf.cos(), impl=impl, return_lse=True)
        lse = lse.masked_fill(lse == -torch.inf, 0.0)
        (first,) = torch.autograd.grad(out.pow(2).sum() + lse.sum(), leaf, create_graph=True)
        return torch.autograd.grad(first.pow(2).sum(), leaf)[0].double()

    want = second("reference", torch.float64)
    assert (second("triton", torch.float32) - want).abs().max() < 1e-4 * want.abs().max()


def test_zero_sizes_and_gaps():
    rule = block_sparse.PrefixLM(5, 2)
    q = torch.randn(0, 2, 5, 8, requires_grad=True)
    out = block_sparse.attention(q, q, q, rule, impl="triton")
    assert out.shape == q.shape and torch.autograd.grad(out.sum(), q)[0].shape == q.shape
    index = torch.zeros(2, 2, 5, 0, dtype=torch.long)
    q = torch.randn(2, 2, 5, 8, requires_grad=True)
    out = selected.attention(q, q, q, index, block_size=2, impl="triton")
    assert (out == 0).all() and (torch.autograd.grad(out.sum(), q)[0] == 0).all()
    with pytest.raises(NotImplementedError, match="bias over pairs; use impl='torch'"):
        block_sparse.attention(q, q, q, rule, bias=torch.zeros(1, 1, 5, 5), impl="triton")
