"""Mask rules, block lists, and attention under them."""

import warnings

import pytest
import torch

from kernels import block_sparse as sparse
from kernels import softmax as dense
from kernels.block_sparse import torch as torch_path
from kernels.block_sparse.lists import key_lists
from kernels.block_sparse.masks import decode

CPU = torch.device("cpu")
RULES = {
    "1d": sparse.Neighborhood((37,), (5,)),
    "1d-dilated": sparse.Neighborhood((37,), (4,), (3,)),
    "2d": sparse.Neighborhood((7, 9), (3, 4), prefix=2),
    "2d-stride": sparse.Neighborhood((8, 8), (4, 3), (2, 1), (3, 2)),
    "2d-causal": sparse.Neighborhood((6, 7), (3, 3), causal=(True, False)),
    "3d": sparse.Neighborhood((3, 4, 5), (3, 2, 3)),
    "disc": sparse.Disc((6, 7), 2.3, prefix=1),
    "segments": sparse.Segments((0, 0, 0, 1, 1, 2, 2, 2, 2, 5), causal=True),
    "prefix": sparse.PrefixLM(30, 7),
    "window": sparse.GlobalWindow(33, 4, leading=3),
}


def neighbours(length, w, d, s, causal, x):
    """The rule of one axis, written out for one query."""
    group, p = x % d, x // d
    n = -(-(length - group) // d)
    if causal:
        leader = min(p // s * s + s - 1, n - 1)
        return {j * d + group for j in range(n) if j <= p and leader - j < w}
    leader = min(p // s * s + s // 2, n - 1)
    centre = min(max(leader, w // 2), n - 1 - (w - 1 - w // 2))
    return {j * d + group for j in range(centre - w // 2, centre + w - w // 2)}


@pytest.mark.parametrize("name", ["1d", "1d-dilated", "2d", "2d-stride", "2d-causal", "3d"])
def test_neighbourhood_rule_written_out(name):
    rule = RULES[name]
    have = sparse.dense_mask(rule, CPU)[rule.prefix :, rule.prefix :]
    places = list(
        torch.cartesian_prod(*(torch.arange(s) for s in rule.shape)).reshape(-1, len(rule.shape)).tolist()
    )
    axes = list(zip(rule.shape, rule.window, rule.dilation, rule.stride, rule.causal, strict=True))
    for i, here in enumerate(places):
        near = [neighbours(*axis, x) for axis, x in zip(axes, here, strict=True)]
        want = [all(y in s for y, s in zip(there, near, strict=True)) for there in places]
        assert have[i].tolist() == want
    if not any(rule.causal):
        size = torch.tensor(rule.window).prod()
        assert (have.sum(-1) == size).all()


@pytest.mark.parametrize("name", RULES)
def test_block_lists_cover_the_mask(name):
    rule = RULES[name]
    seen = sparse.dense_mask(rule, CPU)
    lists = sparse.block_lists(rule, 8, 4, CPU)
    n = rule.tokens
    pairs = set()
    for t in range(-(-n // 8)):
        cols = lists.col[lists.row_ptr[t] : lists.row_ptr[t + 1]].tolist()
        full = lists.full[lists.row_ptr[t] : lists.row_ptr[t + 1]].tolist()
        for c in range(-(-n // 4)):
            part = seen[t * 8 : t * 8 + 8, c * 4 : c * 4 + 4]
            assert bool(part.any()) == (c in cols)
            if c in cols:
                assert full[cols.index(c)] == bool(part.all())
                pairs.add((t, c))
    back = set()
    for c in range(-(-n // 4)):
        for at in range(int(lists.t_row_ptr[c]), int(lists.t_row_ptr[c + 1])):
            t = int(lists.t_col[at])
            back.add((t, c))
            assert int(lists.col[lists.t_at[at]]) == c
    assert back == pairs


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_tiles_equal_reference_in_value_and_gradient(name, masked, monkeypatch):
    monkeypatch.setattr(torch_path, "DENSE_TOKENS", 0)
    monkeypatch.setattr(torch_path, "DENSE_SHARE", 9.0)
    monkeypatch.setattr(torch_path, "TILE_ROWS", 4)
    rule = RULES[name]
    n, g = rule.tokens, torch.Generator().manual_seed(0)
    new = lambda h, d: torch.randn(2, h, n, d, generator=g, dtype=torch.float64)
    tensors = new(4, 6), new(2, 6), new(2, 5)
    mask = None
    if masked:
        mask = torch.rand(2, n, generator=g) > 0.4
        mask[1, : n // 2] = False
    weight, rows = new(4, 5), torch.randn(2, 4, n, generator=g, dtype=torch.float64)
    found = []
    for impl, lse_wanted, dtype in (
        ("reference", True, torch.float64),
        ("torch", True, torch.float64),
        ("torch", False, torch.float32),
    ):
        leaves = [t.to(dtype).requires_grad_() for t in tensors]
        out = sparse.attention(*leaves, rule, key_mask=mask, return_lse=lse_wanted, impl=impl)
        loss = 0.0
        if lse_wanted:
            out, lse = out
            loss = (lse.masked_fill(lse == -torch.inf, 0.0) * rows).sum() * 0.1
        plain = torch.autograd.grad((out * weight.to(dtype)).sum(), leaves, retain_graph=True)
        extra = torch.autograd.grad(loss, leaves[:2]) if lse_wanted else None
        found.append((out.double(), plain, extra))
    for have, tolerance in ((found[1], 1e-11), (found[2], 2e-5)):
        assert (have[0] - found[0][0]).abs().max() < tolerance
        for a, b in zip(have[1], found[0][1], strict=True):
            assert (a.double() - b).abs().max() < tolerance
    for a, b in zip(found[1][2], found[0][2], strict=True):
        assert (a - b).abs().max() < 1e-11


@pytest.mark.parametrize("dense_tokens", [0, 1 << 20], ids=["tiles", "dense"])
def test_second_derivative(dense_tokens, monkeypatch):
    monkeypatch.setattr(torch_path, "DENSE_TOKENS", dense_tokens)
    monkeypatch.setattr(torch_path, "TILE_ROWS", 2)
    gen = torch.Generator().manual_seed(0)
    leaves = [torch.randn(1, 1, 6, 2, generator=gen, dtype=torch.float64).requires_grad_() for _ in range(3)]
    mask = torch.tensor([[True, False, True, True, True, True]])
    call = lambda *t: sparse.attention(
        *t, sparse.GlobalWindow(6, 1, 1), key_mask=mask, higher_order=True, return_lse=True
    )
    assert torch.autograd.gradgradcheck(call, leaves)


def test_whole_rule_equals_softmax_and_bias_takes_the_dense_path():
    q, k, v = (torch.randn(1, 2, 12, 4) for _ in range(3))
    rule = sparse.Neighborhood((3, 4), (3, 4))
    assert torch.allclose(sparse.attention(q, k, v, rule), dense.attention(q, k, v), atol=1e-6)
    bias = torch.randn(1, 2, 12, 12)
    near = sparse.Disc((3, 4), 2)
    want = dense.attention(q, k, v, bias=bias.masked_fill(~sparse.dense_mask(near, CPU), -torch.inf))
    assert torch.allclose(sparse.attention(q, k, v, near, bias=bias), want, atol=1e-6)


def test_work_grows_with_the_window_and_not_with_the_tokens():
    pairs = [key_lists(sparse.Neighborhood((s, s), (5, 5)), 64, CPU).pairs / s**2 for s in (24, 48)]
    assert pairs[1] < 1.1 * pairs[0] and pairs[1] < 200


def test_refusals_name_the_rule():
    q = torch.randn(1, 1, 5, 4)
    with pytest.raises(ValueError, match="12 tokens"):
        sparse.attention(q, q, q, sparse.Disc((3, 4), 2))
    with pytest.raises(ValueError, match="dilation <= length"):
        sparse.Neighborhood((5,), (3,), (2,))
    with pytest.raises(ValueError, match="each of the 2 axes"):
        sparse.Neighborhood((5, 5), (3,))
    assert sparse.cost(1, 2, 10, 3, 4).flops == 2 * 2 * 10 * 3 * 8


@pytest.mark.parametrize("name", RULES)
def test_a_rule_and_its_code_are_the_same(name):
    rule = RULES[name]
    again = decode(rule.code())
    assert again.tokens == rule.tokens
    assert torch.equal(sparse.dense_mask(again, CPU), sparse.dense_mask(rule, CPU))


@pytest.mark.parametrize("name", ["1d-dilated", "2d", "2d-stride", "2d-causal", "3d"])
def test_agrees_with_natten(name):
    """Its flex backend, forward only; a source install without its compiled library will do."""
    reason = "natten is not installed (pip install --no-deps --no-build-isolation natten)"
    functional = pytest.importorskip("natten.functional", reason=reason)
    rule = RULES[name]
    gen = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, rule.tokens - rule.prefix, 8, generator=gen) for _ in range(3))
    if rule.prefix:
        rule = sparse.Neighborhood(rule.shape, rule.window)
    grids = [t.transpose(1, 2).unflatten(1, rule.shape) for t in (q, k, v)]
    call = getattr(functional, f"na{len(rule.shape)}d")
    options = dict(kernel_size=rule.window, dilation=rule.dilation, stride=rule.stride, is_causal=rule.causal)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        want = call(*grids, backend="flex-fna", **options)
    want = want.flatten(1, len(rule.shape)).transpose(1, 2)
    torch.testing.assert_close(sparse.attention(q, k, v, rule), want, rtol=1e-4, atol=1e-5)
