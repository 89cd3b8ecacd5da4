"""Checks of the decay scan's Triton kernels under the interpreter; run by test_triton.py in a process of its own."""

import os

import pytest
import torch

from kernels.decay import DecayState, decay_scan, ops

assert os.environ.get("TRITON_INTERPRET") == "1", "run through tests/kernels/test_triton.py"
pytestmark = pytest.mark.usefixtures("unwritten")

SIZES = {"N7D8E20": (7, 8, 20), "N34D20E8": (34, 20, 8), "N18D40E36": (18, 40, 36), "N1D8E8": (1, 8, 8)}


def make(sizes, kind, batch=2, heads=1):
    gen = torch.Generator().manual_seed(0)
    n, d, e = sizes
    new = lambda *s: torch.randn(batch, heads, *s, generator=gen, dtype=torch.float64)
    args = {"q": new(n, d), "k": new(n, d), "v": new(n, e)}
    if kind in ("scalar", "mlstm"):
        args["log_g"] = -new(n).abs()
    if kind == "vector":
        args["log_g"] = -new(n, d).abs()
    if kind == "mlstm":
        args["log_i"] = 3 * new(n)
    return args, new(n, e)


def run(args, dtype, weight, impl, **options):
    leaves = {n: t.to(dtype).requires_grad_() for n, t in args.items()}
    out = decay_scan(**leaves, impl=impl, **options)
    assert out.dtype == dtype
    grads = torch.autograd.grad((out.double() * weight).sum(), list(leaves.values()), materialize_grads=True)
    return {"out": out.double(), **{f"d{n}": g.double() for n, g in zip(leaves, grads, strict=True)}}


def compare(sizes, dtype, kind, batch=2, **options):
    args, weight = make(sizes, kind, batch)
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


@pytest.mark.parametrize("kind", ["none", "scalar", "vector"])
@pytest.mark.parametrize("size", SIZES)
def test_values_and_gradients_fp32(size, kind):
    compare(SIZES[size], torch.float32, kind, batch=2 if size == "N7D8E20" else 1)


@pytest.mark.parametrize("kind", ["none", "scalar", "vector"])
def test_exclusive_and_reversed(kind):
    compare((18, 8, 20), torch.float32, kind, batch=1, read="exclusive", reverse=True)


@pytest.mark.parametrize("read", ["inclusive", "exclusive"])
def test_input_gate(read):
    compare((34, 8, 8), torch.float32, "mlstm", batch=1, read=read, normalizer="mlstm")


@pytest.mark.parametrize("kind", ["none", "scalar", "vector", "mlstm"])
def test_states_go_in_and_out_with_gradients(kind):
    """Every input, the initial state among them, gets its gradient through outputs and last state together."""
    args, weight = make((34, 8, 20), kind)
    gen = torch.Generator().manual_seed(5)
    options = {"normalizer": "mlstm", "read": "exclusive"} if kind == "mlstm" else {}
    width = 21 if kind == "mlstm" else 20
    start, pull = (torch.randn(2, 1, 8, width, generator=gen, dtype=torch.float64) for _ in range(2))
    level = torch.rand(2, 1, generator=gen, dtype=torch.float64) if kind == "mlstm" else None

    def both(impl, dtype):
        leaves = {n: t.to(dtype).requires_grad_() for n, t in {**args, "start": start}.items()}
        given = dict(leaves)
        state = DecayState(given.pop("start"), None if level is None else level.to(dtype))
        out, last = decay_scan(**given, **options, initial_state=state, return_state=True, impl=impl)
        kv = last.kv if last.exponent is None else last.kv * last.exponent.exp()[..., None, None]
        grads = torch.autograd.grad((out * weight).sum() + (kv * pull).sum(), list(leaves.values()))
        alone = torch.autograd.grad(
            decay_scan(**given, **options, return_state=True, impl=impl)[1].kv.sum(), leaves["k"]
        )
        return [out, kv, *grads, *alone] if level is None else [out, kv, *grads]

    for have, low, want in zip(
        both("triton", torch.float32),
        both("torch", torch.float32),
        both("reference", torch.float64),
        strict=True,
    ):
        limit = 2 * (low - want).abs().max() + 1e-5 * want.abs().max()
        assert (have - want).abs().max() <= limit


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_values_and_gradients_half(dtype):
    compare((18, 20, 16), dtype, "scalar" if dtype == torch.bfloat16 else "vector")


def test_masks_and_positions():
    mask = torch.rand(2, 20, generator=torch.Generator().manual_seed(1)) > 0.3
    mask[-1] = False
    positions = torch.randint(-1, 20, (20,), generator=torch.Generator().manual_seed(2))
    compare((20, 8, 8), torch.float32, "scalar", key_mask=mask, positions=positions)
    compare((20, 8, 8), torch.float32, "vector", key_mask=mask)


@pytest.mark.parametrize("normalizer", ["denom", "mlstm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_sums_of_weights(normalizer, dtype):
    """Unscaled sums leave float16's range: outputs are float32 until they are divided."""
    args, weight = make((33, 8, 8), "scalar")
    args = {n: t.to(dtype).double() for n, t in args.items()}
    args["q"], args["k"] = (args[n].exp().to(dtype).double() for n in "qk")
    if dtype == torch.float16:
        args["k"] = 4096 * args["k"].clamp(max=4)
    want = run(args, torch.float64, weight, "reference", normalizer=normalizer)
    have = run(args, dtype, weight, "triton", normalizer=normalizer)
    band = 24 * torch.finfo(dtype).eps
    for name, expected in want.items():
        assert (have[name] - expected).abs().max() <= band * expected.abs().max().clamp(min=1), name


def test_extreme_gates_stay_finite():
    for kind in ("scalar", "vector"):
        for gate in (0.0, -1e4):
            args, _ = make((18, 8, 8), kind, batch=1)
            args["log_g"] = torch.full_like(args["log_g"], gate)
            finite(args)
    for gate in (-80.0, 80.0):
        args, _ = make((34, 8, 8), "mlstm", batch=1)
        finite({**args, "log_i": torch.full_like(args["log_i"], gate)}, normalizer="mlstm")


def finite(args, **options):
    leaves = {n: t.float().requires_grad_() for n, t in args.items()}
    out = decay_scan(**leaves, **options, impl="triton")
    grads = torch.autograd.grad(out.sum(), list(leaves.values()))
    assert all(t.isfinite().all() for t in (out, *grads))


@pytest.mark.parametrize("kind", ["scalar", "vector"])
def test_second_derivatives_are_exact(kind):
    args, weight = make((9, 4, 4), kind, batch=1, heads=1)

    def second(impl, dtype):
        leaves = [t.to(dtype).requires_grad_() for t in args.values()]
        out = decay_scan(*leaves[:3], log_g=leaves[3], impl=impl)
        first = torch.autograd.grad((out.sin() * weight).sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), leaves)

    for have, want in zip(second("triton", torch.float32), second("reference", torch.float64), strict=True):
        assert (have.double() - want).abs().max() <= 1e-4 * want.abs().max()


def test_products_inside_chunks():
    """Forward, gradients and second derivatives of the weights with gates per channel, against autograd of the definition."""
    gen = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 32, 5, generator=gen, dtype=torch.float64) for _ in range(2))
    cum = -torch.rand(1, 32, 5, generator=gen, dtype=torch.float64).cumsum(1)
    keep = torch.ones(32, 32, dtype=torch.bool).tril(-1)

    def plain(q, k, cum):
        gap = (cum[:, :, None] - cum[:, None]).masked_fill(~keep[..., None], float("-inf"))
        return (q[:, :, None] * k[:, None] * gap.exp()).sum(-1)

    def derivatives(function, dtype):
        leaves = [t.to(dtype).requires_grad_() for t in (q, k, cum)]
        out = function(*leaves)
        first = torch.autograd.grad(out.sin().sum(), leaves, create_graph=True)
        return [out, *first, *torch.autograd.grad(sum(g.square().sum() for g in first), leaves)]

    products = derivatives(
        lambda q, k, cum: ops.gated_products(q, k, cum, diagonal=False, dtype="float32"), torch.float32
    )
    for have, want in zip(products, derivatives(plain, torch.float64), strict=True):
        assert (have.double() - want).abs().max() <= 1e-5 * want.abs().max()


def test_opcheck_and_one_graph():
    q, k, v = (torch.randn(1, 1, 3, 4, requires_grad=True) for _ in range(3))
    log_g = (-torch.rand(1, 1, 3)).requires_grad_()
    start = torch.randn(1, 1, 4, 4, requires_grad=True)
    torch.library.opcheck(ops.decay_scan_fwd, (q, k, v, log_g, start, True, False, False))
    quick = {"test_utils": ("test_schema", "test_autograd_registration", "test_faketensor")}
    torch.library.opcheck(ops.decay_scan_fwd, (q, k, v, None, None, False, False, True), **quick)
    wide = (-torch.rand(1, 1, 3, 4)).requires_grad_()
    torch.library.opcheck(ops.decay_scan_fwd, (q, k, v, wide, None, True, True, False), **quick)
    q, k, cum = (torch.randn(1, 16, 4, requires_grad=True) for _ in range(3))
    torch.library.opcheck(ops.gated_scores, (q, k, cum, True, "float32"), **quick)
    torch.library.opcheck(
        ops.gated_mix, (torch.randn(1, 16, 16, requires_grad=True), k, cum, True, "float32"), **quick
    )


def test_compiles_into_one_graph():
    args = {n: t.float().requires_grad_() for n, t in make((5, 8, 8), "mlstm")[0].items()}
    function = lambda **given: decay_scan(**given, normalizer="mlstm", impl="triton")
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    have, want = compiled(**args), decay_scan(**args, normalizer="mlstm", impl="torch")
    torch.testing.assert_close(have, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(0, 2, 3), (2, 2, 0)], ids=["B0", "N0"])
def test_zero_sizes(shape):
    b, h, n = shape
    q, k, v = (torch.randn(b, h, n, 8, requires_grad=True) for _ in range(3))
    out = decay_scan(q, k, v, impl="triton")
    assert out.shape == (b, h, n, 8)


@pytest.mark.parametrize("kind", ["scalar", "keys"])
def test_gates_of_half_precision_inputs_have_gradients_of_single_precision(kind):
    """They are running sums of differences of products: what rounding leaves in each would add up over the steps."""
    gen = torch.Generator().manual_seed(0)
    new = lambda *s: torch.randn(1, 1, 120, *s, generator=gen)
    q, k, v = (new(16).half() for _ in range(3))
    log_g = (-0.02 * new(*(() if kind == "scalar" else (16,))).abs()).requires_grad_()
    weight = new(16)
    found = []
    for impl in ("torch", "triton"):
        out = decay_scan(q, k, v, log_g=log_g, impl=impl)
        found.append(torch.autograd.grad((out.float() * weight).sum(), log_g)[0])
    assert (found[1] - found[0]).abs().max() < 2e-5 * found[0].abs().max()
