"""Prefix softmax and the element-wise recurrence."""

import pytest
import torch
import torch.nn.functional as F

from kernels.prefix import diag_scan, prefix_read, prefix_softmax, prefix_state

D64 = torch.float64


def make(m=9, e=5, dtype=D64, grad=False, size=1.0):
    gen = torch.Generator().manual_seed(0)
    s, v = torch.randn(2, 3, m, generator=gen, dtype=D64), torch.randn(2, 3, m, e, generator=gen, dtype=D64)
    return (size * s).to(dtype).requires_grad_(grad), v.to(dtype).requires_grad_(grad)


def mask_for(m):
    mask = torch.rand(2, m, generator=torch.Generator().manual_seed(1)) > 0.35
    mask[-1] = False
    return mask


@pytest.mark.parametrize("m", [1, 7, 63, 64, 65, 130])
@pytest.mark.parametrize("read", ["inclusive", "exclusive"])
def test_chunks_equal_the_matrix_in_value_and_gradient(m, read):
    s, v = make(m, grad=True)
    for options in ({}, {"key_mask": mask_for(m)}, {"reverse": True, "key_mask": mask_for(m)}):
        want, have = (prefix_softmax(s, v, read=read, impl=i, **options) for i in ("reference", "torch"))
        torch.testing.assert_close(have, want, rtol=1e-9, atol=1e-9)
        grads = [torch.autograd.grad(o.sin().sum(), (s, v)) for o in (want, have)]
        torch.testing.assert_close(grads[1], grads[0], rtol=1e-8, atol=1e-8)


def test_equals_causal_softmax_attention_with_one_query():
    q, k = torch.randn(2, 3, 1, 4, dtype=D64), torch.randn(2, 3, 20, 4, dtype=D64)
    _, v = make(20)
    want = F.scaled_dot_product_attention(q.expand(-1, -1, 20, -1), k, v, is_causal=True, scale=0.5)
    have = prefix_softmax((q * k).sum(-1) * 0.5, v)
    torch.testing.assert_close(have, want)
    torch.testing.assert_close(have[:, :, :1], v[:, :, :1])
    ones = torch.ones_like(v)
    torch.testing.assert_close(prefix_softmax((q * k).sum(-1), ones), ones)


def test_steps_and_states_equal_the_scan():
    s, v = make(15)
    want, state, rows = prefix_softmax(s, v), None, []
    for t in range(15):
        state = prefix_state(s[:, :, t : t + 1], v[:, :, t : t + 1], initial_state=state)
        rows.append(prefix_read(state))
    torch.testing.assert_close(torch.cat(rows, 2), want)
    torch.testing.assert_close(prefix_read(prefix_state(s, v)), want[:, :, -1:])
    empty = prefix_state(s[:, :, :0], v[:, :, :0])
    assert (prefix_read(empty) == 0).all()
    torch.testing.assert_close(prefix_read(prefix_state(s, v, initial_state=empty)), want[:, :, -1:])


def test_positions_pick_prefixes():
    s, v = make(12)
    out = prefix_softmax(s, v)
    have = prefix_softmax(s, v, positions=torch.tensor([[3, -1, 11], [0, 5, 5]]))
    assert (have[0, :, 1] == 0).all()
    torch.testing.assert_close(have[0, :, 2], out[0, :, 11])
    torch.testing.assert_close(have[1, :, 1], out[1, :, 5])
    torch.testing.assert_close(prefix_softmax(s, v, queries=4), out[:, :, 8:])
    assert (prefix_softmax(s, v, queries=14)[:, :, :2] == 0).all()


@pytest.mark.parametrize("size", [80.0, 1e4])
def test_extreme_scores_stay_finite(size):
    for dtype in (torch.float32, torch.bfloat16):
        s, v = make(70, dtype=dtype, grad=True, size=size)
        out = prefix_softmax(s, v)
        assert all(t.isfinite().all() for t in (out, *torch.autograd.grad(out.float().sum(), (s, v))))


def test_derivatives():
    s, v = make(5, 2, grad=True)
    mask = torch.tensor([[True, True, False, True, True], [False, False, True, True, False]])
    call = lambda s, v: prefix_softmax(s, v, key_mask=mask, chunk=2)
    assert torch.autograd.gradcheck(call, (s, v)) and torch.autograd.gradgradcheck(call, (s, v))


@pytest.mark.parametrize("n", [1, 7, 64, 65])
@pytest.mark.parametrize("segment", [None, 1, 16])
def test_recurrence(n, segment):
    gen = torch.Generator().manual_seed(0)
    a, x = (torch.randn(2, 3, n, 4, generator=gen, dtype=D64).requires_grad_() for _ in range(2))
    h0 = None if segment else torch.randn(2, 3, 4, generator=gen, dtype=D64)
    for reverse in (False, True):
        options = {"segment": segment, "h0": h0, "reverse": reverse}
        want, have = (diag_scan(a, x, impl=i, **options) for i in ("reference", "torch"))
        # Factors beyond 1 let values grow: compare to their size.
        torch.testing.assert_close(have, want, rtol=1e-8, atol=1e-8)
        grads = [torch.autograd.grad(o.tanh().sum(), (a, x)) for o in (want, have)]
        torch.testing.assert_close(grads[1], grads[0], rtol=1e-6, atol=1e-6)


def test_recurrence_derivatives_and_errors():
    a, x = (torch.randn(1, 1, 5, 2, dtype=D64).requires_grad_() for _ in range(2))
    assert torch.autograd.gradgradcheck(lambda a, x: diag_scan(a, x), (a, x))
    with pytest.raises(ValueError, match="without h0"):
        diag_scan(a, x, segment=2, h0=a[:, :, 0])
    with pytest.raises(ValueError, match="leave positions"):
        prefix_softmax(x[..., 0], x, reverse=True, positions=torch.arange(5))
    with pytest.raises(ValueError, match="scores must be"):
        prefix_softmax(x, x)


def test_chunks_padding_and_direction():
    """Of the scan kit: any chunk length, masked keys anywhere equal their deletion even as NaN, reverse is flip, run, flip."""
    s, v = make(37)
    want = prefix_softmax(s, v)
    for chunk in (1, 16, 37, 38):
        torch.testing.assert_close(prefix_softmax(s, v, chunk=chunk), want)
    keep = torch.ones(37, dtype=torch.bool)
    keep[[0, 5, 36]] = False
    have = prefix_softmax(
        s.masked_fill(~keep, torch.nan), v.masked_fill(~keep[:, None], torch.nan), key_mask=keep.expand(2, -1)
    )
    torch.testing.assert_close(have[:, :, keep], prefix_softmax(s[..., keep], v[:, :, keep]))
    torch.testing.assert_close(
        prefix_softmax(s, v, reverse=True), prefix_softmax(s.flip(2), v.flip(2)).flip(2)
    )
