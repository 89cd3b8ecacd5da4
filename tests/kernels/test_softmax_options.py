"""Softmax attention's options on the torch path: score mods, factors, factors after the softmax, gates, windows in blocks; and hard inputs."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from kernels import block_sparse, softmax
from kernels.softmax import attention
from kernels.softmax import torch as torch_path

D64 = torch.float64
N, M = 22, 22
MODS = {
    "alibi": (softmax.Alibi, [(4,)], {}),
    "table": (softmax.RelativeTable, [(4, 9)], {}),
    "table2d": (softmax.RelativeTable2d, [(4, 7, 9)], {"prefix": 2}),
    "row-column": (softmax.RowColumn, [(2, 4, N, 2), (2, 4, N, 11)], {}),
    "polyline": (softmax.Polyline, [(2, 4, 4, 5)] * 2, {"prefix": 2}),
    "polyline-columns": (softmax.Polyline, [(2, 4, 2, 11)] * 2, {"column_first": True}),
}


def make(*shape, gen, dtype=D64):
    return torch.randn(*shape, generator=gen, dtype=D64).to(dtype)


def qkv(gen, n=N, m=M, hk=2, dtype=D64):
    return [make(2, h, t, d, gen=gen, dtype=dtype) for h, t, d in ((4, n, 6), (hk, m, 6), (hk, m, 5))]


def compare(call, tensors, tolerance):
    """Value and gradient of each input: reference in float64 against torch in float32 and float64."""
    weight, found = None, []
    for impl, dtype in (("reference", D64), ("torch", torch.float32), ("torch", D64)):
        leaves = [t.to(dtype).requires_grad_() for t in tensors]
        out = call(*leaves, impl=impl)
        weight = torch.randn_like(out, dtype=D64) if weight is None else weight
        found.append([out, *torch.autograd.grad((out * weight.to(dtype)).sum(), leaves)])
    for single, double, want in zip(found[1], found[2], found[0], strict=True):
        torch.testing.assert_close(single.double(), want, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(double, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("blocks", [1 << 24, 1000], ids=["whole", "rows"])
@pytest.mark.parametrize("name", MODS)
def test_score_mods_equal_the_reference(name, blocks, monkeypatch):
    defaults = torch_path.attention.__kwdefaults__ | {"block_elements": blocks}
    monkeypatch.setattr(torch_path.attention, "__kwdefaults__", defaults)
    kind, shapes, options = MODS[name]
    gen = torch.Generator().manual_seed(0)
    tables = [-make(*shape, gen=gen).abs() for shape in shapes]
    call = lambda q, k, v, *t, impl: attention(q, k, v, score_mod=kind(*t, **options), causal=True, impl=impl)
    compare(call, [*qkv(gen), *tables], 3e-5)


def test_mods_mean_what_their_docstrings_say():
    """Against loops over pairs."""
    gen = torch.Generator().manual_seed(0)
    q = torch.zeros(1, 1, N, 1, dtype=D64)
    seen = {}
    for name, (kind, shapes, options) in MODS.items():
        tables = [
            -make(1, *s[1:], gen=gen).abs() if len(s) < 4 else -make(1, 1, *s[2:], gen=gen).abs()
            for s in shapes
        ]
        mod = kind(*tables, **options)
        weights = attention(q, q, torch.eye(N, dtype=D64)[None, None], score_mod=mod)[0, 0]
        seen[name] = (weights.log() - weights.log()[:, :1]).clone(), [t[0] for t in tables]

    def table2d(t, i, j):
        if i < 2 or j < 2:
            return 0.0
        (a, b), (c, d) = divmod(i - 2, 5), divmod(j - 2, 5)
        return float(t[0][c - a + 3, d - b + 4])

    def polyline(t, i, j):
        if i < 2 or j < 2:
            return 0.0
        (a, b), (c, d) = divmod(i - 2, 5), divmod(j - 2, 5)
        along = t[0][0, a, min(b, d) + 1 : max(b, d) + 1].sum()
        return float(along + t[1][0, min(a, c) + 1 : max(a, c) + 1, d].sum())

    rules = {
        "alibi": lambda t, i, j: -float(t[0]) * abs(i - j),
        "table": lambda t, i, j: float(t[0][min(max(j - i, -4), 4) + 4]),
        "table2d": table2d,
        "row-column": lambda t, i, j: float(t[0][0, i, j // 11] + t[1][0, i, j % 11]),
        "polyline": polyline,
    }
    for name, rule in rules.items():
        have, tables = seen[name]
        want = torch.tensor(
            [[rule(tables, i, j) - rule(tables, i, 0) for j in range(N)] for i in range(N)], dtype=D64
        )
        assert (have - want).abs().max() < 1e-9, name


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_factors_equal_the_dense_bias(softcap):
    gen = torch.Generator().manual_seed(1)
    tensors = [*qkv(gen, 7, 9), make(1, 4, 7, 3, gen=gen), make(2, 4, 9, 3, gen=gen)]
    call = lambda q, k, v, a, b, impl: attention(q, k, v, factors=(a, b), softcap=softcap, impl=impl)
    compare(call, tensors, 2e-5)
    q, k, v, a, b = tensors
    dense = attention(q, k, v, bias=a @ b.mT, softcap=softcap)
    assert (attention(q, k, v, factors=(a, b), softcap=softcap) - dense).abs().max() < 1e-12


def test_factors_stay_exact_in_half_precision():
    """Places up to 5000 as factors: rounded to bfloat16 they would be off by 16."""
    place = torch.arange(4000.0, 5000.0)[None, None, :, None]
    one = torch.ones_like(place)
    factors = torch.cat((place, one), -1) * 0.01, torch.cat((-one, place), -1)  # 0.01 (j - i)
    q, k, v = (
        torch.randn(1, 1, 1000, 8, generator=torch.Generator().manual_seed(0)).bfloat16() for _ in range(3)
    )
    have = attention(q, k, v, factors=factors)
    want = attention(q.float(), k.float(), v.float(), bias=0.01 * (place.mT - place))
    assert have.dtype == torch.bfloat16 and (have.float() - want).abs().max() < 0.02


def test_post_mask_and_head_gate():
    gen = torch.Generator().manual_seed(2)
    tensors = [*qkv(gen, 7, 9), torch.rand(1, 4, 7, 9, generator=gen, dtype=D64), make(2, 4, 7, gen=gen)]
    call = lambda q, k, v, w, g, impl: attention(q, k, v, post_mask=w, head_gate=g, impl=impl)
    compare(call, tensors, 2e-5)
    q, k, v, w, g = tensors
    k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    want = ((q @ k.mT * 6**-0.5).softmax(-1) * w) @ v * g[..., None]
    assert (call(*tensors, impl="torch") - want).abs().max() < 1e-12


@pytest.mark.parametrize("name", ["table2d", "polyline"])
def test_options_differentiate_twice(name):
    kind, _, options = MODS[name]
    gen = torch.Generator().manual_seed(3)
    tables = (
        [make(1, 3, 3, gen=gen)]
        if name == "table2d"
        else [-make(1, 1, 2, 2, gen=gen).abs() for _ in range(2)]
    )
    leaves = (
        [make(1, 1, 4, 2, gen=gen) for _ in range(3)] + [make(1, 1, 4, 2, gen=gen) for _ in range(2)] + tables
    )
    call = lambda q, k, v, a, b, *t: attention(q, k, v, factors=(a, b), score_mod=kind(*t), return_lse=True)
    assert torch.autograd.gradgradcheck(call, [t.requires_grad_() for t in leaves])


@pytest.mark.parametrize("window", [(20, 0), (13, 7), (300, 3), (0, 0)])
def test_windows_in_blocks_equal_the_reference(window, monkeypatch):
    monkeypatch.setattr(torch_path, "_visible", lambda *a: pytest.fail("not the path of row blocks"))
    gen = torch.Generator().manual_seed(4)
    q, k, v = qkv(gen, 301, 301)
    leaves = [t.float().requires_grad_() for t in (q, k, v)]
    out = attention(*leaves, window=window)
    monkeypatch.undo()
    exact = [t.requires_grad_() for t in (q, k, v)]
    want = attention(*exact, window=window, impl="reference")
    torch.testing.assert_close(out.double(), want, rtol=1e-4, atol=1e-5)
    for a, b in zip(
        torch.autograd.grad(out.sum(), leaves), torch.autograd.grad(want.sum(), exact), strict=True
    ):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"factors": (torch.zeros(1, 4, 9, 3), torch.zeros(1, 4, 9, 2))}, "phi|factors must be"),
        ({"score_mod": softmax.Alibi(torch.zeros(3))}, "slopes must be floating point"),
        ({"score_mod": softmax.RelativeTable(torch.zeros(4, 8))}, "2 L \\+ 1"),
        (
            {"score_mod": softmax.Polyline(torch.zeros(2, 4, 2, 2), torch.zeros(2, 4, 2, 2))},
            "4 tokens, got 9 keys",
        ),
        ({"post_mask": torch.zeros(9, 9)}, "post_mask must be 4-D"),
    ],
)
def test_errors_name_the_rule(options, message):
    gen = torch.Generator().manual_seed(0)
    with pytest.raises(ValueError, match=message):
        attention(*qkv(gen, 9, 9), **options)


# ---------------------------------------------------------------- hard inputs


@pytest.mark.parametrize("call", ["plain", "window", "neighbourhood", "lse"])
@pytest.mark.parametrize("size", [0.0, 1e4])
def test_all_equal_and_extreme_scores(call, size):
    gen = torch.Generator().manual_seed(5)
    q, k, v = (make(1, 2, 600, 8, gen=gen, dtype=torch.float32) for _ in range(3))
    calls = {
        "plain": lambda *t: attention(*t),
        "window": lambda *t: attention(*t, window=9),
        "lse": lambda *t: attention(*t, return_lse=True)[0],
        "neighbourhood": lambda *t: block_sparse.attention(*t, block_sparse.Neighborhood((20, 30), (5, 5))),
    }
    leaves = [(size * q).requires_grad_(), k.requires_grad_(), v.requires_grad_()]
    out = calls[call](*leaves)
    assert all(t.isfinite().all() for t in (out, *torch.autograd.grad(out.sum(), leaves)))
    want = calls[call](size * q.double(), k.double(), v.double())
    assert (out.double() - want).abs().max() < (2e-5 if size == 0 else 2e-2)
    if size == 0 and call == "plain":
        assert (out - v.mean(2, keepdim=True)).abs().max() < 1e-5


def test_expanded_and_strided_inputs():
    gen = torch.Generator().manual_seed(6)
    row = make(1, 1, 300, 8, gen=gen, dtype=torch.float32)
    q = row.expand(2, 3, 300, 8)
    k = make(2, 3, 8, 300, gen=gen, dtype=torch.float32).mT
    v = make(2, 300, 3, 8, gen=gen, dtype=torch.float32).transpose(1, 2)
    rule = block_sparse.GlobalWindow(300, 4, 1)
    for call in (attention, lambda *t: attention(*t, window=4), lambda *t: block_sparse.attention(*t, rule)):
        dense = call(q.contiguous(), k.contiguous(), v.contiguous())
        torch.testing.assert_close(call(q, k, v), dense, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "options", [{}, {"causal": True}, {"window": (64, 0)}], ids=["plain", "causal", "window"]
)
def test_65536_tokens_need_no_square_matrix(options):
    """One head of 4 channels; N x N floats would be 16 GiB, and a mask of them 4 GiB."""
    n = 65536
    if "window" not in options:
        n = 16384  # the same code; the work of 65,536 is for the benchmark
    q = torch.randn(1, 1, n, 4, generator=torch.Generator().manual_seed(0))
    sizes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            found = out if isinstance(out, (tuple, list)) else (out,)
            sizes.extend(t.untyped_storage().nbytes() for t in found if isinstance(t, torch.Tensor))
            return out

    with Watch():
        attention(q, q, q, **options)
    assert sizes and max(sizes) < n * n / 8


def test_offsets_beyond_int32_are_shapes_only():
    """B H N D of 2^32 under fake tensors: the shapes and strides of every operator are right without the memory."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from kernels.block_sparse import ops as sparse_ops
    from kernels.selected import ops as selected_ops
    from kernels.softmax import ops

    b, h, n, d = 64, 64, 8192, 128
    with FakeTensorMode():
        q = torch.empty(b, h, n, d, dtype=torch.bfloat16)
        assert q.numel() > 2**31
        rest = (*(None,) * 10, -1, -1, False, 1.0, 0.0, [], [64, 32])
        out, lse, kept = ops.softmax_fwd(q, q, q, *rest)
        assert kept.shape == (b * h, n // 64, n // 32)
        assert out.shape == q.shape and lse.shape == (b, h, n)
        grads = ops.softmax_bwd(q, q, q, *rest, lse, out, lse, False, kept)
        assert [g.numel() for g in grads] == [q.numel()] * 3 + [0] * 3
        rule = list(block_sparse.PrefixLM(n, 4).code())
        out, lse = sparse_ops.block_sparse_fwd(q, q, q, None, rule, 1.0)
        assert out.shape == q.shape and out.stride()[0] == h * n * d
        index = torch.empty(b, h, n, 2, dtype=torch.long)
        out, lse = selected_ops.selected_fwd(q, q, q, index, None, None, None, 64, True, 1.0, "triton")
        assert out.shape == q.shape and lse.shape == (b, h, n)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    n=st.integers(1, 40),
    m=st.integers(1, 40),
    group=st.sampled_from([1, 2]),
    left=st.one_of(st.none(), st.integers(0, 9)),
    right=st.one_of(st.none(), st.integers(0, 9)),
    keep=st.floats(0.0, 1.0),
    blocks=st.sampled_from([200, 1 << 24]),
    seed=st.integers(0, 5),
)
def test_any_window_mask_and_block_size(n, m, group, left, right, keep, blocks, seed):
    """Torch equals reference; rows without a key are zero; a constant on a row's scores changes nothing; keys may be permuted."""
    gen = torch.Generator().manual_seed(seed)
    q, k, v = make(2, 2, n, 4, gen=gen), *(make(2, 2 // group, m, 4, gen=gen) for _ in range(2))
    mask = torch.rand(2, m, generator=gen) < keep
    options = {"key_mask": mask, "window": (left, right), "return_lse": True}
    want, want_lse = attention(q, k, v, impl="reference", **options)
    saved = torch_path.attention.__kwdefaults__["block_elements"]
    torch_path.attention.__kwdefaults__["block_elements"] = blocks
    try:
        have, lse = attention(q, k, v, **options)
        fast = attention(q.float(), k.float(), v.float(), key_mask=mask, window=(left, right))
    finally:
        torch_path.attention.__kwdefaults__["block_elements"] = saved
    torch.testing.assert_close(have, want)
    torch.testing.assert_close(lse, want_lse)
    torch.testing.assert_close(fast.double(), want, rtol=1e-4, atol=1e-5)
    assert (have[want_lse == -torch.inf] == 0).all()
    order = torch.randperm(m, generator=gen)
    places = (torch.arange(n) + m - n, order)
    moved = attention(
        q, k[:, :, order], v[:, :, order], key_mask=mask[:, order], window=(left, right), bias=make(1, 1, n, 1, gen=gen),
        **({"positions": places} if (left, right) != (None, None) else {}),
    )  # fmt: skip
    torch.testing.assert_close(moved, want, rtol=1e-7, atol=1e-7)


def test_plain_attention_agrees_with_sdpa_math():
    gen = torch.Generator().manual_seed(7)
    q, k, v = qkv(gen, 33, 33, hk=4)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        want = scaled_dot_product_attention(q, k, v, is_causal=True)
    for impl in ("reference", "torch"):
        torch.testing.assert_close(attention(q, k, v, causal=True, impl=impl), want)
