"""Checks of the softmax kernels under the interpreter; run by test_triton.py as ``pytest tests/kernels/interpreted_softmax.py``.

Not collected on its own (the name does not start with test_): it needs TRITON_INTERPRET=1 before triton is imported.
"""

import os

import pytest
import torch

from kernels import softmax
from kernels.softmax import attention, launch, ops, tiles

assert os.environ.get("TRITON_INTERPRET") == "1", "run through tests/kernels/test_triton.py"

# name: (queries, keys, D, E, heads, key heads, options); bias and post are shapes, factors the batch sizes and the rank, mod a class, the shapes of its tables and its options.
CASES = {
    "plain": (7, 65, 8, 20, 2, 2, {}),
    "grouped-mask": (33, 20, 20, 8, 4, 2, {"mask": True}),
    "causal": (65, 65, 16, 16, 2, 1, {"causal": True}),
    "causal-short": (70, 9, 16, 16, 1, 1, {"causal": True, "mask": True}),
    "window": (40, 66, 16, 8, 1, 1, {"window": (5, 2)}),
    "window-left": (40, 66, 16, 8, 1, 1, {"window": (3, None), "causal": True}),
    "positions": (9, 35, 8, 8, 2, 2, {"causal": True, "positions": True}),
    "bias": (33, 35, 16, 8, 2, 2, {"bias": (2, 2, 33, 35), "mask": True}),
    "bias-shared": (9, 35, 16, 8, 2, 1, {"bias": (1, 2, 9, 35), "causal": True}),
    "bias-keys": (33, 35, 16, 8, 2, 2, {"bias": (2, 1, 1, 35), "mask": True}),
    "bias-wide": (5, 35, 20, 24, 1, 1, {"bias": (1, 1, 5, 35), "mask": True}),
    "bias-heads": (5, 35, 16, 8, 2, 2, {"bias": (1, 2, 1, 1)}),
    "bias-rows": (5, 35, 16, 8, 2, 2, {"bias": (1, 1, 5, 1)}),
    "one": (1, 130, 64, 64, 1, 1, {"bias": (1, 1, 1, 130)}),
    "one-packed": (1, 70, 8, 8, 4, 2, {"causal": True, "mask": True}),
    "cap-factors": (33, 20, 8, 8, 2, 1, {"softcap": 1.5, "factors": (1, 2, 3), "mask": True}),
    "factors-bias": (9, 20, 8, 8, 2, 2, {"factors": (2, 1, 17), "bias": (1, 2, 9, 20), "causal": True}),
    "post": (20, 33, 8, 8, 2, 2, {"post": (1, 2, 20, 33), "causal": True}),
    "skip": (40, 70, 16, 8, 2, 1, {"skip_threshold": 20.0, "skip_tile": (32, 16), "mask": True}),
    "skip-causal": (
        70,
        50,
        8,
        8,
        2,
        2,
        {"skip_threshold": 9.0, "skip_tile": (16, 32), "causal": True, "softcap": 4.0},
    ),
    "skip-positions": (
        40,
        35,
        8,
        8,
        2,
        1,
        {"skip_threshold": 9.0, "skip_tile": (16, 16), "window": (9, 3), "positions": True, "mask": True},
    ),
    "alibi": (9, 20, 8, 8, 2, 2, {"mod": (softmax.Alibi, [(2,)], {})}),
    "table": (
        9,
        20,
        8,
        8,
        2,
        2,
        {"mod": (softmax.RelativeTable, [(2, 9)], {}), "causal": True, "positions": True},
    ),
    "table2d": (
        22,
        22,
        8,
        8,
        2,
        2,
        {"mod": (softmax.RelativeTable2d, [(2, 7, 9)], {"prefix": 2}), "mask": True},
    ),
    "row-column": (9, 20, 8, 8, 2, 1, {"mod": (softmax.RowColumn, [(2, 2, 9, 4), (2, 2, 9, 5)], {})}),
    "polyline": (22, 22, 8, 8, 2, 2, {"mod": (softmax.Polyline, [(2, 2, 4, 5)] * 2, {"prefix": 2})}),
    "polyline-columns": (
        20,
        20,
        8,
        8,
        2,
        2,
        {"mod": (softmax.Polyline, [(2, 2, 4, 5)] * 2, {"column_first": True})},
    ),
}


@pytest.fixture(autouse=True)
def small_pieces(unwritten, monkeypatch):
    """Several tiles at the sizes of these tests."""
    monkeypatch.setattr(tiles, "table", lambda *a: tiles.Tiles(32, 16, 4, 1))


def inputs(case):
    n, m, d, e, h, hk, extra = CASES[case]
    gen = torch.Generator().manual_seed(0)
    new = lambda *s: torch.randn(*s, generator=gen, dtype=torch.float64)
    leaves = {"q": new(2, h, n, d), "k": new(2, hk, m, d), "v": new(2, hk, m, e)}
    options = {
        k: v for k, v in extra.items() if k in ("causal", "window", "softcap", "skip_threshold", "skip_tile")
    }
    if "skip_threshold" in extra:
        leaves["q"] *= 4.0  # scores far apart
    if extra.get("positions"):
        options["positions"] = torch.randint(-1, m, (2, n), generator=gen)
    if extra.get("mask"):
        options["key_mask"] = torch.rand(2, m, generator=gen) > 0.3
        options["key_mask"][-1] = False
    if "bias" in extra:
        leaves["bias"] = new(*extra["bias"])
    if "factors" in extra:
        bq, bk, rank = extra["factors"]
        leaves |= {"phi_q": new(bq, h, n, rank), "phi_k": new(bk, h, m, rank)}
    if "mod" in extra:
        leaves |= {f"table{i}": -new(*shape).abs() for i, shape in enumerate(extra["mod"][1])}
    if "post" in extra:
        options["post_mask"] = torch.rand(*extra["post"], generator=gen, dtype=torch.float64)
    return leaves, options, new(2, h, n, e), new(2, h, n)


def run(case, leaves, options, weight, lse_weight, impl, dtype):
    """Output, lse and the gradient of each input, in float64."""
    leaves = {name: t.to(dtype).requires_grad_() for name, t in leaves.items()}
    given = dict(options)
    if "post_mask" in given:
        given["post_mask"] = given["post_mask"].to(dtype)
    if "phi_q" in leaves:
        given["factors"] = leaves["phi_q"], leaves["phi_k"]
    if "mod" in CASES[case][-1]:
        mod, shapes, more = CASES[case][-1]["mod"]
        given["score_mod"] = mod(*(leaves[f"table{i}"] for i in range(len(shapes))), **more)
    q, k, v = (leaves[name] for name in "qkv")
    out, lse = attention(q, k, v, bias=leaves.get("bias"), return_lse=True, impl=impl, **given)
    assert out.dtype == dtype
    empty = lse == -torch.inf
    loss = (out.double() * weight).sum() + (lse.double().masked_fill(empty, 0.0) * lse_weight).sum()
    grads = torch.autograd.grad(loss, list(leaves.values()))
    found = {"out": out.double(), "lse": lse.double().masked_fill(empty, -1e3)}
    return found | {f"d{name}": g.double() for name, g in zip(leaves, grads, strict=True)}


def compare(case, dtype):
    leaves, options, weight, lse_weight = inputs(case)
    leaves = {
        name: t.to(dtype).double() for name, t in leaves.items()
    }  # the reference sees the same rounded numbers
    want = run(case, leaves, options, weight, lse_weight, "reference", torch.float64)
    have = run(case, leaves, options, weight, lse_weight, "triton", dtype)
    low = run(case, leaves, options, weight, lse_weight, "torch", dtype)
    # Band: twice the error of the torch path plus roundings of the largest entry; the kernels round P and dS to the input type.
    band = (24 if dtype == torch.float32 else 8) * torch.finfo(dtype).eps
    for name, exact in want.items():
        error = (have[name] - exact).abs().max()
        limit = 2 * (low[name] - exact).abs().max() + band * (exact.abs().max() + 1e-3)
        assert error <= limit, f"{case} {name}: {error:.2e} > {limit:.2e}"


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_fp32(case):
    compare(case, torch.float32)


@pytest.mark.parametrize("case", ["grouped-mask", "bias-wide"])
def test_wide_rows_in_pieces(case, monkeypatch):
    """A last piece that is not full."""
    monkeypatch.setattr(tiles, "table", lambda *a: tiles.Tiles(32, 16, 4, 1, piece=16))
    compare(case, torch.float32)


def test_skipping_drops_what_the_rule_drops_and_nothing_at_zero(monkeypatch):
    monkeypatch.setattr(launch, "SPLIT_PROGRAMS", 1)  # skipping never splits the keys
    leaves, options, _, _ = inputs("skip")
    q, k, v = (leaves[name].float() for name in "qkv")
    rule = softmax.reference.Skip(options["skip_threshold"], *options["skip_tile"])
    seen = options["key_mask"][:, None, None].expand(2, 2, 40, 70)
    scores = (q @ k.repeat_interleave(2, 1).mT) * 0.25
    dropped = softmax.reference.skipped(scores, seen, rule)[:, :, ::32, ::16]
    call = (*(None,) * 6, options["key_mask"], None, None)
    limit = softmax.skipping.log_limit(rule, k, options["key_mask"], None, None, (None, None)).expand(2, 40)
    kept = ops.softmax_fwd(q, k, v, *call, limit, -1, -1, False, 0.25, 0.0, [], list(options["skip_tile"]))[2]
    assert torch.equal(kept.bool().unflatten(0, (2, 2)), ~dropped)
    assert dropped[0].any() and not dropped[0].all()
    skip = {name: options[name] for name in ("key_mask", "skip_threshold", "skip_tile")}
    have, want = (
        attention(q, k, v, **skip, skip_voting=torch.arange(40).expand(2, -1) < 32, impl=impl)
        for impl in ("triton", "reference")
    )
    torch.testing.assert_close(have, want, rtol=1e-4, atol=1e-5)
    assert have[:, :, 32:].abs().max() == 0  # nobody in their tile has a say
    plain = attention(q, k, v, impl="triton", return_lse=True)
    for a, b in zip(
        attention(q, k, v, impl="triton", return_lse=True, skip_threshold=1e-30, skip_tile=(32, 16)),
        plain,
        strict=True,
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("case", ["bias-wide", "bias-keys"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_values_and_gradients_half(case, dtype):
    compare(case, dtype)


@pytest.mark.parametrize("case", ["bias-shared", "bias-keys", "bias-rows"])
def test_bias_gradient_without_its_kernel(case, monkeypatch):
    monkeypatch.setattr(tiles, "bias_kernel", lambda *a: False)
    monkeypatch.setattr(ops, "BLOCK_ELEMENTS", 300)  # several blocks of rows
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


@pytest.mark.parametrize("options", [{}, {"skip_threshold": 3.0, "skip_tile": (16, 16)}], ids=["all", "skip"])
def test_second_derivative_is_exact(options):
    gen = torch.Generator().manual_seed(0)
    x = torch.randn(1, 1, 40 if options else 5, 8, generator=gen, dtype=torch.float64)

    def second(impl, dtype):
        leaf = x.to(dtype).requires_grad_()
        out, lse = attention(
            4 * leaf, leaf.sin(), leaf.cos(), impl=impl, return_lse=True, causal=True, **options
        )
        (first,) = torch.autograd.grad(out.pow(2).sum() + lse.sum(), leaf, create_graph=True)
        (again,) = torch.autograd.grad(first.pow(2).sum(), leaf)
        return first.double(), again.double()

    for have, want in zip(second("triton", torch.float32), second("reference", torch.float64), strict=True):
        assert (have - want).abs().max() < 1e-4 * want.abs().max()


def test_opcheck_and_one_graph():
    q, k, v = (torch.randn(1, 2, 5, 8, requires_grad=True) for _ in range(3))
    bias, mask = torch.randn(1, 2, 1, 5, requires_grad=True), torch.tensor([[True, True, False, True, True]])
    phi = torch.randn(1, 2, 5, 3, requires_grad=True)
    table = torch.randn(2, 9, requires_grad=True)
    places = torch.arange(5)[None]
    call = (
        q,
        k,
        v,
        bias,
        phi,
        phi,
        table,
        None,
        None,
        mask,
        places,
        places,
        None,
        -1,
        0,
        True,
        0.3,
        2.0,
        [2, 4],
        [],
    )
    torch.library.opcheck(ops.softmax_fwd, call)
    call = lambda q, k, v: attention(q, k, v, impl="triton", causal=True)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    want, have = attention(q, k, v, impl="torch", causal=True), compiled(q, k, v)
    torch.testing.assert_close(have, want, rtol=1e-4, atol=1e-5)
    for a, b in zip(
        torch.autograd.grad(have.sum(), (q, k, v)), torch.autograd.grad(want.sum(), (q, k, v)), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_splitting_the_keys_changes_nothing(monkeypatch):
    q, k, v = (torch.randn(1, 2, n, 16) for n in (3, 200, 200))
    mask = torch.ones(1, 200, dtype=torch.bool)
    mask[:, 64:128] = False  # a whole split without a key
    monkeypatch.setattr(launch, "SPLIT_PROGRAMS", 6)
    calls = []
    monkeypatch.setattr(
        launch, "merge_lse", lambda parts: calls.append(len(parts)) or softmax.merge_lse(parts)
    )
    for options in ({"key_mask": mask}, {"window": (150, 0)}):
        have = attention(q, k, v, impl="triton", return_lse=True, **options)
        want = attention(q, k, v, impl="reference", return_lse=True, **options)
        for a, b in zip(have, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert calls == [3, 3]


def test_what_the_kernels_lack_names_the_way_out():
    q, k, v = (torch.randn(1, 1, 3, 8) for _ in range(3))
    post = torch.ones(1, 1, 3, 3, requires_grad=True)
    for options in ({"dropout": 0.1}, {"skip_threshold": 0.1}, {"post_mask": post}):
        with pytest.raises(NotImplementedError, match="impl='torch'"):
            attention(q, k, v, impl="triton", **options)
