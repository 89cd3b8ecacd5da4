"""Checks of the decay scan's Triton kernels under the interpreter; run by test_triton_decay.py in a process of its own."""

import os

import pytest
import torch

from kernels.decay import decay_scan, ops

assert os.environ.get("TRITON_INTERPRET") == "1", "run through tests/kernels/test_triton_decay.py"

SIZES = {"N7D8E20": (7, 8, 20), "N65D20E8": (65, 20, 8), "N70D64E64": (70, 64, 64), "N1D8E8": (1, 8, 8)}


@pytest.fixture(autouse=True)
def nan_scratch(monkeypatch):
    """Memory that a kernel forgets to write must show."""
    from kernels.decay import launch

    def new(like, *shape, dtype=torch.float32):
        return torch.full(shape, torch.nan, device=like.device, dtype=dtype)

    monkeypatch.setattr(launch, "_new", new)


def make(sizes, gated, batch=2, heads=2):
    gen = torch.Generator().manual_seed(0)
    n, d, e = sizes
    new = lambda *s: torch.randn(batch, heads, *s, generator=gen, dtype=torch.float64)
    args = {"q": new(n, d), "k": new(n, d), "v": new(n, e)}
    if gated:
        args["log_g"] = -new(n).abs()
    return args, new(n, e)


def run(args, dtype, weight, impl, **options):
    leaves = {n: t.to(dtype).requires_grad_() for n, t in args.items()}
    out = decay_scan(**leaves, impl=impl, **options)
    assert out.dtype == dtype
    grads = torch.autograd.grad((out.double() * weight).sum(), list(leaves.values()), materialize_grads=True)
    return {"out": out.double(), **{f"d{n}": g.double() for n, g in zip(leaves, grads, strict=True)}}


def compare(sizes, dtype, gated, **options):
    args, weight = make(sizes, gated)
    args = {n: t.to(dtype).double() for n, t in args.items()}
    want = run(args, torch.float64, weight, "reference", **options)
    have = run(args, dtype, weight, "triton", **options)
    low = run(args, dtype, weight, "torch", **options)
    # Band: twice the torch path's error in the same precision plus roundings of the largest entry. Gates get differences of sums over
    # all steps, whose roundings are those of the largest gradient.
    band, largest = 24 * torch.finfo(dtype).eps, max(t.abs().max() for t in want.values())
    for name, expected in want.items():
        error, other = (have[name] - expected).abs().max(), (low[name] - expected).abs().max()
        size = 4 * largest if name == "dlog_g" else expected.abs().max() + 1e-3
        limit = 2 * other + band * size
        assert error <= limit, f"{name}: {error:.2e} > {limit:.2e}"


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "decay"])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=list(SIZES))
def test_values_and_gradients_fp32(sizes, gated):
    compare(sizes, torch.float32, gated)
    compare(sizes, torch.float32, gated, read="exclusive", reverse=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_values_and_gradients_half(dtype):
    compare((33, 20, 16), dtype, True)


def test_masks_and_positions():
    mask = torch.rand(2, 65, generator=torch.Generator().manual_seed(1)) > 0.3
    mask[-1] = False
    positions = torch.randint(-1, 65, (65,), generator=torch.Generator().manual_seed(2))
    compare((65, 8, 8), torch.float32, True, key_mask=mask, positions=positions)
    compare((65, 8, 8), torch.float32, False, key_mask=mask)


@pytest.mark.parametrize("normalizer", ["denom", "mlstm"])
def test_sums_of_weights(normalizer):
    args, weight = make((33, 8, 8), True)
    args["q"], args["k"] = args["q"].exp(), args["k"].exp()
    want = run(args, torch.float64, weight, "reference", normalizer=normalizer)
    have = run(args, torch.float32, weight, "triton", normalizer=normalizer)
    for name, expected in want.items():
        assert (have[name] - expected).abs().max() <= 2e-5 * expected.abs().max().clamp(min=1), name
    with pytest.raises(NotImplementedError, match="float16"):
        run(args, torch.float16, weight, "triton", normalizer=normalizer)


def test_strong_gates_stay_finite():
    for gate in (0.0, -1e-4, -20.0, -1e4):
        args, _ = make((70, 8, 8), True)
        args["log_g"] = torch.full_like(args["log_g"], gate)
        leaves = [t.float().requires_grad_() for t in args.values()]
        out = decay_scan(leaves[0], leaves[1], leaves[2], log_g=leaves[3], impl="triton")
        assert all(t.isfinite().all() for t in (out, *torch.autograd.grad(out.sum(), leaves)))


def test_second_derivatives_are_exact():
    args, weight = make((9, 4, 4), True, batch=1, heads=1)

    def second(impl, dtype):
        leaves = [t.to(dtype).requires_grad_() for t in args.values()]
        out = decay_scan(*leaves[:3], log_g=leaves[3], impl=impl)
        first = torch.autograd.grad((out.sin() * weight).sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), leaves)

    for have, want in zip(second("triton", torch.float32), second("reference", torch.float64), strict=True):
        assert (have.double() - want).abs().max() <= 1e-4 * want.abs().max()


def test_opcheck_and_one_graph():
    q, k, v = (torch.randn(1, 2, 5, 8, requires_grad=True) for _ in range(3))
    log_g = (-torch.rand(1, 2, 5)).requires_grad_()
    torch.library.opcheck(ops.decay_scan_fwd, (q, k, v, log_g, True))
    torch.library.opcheck(ops.decay_scan_fwd, (q, k, v, None, False))
    function = lambda q, k, v, g: decay_scan(q, k, v, log_g=g, impl="triton")
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        compiled(q, k, v, log_g), decay_scan(q, k, v, log_g=log_g), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("shape", [(0, 2, 3), (2, 2, 0)], ids=["B0", "N0"])
def test_zero_sizes(shape):
    b, h, n = shape
    q, k, v = (torch.randn(b, h, n, 8, requires_grad=True) for _ in range(3))
    out = decay_scan(q, k, v, impl="triton")
    assert out.shape == (b, h, n, 8)


def test_what_is_missing_names_the_way_out():
    args, _ = make((3, 8, 8), False)
    q, k, v = (t.float() for t in args.values())
    for options in (
        {"log_g": torch.zeros(2, 2, 3, 8)},
        {"log_i": torch.zeros(2, 2, 3), "normalizer": "mlstm"},
        {"return_state": True},
    ):
        with pytest.raises(NotImplementedError, match="impl='torch'"):
            decay_scan(q, k, v, impl="triton", **options)
