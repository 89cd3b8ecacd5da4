"""Scans with decay: chunked path against the recurrence, the scan test kit, and mLSTM's gates."""

import pytest
import torch

from kernels.bidirectional import bidirectional
from kernels.decay import cost, decay_read, decay_scan, decay_state, normalise

D64 = torch.float64
GATES = ("none", "scalar", "vector", "mlstm")


def make(kind, n=9, m=None, d=6, e=5, batch=2, heads=2, seed=0, dtype=D64, grad=False, strength=2.0):
    """q, k, v and the keyword arguments of a scan."""
    gen = torch.Generator().manual_seed(seed)
    m = n if m is None else m
    new = lambda *s: torch.randn(batch, heads, *s, generator=gen, dtype=D64)
    q, k, v = new(n, d), new(m, d), new(m, e)
    gates = {}
    if kind in ("scalar", "mlstm"):
        gates["log_g"] = -strength * new(m).abs()
    if kind == "vector":
        gates["log_g"] = -strength * new(m, d).abs()
    if kind == "mlstm":
        gates["log_i"] = new(m)
    leaf = lambda t: t.to(dtype).detach().requires_grad_(grad)
    return leaf(q), leaf(k), leaf(v), {name: leaf(t) for name, t in gates.items()}


def normalizer_of(kind):
    return "mlstm" if kind == "mlstm" else "none"


def run(kind, q, k, v, gates, **options):
    return decay_scan(q, k, v, **gates, normalizer=normalizer_of(kind), **options)


def mask_for(m, batch=2):
    mask = torch.rand(batch, m, generator=torch.Generator().manual_seed(1)) > 0.35
    mask[0, m // 2] = True
    mask[-1] = False
    return mask


def compare(kind, n, m, **options):
    q, k, v, gates = make(kind, n, m, grad=True)
    leaves = [q, k, v, *gates.values()]
    weight = torch.randn(2, 2, n, 5, generator=torch.Generator().manual_seed(4), dtype=D64)
    want, have = (run(kind, q, k, v, gates, impl=impl, **options) for impl in ("reference", "torch"))
    torch.testing.assert_close(have, want, rtol=1e-9, atol=1e-9)
    grads = [torch.autograd.grad((o * weight).sum(), leaves, materialize_grads=True) for o in (want, have)]
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-7, atol=1e-7)
    return have, grads[1]


@pytest.mark.parametrize("kind", GATES)
@pytest.mark.parametrize(
    "sizes", [(1, 1), (7, 70), (70, 7), (65, 65)], ids=["N1M1", "N7M70", "N70M7", "N65M65"]
)
def test_chunks_equal_recurrence_in_value_and_gradient(kind, sizes):
    n, m = sizes
    compare(kind, n, m)
    mask = mask_for(m)
    have, grads = compare(kind, n, m, key_mask=mask, read="exclusive")
    assert (have[-1] == 0).all() and all((g[-1] == 0).all() for g in grads)
    positions = torch.randint(-2, m + 2, (2, n), generator=torch.Generator().manual_seed(3))
    compare(kind, n, m, positions=positions, key_mask=mask)


@pytest.mark.parametrize("kind", GATES)
def test_chunk_size_does_not_matter(kind):
    q, k, v, gates = make(kind, 37)
    want = run(kind, q, k, v, gates, chunk=64)
    for chunk in (1, 16, 37, 38):
        torch.testing.assert_close(run(kind, q, k, v, gates, chunk=chunk), want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", GATES)
def test_padding_anywhere_equals_deletion_even_of_nan(kind):
    q, k, v, gates = make(kind, 12)
    keep = torch.ones(12, dtype=torch.bool)
    keep[[0, 5, 6, 11]] = False
    spoilt = [t.clone() for t in (k, v, *gates.values())]
    for t in spoilt:
        t[:, :, ~keep] = torch.nan
        t.requires_grad_()
    bad = dict(zip(gates, spoilt[2:], strict=True))
    have = run(kind, q, spoilt[0], spoilt[1], bad, key_mask=keep.expand(2, -1))
    cut = lambda t: t[:, :, keep]
    want = run(kind, cut(q), cut(k), cut(v), {n: cut(t) for n, t in gates.items()})
    torch.testing.assert_close(cut(have), want, rtol=1e-10, atol=1e-10)
    for grad in torch.autograd.grad(have.sum(), spoilt):
        assert grad.isfinite().all() and (grad[:, :, ~keep] == 0).all()


@pytest.mark.parametrize("kind", GATES)
def test_state_handed_over_equals_one_pass_and_steps(kind):
    q, k, v, gates = make(kind, 20)
    norm = normalizer_of(kind)
    want, end = run(kind, q, k, v, gates, return_state=True)
    part = lambda a, b: (k[:, :, a:b], v[:, :, a:b], {n: t[:, :, a:b] for n, t in gates.items()})
    for cut in (1, 7):
        k1, v1, g1 = part(0, cut)
        first, state = run(kind, q[:, :, :cut], k1, v1, g1, return_state=True)
        k2, v2, g2 = part(cut, 20)
        second, last = run(kind, q[:, :, cut:], k2, v2, g2, initial_state=state, return_state=True)
        torch.testing.assert_close(torch.cat((first, second), 2), want, rtol=1e-9, atol=1e-9)
        reads = [decay_read(q, s, normalizer=norm) for s in (last, end)]
        torch.testing.assert_close(reads[0], reads[1], rtol=1e-9, atol=1e-9)
    state, rows = None, []
    for t in range(20):
        k1, v1, g1 = part(t, t + 1)
        state = decay_state(k1, v1, **g1, normalizer=norm, initial_state=state)
        rows.append(decay_read(q[:, :, t : t + 1], state, normalizer=norm))
    torch.testing.assert_close(torch.cat(rows, 2), want, rtol=1e-9, atol=1e-9)
    whole = decay_state(k, v, **gates, normalizer=norm)
    everything = run(kind, q, k, v, gates, positions=torch.full((20,), 19))
    torch.testing.assert_close(decay_read(q, whole, normalizer=norm), everything, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", GATES)
def test_reverse_is_flip_run_flip_and_positions_equal_causal(kind):
    q, k, v, gates = make(kind, 13)
    flip = lambda t: t.flip(2)
    have = run(kind, q, k, v, gates, reverse=True)
    want = flip(run(kind, flip(q), flip(k), flip(v), {n: flip(t) for n, t in gates.items()}))
    torch.testing.assert_close(have, want)
    causal = run(kind, q, k, v, gates)
    torch.testing.assert_close(run(kind, q, k, v, gates, positions=torch.arange(13)), causal)
    pairs = (torch.arange(13), torch.arange(13))
    torch.testing.assert_close(run(kind, q, k, v, gates, positions=pairs), causal)


@pytest.mark.parametrize("kind", ["none", "scalar", "vector"])
def test_exclusive_plus_own_term_is_inclusive(kind):
    q, k, v, gates = make(kind, 21)
    own = (q * k).sum(-1, keepdim=True) * v
    exclusive = decay_scan(q, k, v, **gates, read="exclusive")
    torch.testing.assert_close(exclusive + own, decay_scan(q, k, v, **gates), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", GATES)
def test_first_and_second_derivatives(kind):
    q, k, v, gates = make(kind, 5, d=2, e=2, batch=1, heads=1, grad=True, strength=0.5)
    mask = torch.tensor([[True, True, False, True, True]])
    names = list(gates)

    def call(q, k, v, *rest):
        given = dict(zip(names, rest, strict=True))
        return run(kind, q, k, v, given, key_mask=mask, chunk=2)

    args = (q, k, v, *gates.values())
    assert torch.autograd.gradcheck(call, args)
    assert torch.autograd.gradgradcheck(call, args)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_extreme_gates_stay_finite(dtype):
    for size in (0.0, -1e-4, -20.0, -1e4):
        for kind in ("scalar", "vector", "mlstm"):
            for gate in (-80.0, 80.0) if kind == "mlstm" else (0.0,):
                q, k, v, gates = make(kind, 70, dtype=dtype)
                gates = {n: torch.full_like(t, size if n == "log_g" else gate) for n, t in gates.items()}
                leaves = [t.requires_grad_() for t in (q, k, v, *gates.values())]
                out = run(kind, q, k, v, gates)
                assert out.dtype == dtype and out.isfinite().all(), (kind, size, gate)
                assert all(g.isfinite().all() for g in torch.autograd.grad(out.float().sum(), leaves))


def test_mlstm_definition_with_running_maximum():
    """The recurrence with the papers' stabiliser, in unscaled numbers the bound is 1."""
    q, k, v, gates = make("mlstm", 15)
    gates["log_i"] = 4 * gates["log_i"]
    s, n, m = (
        torch.zeros(2, 2, 6, 5, dtype=D64),
        torch.zeros(2, 2, 6, dtype=D64),
        torch.zeros(2, 2, dtype=D64),
    )
    rows = []
    for t in range(15):
        lf, i = gates["log_g"][:, :, t], gates["log_i"][:, :, t]
        new = torch.maximum(lf + m, i)
        f, w = (lf + m - new).exp(), (i - new).exp()
        s = f[..., None, None] * s + w[..., None, None] * k[:, :, t, :, None] * v[:, :, t, None]
        n = f[..., None] * n + w[..., None] * k[:, :, t]
        num = (q[:, :, t, None] @ s).squeeze(2)
        den = (q[:, :, t] * n).sum(-1, keepdim=True)
        rows.append(num / torch.maximum(den.abs(), (-new).exp()[..., None]))
        m = new
    torch.testing.assert_close(run("mlstm", q, k, v, gates), torch.stack(rows, 2), rtol=1e-9, atol=1e-9)


def test_without_decay_it_is_linear_attention():
    from kernels.linear import linear_attention

    q, k, v, _ = make("none", 30)
    q, k = q.exp(), k.exp()
    for normalizer in ("none", "denom"):
        want = linear_attention(q, k, v, feature="identity", causal=True, normalize=normalizer)
        torch.testing.assert_close(decay_scan(q, k, v, normalizer=normalizer), want)


@pytest.mark.parametrize("masked", [False, True])
def test_two_directions_are_attention_with_distance_decay(masked):
    q, k, v, gates = make("scalar", 19)
    log_g = gates["log_g"]
    mask = mask_for(19) if masked else None
    have = bidirectional(decay_scan, q, k, v, log_g=log_g, key_mask=mask)
    if masked:
        log_g = log_g.masked_fill(~mask[:, None], 0.0)
    c = log_g.cumsum(-1)
    weights = (q @ k.mT) * (-(c[..., :, None] - c[..., None, :]).abs()).exp()
    if masked:
        weights = weights * mask[:, None, None]
    torch.testing.assert_close(have, weights @ v, rtol=1e-9, atol=1e-9)


def test_two_directions_of_mlstm_divide_once():
    q, k, v, gates = make("mlstm", 11)
    zero = {"log_g": torch.zeros_like(gates["log_g"]), "log_i": gates["log_i"]}
    have = bidirectional(decay_scan, q, k, v, **zero, normalizer="mlstm")
    weights = (q @ k.mT) * gates["log_i"].exp()[..., None, :]
    want = weights @ v / weights.sum(-1, keepdim=True).abs().clamp(min=1)
    torch.testing.assert_close(have, want, rtol=1e-9, atol=1e-9)
    with pytest.raises(TypeError):
        normalise([])


@pytest.mark.parametrize("kind", GATES)
def test_zero_sizes(kind):
    for batch, n, m in ((0, 3, 3), (2, 0, 4), (2, 4, 0), (2, 0, 0)):
        q, k, v, gates = make(kind, n, m, batch=batch)
        out = run(kind, q, k, v, gates)
        assert out.shape == (batch, 2, n, 5) and (out == 0).all()


def test_compiles_into_one_graph():
    q, k, v, gates = make("scalar", 9, dtype=torch.float32, grad=True)
    function = lambda q, k, v, g: decay_scan(q, k, v, log_g=g)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    args = (q, k, v, gates["log_g"])
    torch.testing.assert_close(compiled(*args), function(*args), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"normalizer": "sum"}, "choose from none"),
        ({"read": "both"}, "inclusive, exclusive"),
        ({"log_g": torch.zeros(2, 9)}, "log_g must be"),
        ({"log_i": torch.zeros(2, 2, 8, dtype=D64)}, "log_i must be"),
        ({"log_i": torch.zeros(2, 2, 9), "log_g": torch.zeros(2, 2, 9, 6)}, "multiply k"),
        ({"log_i": torch.zeros(2, 2, 9), "normalizer": "denom"}, "use 'mlstm'"),
        ({"reverse": True, "positions": torch.arange(9)}, "no positions"),
        ({"key_mask": torch.ones(2, 9)}, "key_mask.bool"),
    ],
)
def test_errors_name_the_way_out(change, message):
    q, k, v, _ = make("none")
    with pytest.raises(ValueError, match=message):
        decay_scan(q, k, v, **change)


def test_explicit_triton_never_falls_back():
    q, k, v, gates = make("mlstm")
    with pytest.raises(NotImplementedError, match="impl='torch'"):
        decay_scan(q, k, v, **gates, impl="triton")


def test_cost_is_linear_in_length():
    one, two = (cost(1, 4, n, 64) for n in (1024, 2048))
    assert two.flops == 2 * one.flops and two.state == one.state == 4 * 64 * 64
