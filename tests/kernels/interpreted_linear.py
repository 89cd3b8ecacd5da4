"""Checks of the linear kernels under the interpreter; run by test_triton.py as ``pytest tests/kernels/interpreted_linear.py``.

Not collected on its own (the name does not start with test_): it needs TRITON_INTERPRET=1 before triton is imported.
"""

import os

import pytest
import torch

from kernels.linear import global_state, linear_attention, mala, ops, taylor

assert os.environ.get("TRITON_INTERPRET") == "1", "run through tests/kernels/test_triton.py"

CALLS = {
    "linear": (linear_attention, {}),
    "linear-none": (linear_attention, {"normalize": "none"}),
    "linear-bias": (linear_attention, {}),
    "mala": (mala, {}),
    "mala-sum": (mala, {"key_norm": "sum"}),
    "mala-rotated": (mala, {}),
}
SIZES = {"N7M65D8E20": (7, 65, 8, 20), "N65M33D20E8": (65, 33, 20, 8)}


@pytest.fixture(autouse=True)
def small_pieces(unwritten, monkeypatch):
    """Several chunks and splits at the sizes of these tests."""
    from kernels.linear import launch

    monkeypatch.setattr(taylor, "CHUNK", 16)
    monkeypatch.setattr(taylor, "SPLIT", 16)
    monkeypatch.setattr(launch, "SPLIT_PROGRAMS", 12)  # three or so splits at these sizes


def inputs(sizes, call: str, seed: int = 0, batch: int = 2):
    gen = torch.Generator().manual_seed(seed)
    heads = 2 if call in ("linear", "mala-rotated") else 1
    n, m, d, e = sizes
    new = lambda *s: torch.randn(*s, generator=gen, dtype=torch.float64)
    args = {"q": new(batch, heads, n, d), "k": new(batch, heads, m, d), "v": new(batch, heads, m, e)}
    if call == "linear-bias":
        args["key_bias"] = new(batch, heads, m)
    if call == "mala-rotated":
        args["q_rot"], args["k_rot"] = new(batch, heads, n, d), new(batch, heads, m, d)
    mask = torch.rand(batch, m, generator=gen) > 0.3
    mask[-1] = False
    return args, mask, new(batch, heads, n, e)


def run(call: str, impl: str, args: dict, dtype: torch.dtype, weight: torch.Tensor, **options):
    """Output and gradient of each input, as float64."""
    function, extra = CALLS[call]
    leaves = {name: t.to(dtype).requires_grad_() for name, t in args.items()}
    given = dict(leaves)
    if "q_rot" in given:
        given["rotated"] = (given.pop("q_rot"), given.pop("k_rot"))
    out = function(**given, impl=impl, **extra, **options)
    assert out.dtype == dtype
    grads = torch.autograd.grad((out.double() * weight).sum(), list(leaves.values()))
    return {"out": out.double(), **{f"d{n}": g.double() for n, g in zip(leaves, grads, strict=True)}}


def compare(call, sizes, dtype, feature="elu1", masked=True, **options):
    args, mask, weight = inputs(sizes, call)
    args = {n: t.to(dtype).double() for n, t in args.items()}  # the reference sees the same rounded numbers
    options |= {"feature": feature, "key_mask": mask if masked else None}
    want = run(call, "reference", args, torch.float64, weight, **options)
    have = run(call, "triton", args, dtype, weight, **options)
    low = run(call, "torch", args, dtype, weight, **options)
    # Band: twice the error of the torch path in the same precision plus a few roundings of the largest entry.
    band = 24 * torch.finfo(dtype).eps
    for name, expected in want.items():
        error, other = (have[name] - expected).abs().max(), (low[name] - expected).abs().max()
        limit = 2 * other + band * (expected.abs().max() + 1e-3)
        assert error <= limit, f"{call} {name}: {error:.2e} > {limit:.2e}"


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("sizes", SIZES.values(), ids=list(SIZES))
def test_values_and_gradients_fp32(call, sizes):
    compare(call, sizes, torch.float32)


@pytest.mark.parametrize("call", ["linear-bias", "mala-rotated"])
def test_one_query_and_wide_heads(call):
    """Between them these two launch every branch of every kernel."""
    compare(call, (1, 66, 64, 64), torch.float32)


@pytest.mark.parametrize("call", CALLS)
def test_values_and_gradients_half(call):
    dtype = torch.float16 if call in ("linear", "mala-sum", "mala-rotated") else torch.bfloat16
    compare(call, (17, 33, 20, 16), dtype, masked=dtype == torch.float16)


@pytest.mark.parametrize("feature", ["relu", "sqrelu", "exp", "softplus"])
def test_feature_maps(feature):
    compare("mala", (5, 19, 8, 8), torch.float32, feature)


@pytest.mark.parametrize("feature", ["silu", "identity", "dpfp2", "softmax"])
def test_signed_and_wide_feature_maps(feature):
    compare("linear-none", (5, 19, 8, 8), torch.float32, feature)


def test_taylor_features_inside_the_kernels():
    """Over all keys, over prefixes with keys before every query, and over given prefixes."""
    compare("linear-bias", (5, 18, 3, 6), torch.float32, "taylor2")
    compare("linear-bias", (5, 22, 3, 6), torch.float32, "taylor2", causal=True)
    positions = torch.randint(-1, 7, (2, 12), generator=torch.Generator().manual_seed(2))
    compare("linear-none", (12, 7, 4, 20), torch.float32, "taylor2", causal=True, positions=positions)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_taylor_features_half(dtype):
    compare("linear", (18, 18, 4, 6), dtype, "taylor2", causal=True)


def test_taylor_features_twice_and_of_nothing():
    x = torch.randn(1, 1, 9, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def second(impl, dtype):
        leaf = x.to(dtype).requires_grad_()
        out = linear_attention(leaf, leaf.sin(), leaf.cos(), feature="taylor2", causal=True, impl=impl)
        (first,) = torch.autograd.grad(out.pow(2).sum(), leaf, create_graph=True)
        (again,) = torch.autograd.grad(first.pow(2).sum(), leaf)
        return first.double(), again.double()

    for have, want in zip(second("triton", torch.float32), second("reference", torch.float64), strict=True):
        assert (have - want).abs().max() < 1e-4 * want.abs().max()
    x, y = torch.randn(2, 5, 3, requires_grad=True), torch.randn(2, 5, 4, requires_grad=True)
    square = torch.randn(2, 13, 4, requires_grad=True)
    torch.library.opcheck(taylor.taylor_state, (x, y))
    torch.library.opcheck(taylor.taylor_read, (x, square, [1.0, 1.0, 0.5]))
    torch.library.opcheck(taylor.taylor_slope, (x.detach(), y.detach(), square.detach(), [1.0, 2.0]))
    empty = linear_attention(x[None, :, :0], x[None], y[None], feature="taylor2", causal=True, impl="triton")
    assert empty.shape == (1, 2, 0, 4)
    assert (
        linear_attention(x[None], x[None, :, :0], y[None, :, :0], feature="taylor2", impl="triton") == 0
    ).all()


def test_non_contiguous_inputs():
    q, k, v = (torch.randn(2, 9, 3, 16).transpose(1, 2) for _ in range(3))
    torch.testing.assert_close(
        mala(q, k, v, impl="triton"), mala(q, k, v, impl="reference"), rtol=1e-4, atol=1e-5
    )
    q, k, v = (torch.randn(2, 3, 16, 9).transpose(2, 3) for _ in range(3))
    torch.testing.assert_close(
        mala(q, k, v, impl="triton"), mala(q, k, v, impl="reference"), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("shape", [(0, 2, 3, 5), (2, 2, 0, 5), (2, 2, 3, 0)], ids=["B0", "N0", "M0"])
def test_zero_sizes(shape):
    b, h, n, m = shape
    q, k, v = (torch.randn(b, h, s, 8, requires_grad=True) for s in (n, m, m))
    out = mala(q, k, v, impl="triton")
    assert out.shape == (b, h, n, 8) and (out == 0).all()
    for grad in torch.autograd.grad(out.sum(), (q, k, v)):
        assert (grad == 0).all()


def test_extreme_numbers_stay_finite():
    q, k, v = (torch.randn(1, 1, 9, 16) for _ in range(3))
    for size in (1e-6, 80.0):
        for dtype in (torch.float32, torch.float16):
            tensors = [(size * t).to(dtype).requires_grad_() for t in (q, k)] + [v.to(dtype).requires_grad_()]
            out = mala(*tensors, impl="triton")
            grads = torch.autograd.grad(out.float().sum(), tensors)
            assert all(t.isfinite().all() for t in (out, *grads)), (size, dtype)


def test_second_derivative_is_exact_and_respects_dependent_inputs():
    """k is a function of q: the guard must not count its path twice."""
    x = torch.randn(1, 1, 5, 8, dtype=torch.float64)

    def second(impl, dtype):
        leaf = x.to(dtype).requires_grad_()
        out = linear_attention(leaf, leaf.sin(), leaf.cos(), feature="exp", impl=impl) + mala(
            leaf, leaf * 2, leaf, impl=impl
        )
        (first,) = torch.autograd.grad(out.pow(2).sum(), leaf, create_graph=True)
        (again,) = torch.autograd.grad(first.pow(2).sum(), leaf)
        return first.double(), again.double()

    for have, want in zip(second("triton", torch.float32), second("reference", torch.float64), strict=True):
        assert (have - want).abs().max() < 1e-4 * want.abs().max()


def test_opcheck():
    q, k, v = (torch.randn(1, 2, 5, 8, requires_grad=True) for _ in range(3))
    mask = torch.tensor([[True, True, False, True, True]])
    weight = torch.rand(1, 2, 5, requires_grad=True)
    torch.library.opcheck(ops.state_fwd, (k, v, None, mask, weight, "elu1"))
    torch.library.opcheck(ops.state_fwd, (k, v, q, None, None, "relu"))
    state, kbar, vbar = (torch.randn(*s, requires_grad=True) for s in ((1, 2, 8, 8), (1, 2, 8), (1, 2, 8)))
    kbar = kbar.detach().abs().requires_grad_()
    ones = torch.ones(1)
    torch.library.opcheck(ops.read_fwd, (q, None, state, kbar, None, None, ones, ones, "denom", "elu1"))
    torch.library.opcheck(ops.read_fwd, (q, k, state, kbar, kbar, vbar, ones, ones, "mala", "elu1"))


@pytest.mark.parametrize("call", [linear_attention, mala])
def test_compiles_into_one_graph_around_the_operators(call):
    args = [torch.randn(1, 2, 9, 8, requires_grad=True) for _ in range(3)]
    compiled = torch.compile(
        lambda q, k, v: call(q, k, v, impl="triton"), fullgraph=True, backend="aot_eager"
    )
    want, have = call(*args, impl="torch"), compiled(*args)
    torch.testing.assert_close(have, want, rtol=1e-4, atol=1e-5)
    for a, b in zip(
        torch.autograd.grad(have.sum(), args), torch.autograd.grad(want.sum(), args), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_prefix_sums_of_zero_keys():
    q, k, v = (torch.randn(1, 2, n, 8) for n in (3, 0, 0))
    assert (linear_attention(q, k, v, causal=True, impl="triton") == 0).all()


@pytest.mark.parametrize("call", ["linear", "linear-none", "mala", "mala-sum", "mala-rotated"])
def test_causal_values_and_gradients(call):
    """Through the scan kernels; positions with rows that see nothing, and more keys than queries."""
    compare(call, (9, 37, 8, 20), torch.float32, causal=True)
    positions = torch.randint(-1, 19, (2, 9), generator=torch.Generator().manual_seed(2))
    compare(call, (9, 19, 8, 20), torch.float32, causal=True, positions=positions)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_causal_half(dtype):
    compare("mala", (17, 17, 20, 16), dtype, causal=True)


def test_causal_from_a_state():
    """A state of earlier keys, with its gradient."""
    gen = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 1, 34, 8, generator=gen) for _ in range(3))
    head, rest = (slice(None), slice(None), slice(0, 20)), (slice(None), slice(None), slice(20, 34))

    def run(impl):
        leaves = [t.clone().requires_grad_() for t in (q, k, v)]
        x, y, z = leaves
        phi = torch.nn.functional.elu(y) + 1
        state = global_state(phi[head], z[head])
        out = mala(x[rest], y[rest], z[rest], causal=True, initial_state=state, impl=impl)
        return [out, *torch.autograd.grad(out.sin().sum(), leaves)]

    for have, want in zip(run("triton"), run("torch"), strict=True):
        torch.testing.assert_close(have, want, rtol=1e-4, atol=1e-5)


def test_what_is_missing_names_the_way_out():
    q, k, v = (torch.randn(1, 1, 3, 8) for _ in range(3))
    state = global_state(k, v)
    with pytest.raises(NotImplementedError, match="impl='torch'"):
        linear_attention(q, k, v, initial_state=state, impl="triton")
    with pytest.raises(NotImplementedError, match="impl='torch'"):
        mala(q.double(), k.double(), v.double(), impl="triton")
