"""The delta rule: chunked path against the recurrence, the scan test kit, and the rule's own identities."""

import pytest
import torch
import torch.nn.functional as F

from kernels.decay import decay_scan
from kernels.delta import cost, delta_read, delta_scan, delta_state
from kernels.delta.walk import delta_walk

D64 = torch.float64
GATES = ("none", "scalar", "vector")


def make(kind, n=9, m=None, d=6, e=5, batch=2, heads=2, dtype=D64, grad=False, strength=2.0):
    gen = torch.Generator().manual_seed(0)
    m = n if m is None else m
    new = lambda *s: torch.randn(batch, heads, *s, generator=gen, dtype=D64)
    out = {"q": new(n, d), "k": F.normalize(new(m, d), dim=-1), "v": new(m, e), "beta": new(m).sigmoid()}
    if kind != "none":
        out["log_g"] = -strength * (new(m) if kind == "scalar" else new(m, d)).abs()
    return {name: t.to(dtype).detach().requires_grad_(grad) for name, t in out.items()}


def mask_for(m):
    mask = torch.rand(2, m, generator=torch.Generator().manual_seed(1)) > 0.35
    mask[0, m // 2] = True
    mask[-1] = False
    return mask


def compare(kind, n, m, **options):
    args = make(kind, n, m, grad=True)
    weight = torch.randn(2, 2, n, 5, generator=torch.Generator().manual_seed(4), dtype=D64)
    want, have = (delta_scan(**args, impl=impl, **options) for impl in ("reference", "torch"))
    torch.testing.assert_close(have, want, rtol=1e-9, atol=1e-9)
    leaves = list(args.values())
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
    args = make(kind, 37)
    want = delta_scan(**args, chunk=64)
    for chunk in (1, 16, 37, 38):
        torch.testing.assert_close(delta_scan(**args, chunk=chunk), want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", GATES)
def test_padding_anywhere_equals_deletion_even_of_nan(kind):
    args = make(kind, 12)
    keep = torch.ones(12, dtype=torch.bool)
    keep[[0, 5, 6, 11]] = False
    spoilt = {n: t.clone() for n, t in args.items()}
    for name, t in spoilt.items():
        if name != "q":
            t[:, :, ~keep] = torch.nan
            t.requires_grad_()
    have = delta_scan(**spoilt, key_mask=keep.expand(2, -1))
    want = delta_scan(**{n: t[:, :, keep] for n, t in args.items()})
    torch.testing.assert_close(have[:, :, keep], want, rtol=1e-10, atol=1e-10)
    leaves = [t for n, t in spoilt.items() if n != "q"]
    for grad in torch.autograd.grad(have.sum(), leaves):
        assert grad.isfinite().all() and (grad[:, :, ~keep] == 0).all()


@pytest.mark.parametrize("kind", GATES)
def test_state_handed_over_equals_one_pass_and_steps(kind):
    args = make(kind, 20)
    want, end = delta_scan(**args, return_state=True)
    for cut in (1, 7):
        first, state = delta_scan(**{n: t[:, :, :cut] for n, t in args.items()}, return_state=True)
        later = {n: t[:, :, cut:] for n, t in args.items()}
        second, last = delta_scan(**later, initial_state=state, return_state=True)
        torch.testing.assert_close(torch.cat((first, second), 2), want, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(last, end, rtol=1e-9, atol=1e-9)
    state, rows = None, []
    for t in range(20):
        now = {n: x[:, :, t : t + 1] for n, x in args.items()}
        q = now.pop("q")
        state = delta_state(**now, initial_state=state)
        rows.append(delta_read(q, state))
    torch.testing.assert_close(torch.cat(rows, 2), want, rtol=1e-9, atol=1e-9)
    keys = {n: t for n, t in args.items() if n != "q"}
    everything = delta_scan(**args, positions=torch.full((20,), 19))
    torch.testing.assert_close(delta_read(args["q"], delta_state(**keys)), everything, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", GATES)
def test_reverse_is_flip_run_flip_and_positions_equal_causal(kind):
    args = make(kind, 13)
    want = delta_scan(**{n: t.flip(2) for n, t in args.items()}).flip(2)
    torch.testing.assert_close(delta_scan(**args, reverse=True), want)
    torch.testing.assert_close(delta_scan(**args, positions=torch.arange(13)), delta_scan(**args))


@pytest.mark.parametrize("kind", GATES)
def test_first_and_second_derivatives(kind):
    args = make(kind, 5, d=2, e=2, batch=1, heads=1, grad=True, strength=0.5)
    mask = torch.tensor([[True, True, False, True, True]])
    names = list(args)
    call = lambda *t: delta_scan(**dict(zip(names, t, strict=True)), key_mask=mask, chunk=2)
    assert torch.autograd.gradcheck(call, tuple(args.values()))
    assert torch.autograd.gradgradcheck(call, tuple(args.values()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_extreme_gates_stay_finite(dtype):
    for kind in ("scalar", "vector"):
        for size in (0.0, -1e-4, -20.0, -1e4):
            for strength in (0.0, 1.0):
                args = make(kind, 70, dtype=dtype)
                args["log_g"] = torch.full_like(args["log_g"], size)
                args["beta"] = torch.full_like(args["beta"], strength)
                leaves = [t.requires_grad_() for t in args.values()]
                out = delta_scan(**args)
                assert out.dtype == dtype and out.isfinite().all()
                assert all(g.isfinite().all() for g in torch.autograd.grad(out.float().sum(), leaves))


def test_gates_reduce_to_each_other():
    args = make("scalar", 30)
    wide = args["log_g"][..., None].expand_as(args["k"])
    torch.testing.assert_close(
        delta_scan(**{**args, "log_g": wide}), delta_scan(**args), rtol=1e-9, atol=1e-9
    )
    open_gate = torch.zeros_like(args["log_g"])
    plain = {n: t for n, t in args.items() if n != "log_g"}
    torch.testing.assert_close(delta_scan(**plain, log_g=open_gate), delta_scan(**plain))
    silent = {**args, "beta": torch.zeros_like(args["beta"])}
    state = torch.randn(2, 2, 6, 5, dtype=D64)
    faded = state * args["log_g"].sum(-1).exp()[..., None, None]
    torch.testing.assert_close(delta_scan(**silent, initial_state=state, return_state=True)[1], faded)


def test_orthonormal_keys_are_recalled_and_repeated_keys_overwritten():
    k = torch.linalg.qr(torch.randn(1, 1, 6, 6, dtype=D64))[0]
    v = torch.randn(1, 1, 6, 5, dtype=D64)
    one = torch.ones(1, 1, 6, dtype=D64)
    torch.testing.assert_close(delta_read(k, delta_state(k, v, one)), v)
    again = [torch.cat((t, t[:, :, :1]), 2) for t in (k, one)]
    new = torch.cat((v, v[:, :, 3:4] + 7), 2)
    recalled = delta_read(k[:, :, :1], delta_state(again[0], new, again[1]))
    torch.testing.assert_close(recalled, new[:, :, 6:])
    # Plain linear attention adds instead.
    added = decay_scan(again[0], again[0], new)[:, :, 6:]
    torch.testing.assert_close(added, new[:, :, 6:] + v[:, :, :1])


def test_repeated_keys_at_full_strength_keep_float32_accuracy():
    """The triangular system is then all ones below the diagonal: powers of it would lose every digit."""
    k = F.normalize(torch.ones(1, 1, 64, 8), dim=-1)
    v = torch.randn(1, 1, 64, 4)
    out = delta_scan(k, k, v, torch.ones(1, 1, 64))
    torch.testing.assert_close(out, v, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", GATES)
def test_zero_sizes(kind):
    for batch, n, m in ((0, 3, 3), (2, 0, 4), (2, 4, 0), (2, 0, 0)):
        out = delta_scan(**make(kind, n, m, batch=batch))
        assert out.shape == (batch, 2, n, 5) and (out == 0).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"read": "both"}, "inclusive, exclusive"),
        ({"beta": torch.zeros(2, 9)}, "beta must be"),
        ({"log_g": torch.zeros(2, 9)}, "log_g must be"),
        ({"reverse": True, "positions": torch.arange(9)}, "no positions"),
    ],
)
def test_errors_name_the_way_out(change, message):
    with pytest.raises(ValueError, match=message):
        delta_scan(**{**make("none"), **change})


def test_cost_is_linear_in_length():
    one, two = (cost(1, 4, n, 64) for n in (1024, 2048))
    assert two.flops == 2 * one.flops and two.state == one.state == 4 * 64 * 64


def test_walk_is_one_operator_under_compile():
    gen = torch.Generator().manual_seed(0)
    new = lambda *s: torch.randn(1, 2, *s, generator=gen, requires_grad=True)
    initial = torch.randn(1, 3, 4, requires_grad=True)
    tensors = new(5, 4), new(5, 3), new(5, 5), torch.eye(5).expand(1, 2, 5, 5).clone(), new(5, 3)
    torch.library.opcheck(delta_walk, (*tensors, new(1, 1), new(3, 4), initial, True))
    torch.library.opcheck(delta_walk, (*tensors, None, None, initial, False))
    args = make("scalar", 9, dtype=torch.float32, grad=True)
    compiled = torch.compile(delta_scan, fullgraph=True, backend="aot_eager")
    want, have = delta_scan(**args, chunk=4), compiled(**args, chunk=4)
    torch.testing.assert_close(have, want)
    grads = [torch.autograd.grad(o.sin().sum(), list(args.values())) for o in (want, have)]
    torch.testing.assert_close(grads[1], grads[0])
