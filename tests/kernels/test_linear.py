"""Linear attention and MALA: torch path against the written-out reference, and the identities of their cards."""

import pytest
import torch

from kernels.linear import (
    FEATURES,
    add_states,
    apply_feature,
    cost,
    feature_size,
    global_state,
    linear_attention,
    linear_read,
    mala,
    mala_read,
)  # fmt: skip
from kernels.linear import torch as torch_path

D64 = torch.float64
CALLS = {"linear": linear_attention, "mala": mala}


def make(n=9, m=9, d=6, e=5, batch=2, heads=2, seed=0, dtype=D64, grad=False):
    gen = torch.Generator().manual_seed(seed)
    new = lambda s, c: (
        torch.randn(batch, heads, s, c, generator=gen, dtype=D64).to(dtype).requires_grad_(grad)
    )
    return new(n, d), new(m, d), new(m, e)


def mask_for(m, batch=2, seed=1):
    mask = torch.rand(batch, m, generator=torch.Generator().manual_seed(seed)) > 0.35
    mask[0, m // 2] = True
    mask[-1] = False
    return mask


@pytest.mark.parametrize("call", CALLS.values(), ids=list(CALLS))
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("pattern", ["global", "causal", "prefix", "pairs"])
@pytest.mark.parametrize(
    "sizes", [(1, 1), (7, 130), (130, 7), (65, 65)], ids=["N1M1", "N7M130", "N130M7", "N65M65"]
)
def test_torch_equals_reference_in_value_and_gradient(call, masked, pattern, sizes):
    n, m = sizes
    gen = torch.Generator().manual_seed(3)
    options = {"causal": pattern != "global"}
    if pattern == "prefix":
        options["positions"] = torch.randint(-2, m + 2, (2, n), generator=gen)
    if pattern == "pairs":
        options["positions"] = (
            torch.randint(0, 9, (n,), generator=gen),
            torch.randint(0, 9, (2, m), generator=gen),
        )
    if masked:
        options["key_mask"] = mask_for(m)
    args = make(n, m, grad=True)
    weight = torch.randn(2, 2, n, 5, generator=gen, dtype=D64)
    want, have = call(*args, impl="reference", **options), call(*args, impl="torch", **options)
    torch.testing.assert_close(have, want, rtol=1e-9, atol=1e-9)
    grads = [torch.autograd.grad((out * weight).sum(), args) for out in (want, have)]
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-8, atol=1e-8)
    if masked:
        assert (have[-1] == 0).all() and all((g[-1] == 0).all() for g in grads[1])


@pytest.mark.parametrize("feature", FEATURES)
def test_every_feature_map(feature):
    q, k, v = make(11, 14)
    mask = mask_for(14)
    for options in ({}, {"key_mask": mask}):
        want = linear_attention(q, k, v, feature=feature, impl="reference", normalize="none", **options)
        have = linear_attention(q, k, v, feature=feature, normalize="none", **options)
        torch.testing.assert_close(have, want)
    assert apply_feature(feature, q).shape[-1] == feature_size(feature, 6)


@pytest.mark.parametrize("key_norm", ["mean", "sum"])
@pytest.mark.parametrize("causal", [False, True], ids=["global", "causal"])
def test_rotated_mala(key_norm, causal):
    q, k, v = make(70, 90)
    rotated = make(70, 90, seed=5)[:2]
    have, want = (
        mala(q, k, v, rotated=rotated, key_norm=key_norm, causal=causal, impl=impl)
        for impl in ("torch", "reference")
    )
    torch.testing.assert_close(have, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("chunk", [1, 16, 64, 37, 38])
def test_chunk_size_does_not_matter(chunk, monkeypatch):
    q, k, v = make(37, 37)
    want, end = torch_path.prefix_product(q, k, v, None, 64)
    have = torch_path.prefix_product(q, k, v, None, chunk)
    torch.testing.assert_close(have, (want, end), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", CALLS)
def test_padding_anywhere_equals_deletion_even_of_nan(name):
    q, k, v = make(8, 12)
    keep = torch.ones(12, dtype=torch.bool)
    keep[[0, 5, 11]] = False
    garbage_k, garbage_v = k.clone(), v.clone()
    garbage_k[:, :, ~keep], garbage_v[:, :, ~keep] = torch.nan, torch.inf
    garbage_k.requires_grad_(), garbage_v.requires_grad_()
    have = CALLS[name](q, garbage_k, garbage_v, key_mask=keep.expand(2, -1))
    torch.testing.assert_close(have, CALLS[name](q, k[:, :, keep], v[:, :, keep]), rtol=1e-12, atol=1e-12)
    for grad in torch.autograd.grad(have.sum(), (garbage_k, garbage_v)):
        assert grad.isfinite().all() and (grad[:, :, ~keep] == 0).all()


@pytest.mark.parametrize("name", CALLS)
def test_causal_ignores_the_future_and_ends_like_the_global_form(name):
    call = CALLS[name]
    q, k, v = make(70, 70)
    out = call(q, k, v, causal=True)
    torch.testing.assert_close(out[:, :, -1:], call(q[:, :, -1:], k, v), rtol=1e-9, atol=1e-9)
    later_k, later_v = k.clone(), v.clone()
    later_k[:, :, 66:], later_v[:, :, 66:] = 5.0, -7.0
    assert torch.equal(call(q, later_k, later_v, causal=True)[:, :, :66], out[:, :, :66])
    everything = torch.full((70,), 69)
    torch.testing.assert_close(
        call(q, k, v, causal=True, positions=everything), call(q, k, v), rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize("name", CALLS)
def test_state_handed_over_equals_one_pass(name):
    q, k, v = make(40, 40)
    phi = apply_feature("elu1", k)
    first = global_state(phi[:, :, :17], v[:, :, :17])
    options = {"causal": True}
    parts = [CALLS[name](q[:, :, :17], k[:, :, :17], v[:, :, :17], **options)]
    parts.append(CALLS[name](q[:, :, 17:], k[:, :, 17:], v[:, :, 17:], initial_state=first, **options))
    torch.testing.assert_close(torch.cat(parts, 2), CALLS[name](q, k, v, **options), rtol=1e-9, atol=1e-9)
    state = None
    rows = []
    for t in range(40):
        state = add_states(state, global_state(phi[:, :, t : t + 1], v[:, :, t : t + 1]))
        read = linear_read if name == "linear" else mala_read
        rows.append(read(apply_feature("elu1", q[:, :, t : t + 1]), state))
    torch.testing.assert_close(torch.cat(rows, 2), CALLS[name](q, k, v, **options), rtol=1e-9, atol=1e-9)


def test_mala_is_linear_attention_plus_centred_scores():
    q, k, v = make(7, 20)
    fq, fk = apply_feature("elu1", q), apply_feature("elu1", k)
    s = 6**-0.5 * fq @ fk.mT
    centred = (s - s.mean(-1, keepdim=True)) @ v
    plain = linear_attention(q, k, v, eps=0.0)
    torch.testing.assert_close(mala(q, k, v, eps=0.0), plain + centred / 20)
    torch.testing.assert_close(mala(q, k, v, eps=0.0, key_norm="sum"), plain + centred)
    ones = torch.ones_like(v)
    torch.testing.assert_close(mala(q, k, ones), ones[:, :, :7], rtol=0, atol=1e-4)
    louder = mala(3 * fq, fk, v, feature="identity", eps=0.0)
    torch.testing.assert_close(louder, plain + 3 * centred / 20)


def test_mala_keeps_its_small_term_in_float32_at_great_length():
    """Centring on the state: with a large common value the textbook difference would lose the term."""
    q, k, v = make(4, 20000, 16, 8, batch=1, heads=1)
    v = v + 100
    want = mala(q, k, v, impl="reference") - 100
    have = mala(q.float(), k.float(), v.float()).double() - 100
    assert (have - want).abs().max() < 2e-3


def test_key_bias_weighs_keys_and_duplicates():
    q, k, v = make(5, 8)
    bias = torch.zeros(2, 1, 8, dtype=D64)
    bias[:, :, 3] = torch.tensor(2.0).log()
    twice = [torch.cat((t, t[:, :, 3:4]), 2) for t in (k, v)]
    have = linear_attention(q, k, v, key_bias=bias)
    torch.testing.assert_close(have, linear_attention(q, *twice), rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(have, linear_attention(q, k, v, key_bias=bias, impl="reference"))


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("causal", [False, True], ids=["global", "causal"])
def test_first_and_second_derivatives(name, causal):
    args = make(3, 4, 2, 2, batch=1, heads=1, grad=True)
    mask = torch.tensor([[True, False, True, True]])
    call = lambda q, k, v: CALLS[name](q, k, v, feature="exp", causal=causal, key_mask=mask)
    assert torch.autograd.gradcheck(call, args)
    assert torch.autograd.gradgradcheck(call, args)


@pytest.mark.parametrize("feature", ["elu1", "exp", "relu", "softmax"])
@pytest.mark.parametrize("size", [1e-6, 80.0, 1e4])
def test_extreme_inputs_stay_finite(feature, size):
    for dtype in (torch.float32, torch.bfloat16):
        q, k, v = (
            t.to(dtype).detach().requires_grad_()
            for t in (a * s for a, s in zip(make(), (size, size, 1), strict=True))
        )
        out = linear_attention(q, k, v, feature=feature)
        assert out.dtype == dtype
        assert all(t.isfinite().all() for t in (out, *torch.autograd.grad(out.float().sum(), (q, k, v))))


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("causal", [False, True], ids=["global", "causal"])
def test_zero_sizes(name, causal):
    for batch, n, m in ((0, 3, 3), (2, 0, 4), (2, 4, 0), (2, 0, 0)):
        out = CALLS[name](*make(n, m, batch=batch), causal=causal)
        assert out.shape == (batch, 2, n, 5) and (out == 0).all()


def test_compiles_into_one_graph():
    args = make(9, 9, dtype=torch.float32, grad=True)
    for function in (lambda q, k, v: linear_attention(q, k, v), lambda q, k, v: mala(q, k, v, causal=True)):
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(*args), function(*args), rtol=1e-4, atol=1e-5)
        grads = [torch.autograd.grad(f(*args).sum(), args) for f in (compiled, function)]
        torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"feature": "elu"}, "did you mean .*'elu1'"),
        ({"positions": torch.arange(9)}, "causal=True"),
        ({"feature": "softmax", "causal": True}, "use elu1"),
        ({"normalize": "sum"}, "denom, none"),
        ({"key_mask": torch.ones(2, 9)}, "key_mask.bool"),
        ({"key_mask": torch.ones(9, 2, dtype=torch.bool)}, r"\[2, 9\]"),
        ({"key_bias": torch.zeros(2, 2, 9, dtype=D64), "feature": "silu"}, "use elu1"),
        ({"key_bias": torch.zeros(9)}, "broadcastable"),
        ({"impl": "tritn"}, "did you mean 'triton'"),
        ({"causal": True, "positions": torch.zeros(9)}, "integers"),
    ],
)
def test_errors_name_the_way_out(change, message):
    with pytest.raises(ValueError, match=message):
        linear_attention(*make(), **change)


def test_shape_errors():
    q, k, v = make()
    for args, message in (
        ((q[0], k, v), "batch, heads"),
        ((q, k[..., :4], v), "last dimension"),
        ((q, k.float(), v), "share a dtype"),
    ):
        with pytest.raises(ValueError, match=message):
            mala(*args)
    with pytest.raises(NotImplementedError, match="impl='torch'"):
        mala(q, k, v, impl="triton")


def test_cost_is_linear_in_length():
    one, two = (cost("mala", 1, 4, n, n, 64) for n in (1024, 2048))
    assert two.flops == 2 * one.flops and two.state == one.state == 4 * (64 * 64 + 64 + 64 + 1)
    assert cost("linear", 1, 1, 10, 10, 8).flops > 2 * 2 * 10 * 64
