"""Softmax attention: torch path against the written-out reference, empty rows, merging, row blocks."""

import pytest
import torch
import torch.nn.functional as F

from kernels.softmax import apply_sink, attention, cost, merge_lse
from kernels.softmax import torch as torch_path

D64 = torch.float64


def make(n=9, m=9, d=6, e=5, batch=2, heads=4, key_heads=4, dtype=torch.float32, seed=0, grad=False):
    gen = torch.Generator().manual_seed(seed)
    new = lambda h, s, c: torch.randn(batch, h, s, c, generator=gen, dtype=D64).to(dtype).requires_grad_(grad)
    return new(heads, n, d), new(key_heads, m, d), new(key_heads, m, e)


def both(args, weight, **options):
    results = []
    for impl, dtype in (("reference", D64), ("torch", args[0].dtype)):
        leaves = [t.detach().to(dtype).requires_grad_() for t in args]
        given = dict(options)
        if given.get("bias") is not None:
            given["bias"] = given["bias"].detach().to(dtype).requires_grad_()
            leaves.append(given["bias"])
        out = attention(*leaves[:3], impl=impl, **given)
        results.append([out, *torch.autograd.grad((out * weight.to(dtype)).sum(), leaves)])
    return results


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("bias", [None, (1, 4, 1, 1), (2, 1, 0, 0)], ids=["nobias", "headbias", "fullbias"])
@pytest.mark.parametrize("pattern", ["global", "causal", "window", "positions"])
@pytest.mark.parametrize(
    "sizes", [(1, 1), (7, 66), (66, 7), (65, 65)], ids=["N1M1", "N7M66", "N66M7", "N65M65"]
)
@pytest.mark.parametrize("blocks", [1 << 24, 700], ids=["whole", "blocks"])
def test_torch_equals_reference_in_value_and_gradient(masked, bias, pattern, sizes, blocks, monkeypatch):
    n, m = sizes
    monkeypatch.setattr(
        torch_path.attention,
        "__kwdefaults__",
        {**torch_path.attention.__kwdefaults__, "block_elements": blocks},
    )
    options = {"causal": pattern in ("causal", "positions")}
    if pattern == "window":
        options["window"] = (3, 1)
    if pattern == "positions":
        options["positions"] = (torch.arange(n) % 5, torch.arange(m) % 7)
    gen = torch.Generator().manual_seed(1)
    if bias is not None:
        options["bias"] = torch.randn(bias[0], bias[1], bias[2] or n, bias[3] or m, generator=gen, dtype=D64)
    if masked:
        options["key_mask"] = torch.rand(2, m, generator=gen) > 0.4
        options["key_mask"][-1] = False
    want, have = both(make(n, m), torch.randn(2, 4, n, 5, generator=gen, dtype=D64), **options)
    for a, b in zip(have, want, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=2e-5)
    if masked:
        assert (have[0][-1] == 0).all() and all((g[-1] == 0).all() for g in have[1:4])


@pytest.mark.parametrize("explicit", [False, True], ids=["sdpa", "explicit"])
def test_grouped_heads_equal_repeated_ones(explicit):
    q, k, v = make(heads=6, key_heads=2)
    out = attention(q, k, v, higher_order=explicit, causal=True)
    full = attention(q, k.repeat_interleave(3, 1), v.repeat_interleave(3, 1), causal=True)
    torch.testing.assert_close(out, full, rtol=1e-5, atol=1e-6)


def test_lse_carries_gradients_and_derivatives_of_second_order():
    args = make(3, 4, 2, 2, batch=1, heads=1, key_heads=1, dtype=D64, grad=True)
    mask = torch.tensor([[True, False, True, True]])
    bias = torch.randn(1, 1, 3, 4, dtype=D64, requires_grad=True)
    call = lambda q, k, v, b: attention(q, k, v, bias=b, key_mask=mask, causal=True, return_lse=True)
    assert torch.autograd.gradcheck(call, (*args, bias))
    assert torch.autograd.gradgradcheck(call, (*args, bias))


def test_row_blocks_differentiate_twice(monkeypatch):
    monkeypatch.setattr(
        torch_path.attention, "__kwdefaults__", {**torch_path.attention.__kwdefaults__, "block_elements": 5}
    )
    args = make(3, 4, 2, 2, batch=1, heads=1, key_heads=1, dtype=D64, grad=True)
    assert torch.autograd.gradgradcheck(lambda q, k, v: attention(q, k, v), args)


def test_forward_mode_with_higher_order():
    q, k, v = make()
    _, tangent = torch.func.jvp(lambda x: attention(x, k, v, higher_order=True), (q,), (torch.ones_like(q),))
    step = 1e-4
    near = [attention(*(t.double() for t in (q + s * step, k, v))) for s in (1, -1)]
    torch.testing.assert_close(tangent.double(), (near[0] - near[1]) / (2 * step), rtol=1e-2, atol=1e-4)


def test_merging_disjoint_keys_equals_one_pass_with_empty_parts():
    q, k, v = make(7, 20, dtype=D64, grad=True)
    mask = torch.rand(2, 20, generator=torch.Generator().manual_seed(0)) > 0.5
    mask[:, :6] = False
    mask[1] = False
    parts = [
        attention(q, k[:, :, a:b], v[:, :, a:b], key_mask=mask[:, a:b], return_lse=True)
        for a, b in ((0, 6), (6, 7), (7, 20))
    ]
    out, lse = merge_lse(parts)
    want, want_lse = attention(q, k, v, key_mask=mask, return_lse=True)
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(lse, want_lse)
    grads = [torch.autograd.grad(o.sin().sum(), (q, k, v), retain_graph=True) for o in (out, want)]
    assert all(g.isfinite().all() for g in grads[0])
    torch.testing.assert_close(grads[0], grads[1])
    with pytest.raises(ValueError, match="at least one"):
        merge_lse([])


@pytest.mark.parametrize("explicit", [False, True], ids=["sdpa", "explicit"])
def test_masked_keys_have_no_influence_even_as_nan(explicit):
    q, k, v = make(4, 8)
    keep = torch.tensor([True, False, True, True, False, True, True, False])
    bad_k, bad_v = k.clone(), v.clone()
    bad_k[:, :, ~keep], bad_v[:, :, ~keep] = torch.nan, torch.inf
    bad_k.requires_grad_(), bad_v.requires_grad_()
    out = attention(q, bad_k, bad_v, key_mask=keep.expand(2, -1), higher_order=explicit)
    torch.testing.assert_close(out, attention(q, k[:, :, keep], v[:, :, keep]), rtol=1e-5, atol=1e-6)
    for grad in torch.autograd.grad(out.sum(), (bad_k, bad_v)):
        assert grad.isfinite().all() and (grad[:, :, ~keep] == 0).all()


@pytest.mark.parametrize("size", [80.0, 1e4])
def test_extreme_logits(size):
    for dtype in (torch.float32, torch.bfloat16):
        for options in ({}, {"return_lse": True}, {"causal": True}):
            q, k, v = (t.to(dtype).detach().requires_grad_() for t in (make()[0] * size, *make()[1:]))
            out = attention(q, k, v, **options)
            out = out[0] if isinstance(out, tuple) else out
            assert out.dtype == dtype
            assert all(t.isfinite().all() for t in (out, *torch.autograd.grad(out.float().sum(), (q, k, v))))


def test_zero_sizes_and_dropout():
    for batch, n, m in ((0, 3, 3), (2, 0, 4), (2, 4, 0)):
        q, k, v = make(n, m, batch=batch, grad=True)
        out, lse = attention(q, k, v, return_lse=True)
        assert out.shape == (batch, 4, n, 5) and (out == 0).all() and lse.shape == (batch, 4, n)
        out.sum().backward()
    q, k, v = make(50, 50)
    torch.manual_seed(0)
    for explicit in (False, True):
        mean = torch.stack([attention(q, k, v, dropout=0.3, higher_order=explicit) for _ in range(300)]).mean(
            0
        )
        assert (mean - attention(q, k, v)).abs().max() < 0.25
        assert not torch.equal(attention(q, k, v, dropout=0.3, higher_order=explicit), attention(q, k, v))


def test_long_sequences_need_no_square_matrix():
    """A windowed row at 65,536 tokens would need a 16 GiB mask."""
    n = 65536
    q, k, v = make(n, n, 4, 4, batch=1, heads=1, key_heads=1)
    out = attention(q, k, v, window=(16, 0))
    tail = attention(q[:, :, -8:], k[:, :, -64:], v[:, :, -64:], window=(16, 0))
    torch.testing.assert_close(out[:, :, -8:], tail, rtol=1e-5, atol=1e-6)


def test_compiles_into_one_graph():
    q, k, v = make(grad=True)
    mask = torch.rand(2, 9) > 0.3
    compiled = torch.compile(
        lambda q, k, v: attention(q, k, v, key_mask=mask, causal=True), fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(
        compiled(q, k, v), attention(q, k, v, key_mask=mask, causal=True), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bias": torch.zeros(9, 9)}, "4-D"),
        ({"bias": torch.zeros(1, 1, 9, 9, dtype=torch.bool)}, "key_mask"),
        ({"positions": torch.arange(9)}, "causal=True or a window"),
        ({"window": -1}, ">= 0"),
        ({"dropout": 1.5}, r"\[0, 1\)"),
    ],
)
def test_errors_name_the_way_out(change, message):
    with pytest.raises(ValueError, match=message):
        attention(*make(), **change)


def test_head_counts_and_triton_say_what_to_do(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="divide the query heads"):
        attention(*make(heads=4, key_heads=3))
    with pytest.raises(NotImplementedError, match="impl='torch'"):
        attention(*make(), impl="triton")


def test_agrees_with_sdpa_and_counts_causal_pairs():
    q, k, v = make()
    torch.testing.assert_close(attention(q, k, v), F.scaled_dot_product_attention(q, k, v))
    assert cost(1, 1, 4, 4, 8, causal=True).flops == 10 * 2 * 16
    assert cost(1, 1, 4, 4, 8).flops == 16 * 2 * 16


def test_softcap_and_skipping_reject_what_cannot_be():
    with pytest.raises(ValueError, match="softcap must be positive"):
        attention(*make(), softcap=-1.0)
    with pytest.raises(ValueError, match="skip_threshold must be >= 0"):
        attention(*make(), skip_threshold=-0.1)


@pytest.mark.parametrize("option", [{"softcap": 1.5}, {"skip_threshold": 3.0, "skip_tile": (4, 8)}])
def test_score_options_equal_the_reference_in_value_and_gradient(option):
    gen = torch.Generator().manual_seed(2)
    options = {"key_mask": torch.rand(2, 33, generator=gen) > 0.3, "causal": True, **option}
    options["bias"] = torch.randn(1, 4, 20, 33, generator=gen, dtype=D64)
    args = make(20, 33)
    want, have = both((4 * args[0], *args[1:]), torch.randn(2, 4, 20, 5, generator=gen, dtype=D64), **options)
    for a, b in zip(have, want, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=2e-5)


def test_sink_epilogue_equals_an_extra_key():
    q, k, v = make(dtype=D64)
    logit, value = torch.randn(4, 1, dtype=D64), torch.randn(4, 1, 5, dtype=D64)
    out, lse = apply_sink(*attention(q, k, v, return_lse=True), logit, value)
    scores = torch.cat((q @ k.mT * 6**-0.5, logit[None, :, :, None].expand(2, 4, 9, 1)), -1)
    want = scores.softmax(-1) @ torch.cat((v, value.expand(2, 4, 1, 5)), 2)
    assert (out - want).abs().max() < 1e-12 and (lse - scores.logsumexp(-1)).abs().max() < 1e-12
