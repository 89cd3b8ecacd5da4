"""Checks of the delta rule's Triton kernel under the interpreter; run by test_triton.py in a process of its own."""

import os

import pytest
import torch
import torch.nn.functional as F

from kernels.delta import delta_scan, ops

assert os.environ.get("TRITON_INTERPRET") == "1", "run through tests/kernels/test_triton.py"
pytestmark = pytest.mark.usefixtures("unwritten")


def make(kind, n, m, d, e, batch=2, heads=1):
    gen = torch.Generator().manual_seed(0)
    new = lambda *s: torch.randn(batch, heads, *s, generator=gen, dtype=torch.float64)
    out = {"q": new(n, d), "k": F.normalize(new(m, d), dim=-1), "v": new(m, e), "beta": new(m).sigmoid()}
    if kind != "none":
        out["log_g"] = -(new(m) if kind == "scalar" else new(m, d)).abs()
    return out, new(n, e)


@pytest.mark.parametrize("kind", ["none", "scalar", "vector"])
@pytest.mark.parametrize(
    "sizes", [(7, 7, 8, 20), (33, 33, 20, 8), (5, 18, 40, 36)], ids=["N7", "N33", "N5M18"]
)
def test_values_and_gradients(kind, sizes):
    compare(kind, (*sizes[:2], 8, 20) if kind == "vector" else sizes)


def test_wide_keys():
    compare("none", (33, 33, 70, 8))


@pytest.mark.parametrize(
    ("kind", "dtype"), [("none", torch.float16), ("scalar", torch.bfloat16), ("vector", torch.bfloat16)]
)
def test_values_and_gradients_half(kind, dtype):
    compare(kind, (18, 18, 8, 20), dtype)


def compare(kind, sizes, dtype=torch.float32):
    args, weight = make(kind, *sizes)
    args = {n: t.to(dtype).double() for n, t in args.items()}  # the reference sees the same rounded numbers
    mask = torch.ones(2, sizes[1], dtype=torch.bool)
    mask[0, 2] = False
    mask[1] = False

    def run(impl, dtype):
        leaves = {n: t.to(dtype).requires_grad_() for n, t in args.items()}
        out = delta_scan(**leaves, key_mask=mask, chunk=16 if impl != "reference" else None, impl=impl)
        return [out, *torch.autograd.grad((out * weight).sum(), list(leaves.values()))]

    want, have, low = (
        run("reference", torch.float64),
        run("triton", dtype),
        run("torch", dtype),
    )
    for expected, mine, other in zip(want, have, low, strict=True):
        # Twice the torch path's error in the same precision plus a few roundings of the largest entry.
        limit = 2 * (other - expected).abs().max() + 24 * torch.finfo(dtype).eps * (
            expected.abs().max() + 1e-3
        )
        assert (mine - expected).abs().max() <= limit


def test_states_go_in_and_out():
    args, _ = make("scalar", 40, 40, 8, 8)
    args = {n: t.float() for n, t in args.items()}
    start = torch.randn(2, 1, 8, 8)
    options = {"initial_state": start, "return_state": True, "chunk": 16}
    for have, want in zip(
        delta_scan(**args, impl="triton", **options), delta_scan(**args, impl="torch", **options), strict=True
    ):
        torch.testing.assert_close(have, want, rtol=1e-4, atol=1e-5)


def test_second_derivatives_are_exact():
    args, weight = make("scalar", 9, 9, 4, 4, 1, 1)

    def second(impl, dtype):
        leaves = {n: t.to(dtype).requires_grad_() for n, t in args.items()}
        out = delta_scan(**leaves, impl=impl, chunk=4 if impl != "reference" else None)
        first = torch.autograd.grad((out.sin() * weight).sum(), list(leaves.values()), create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), list(leaves.values()))

    for have, want in zip(second("triton", torch.float32), second("reference", torch.float64), strict=True):
        assert (have.double() - want).abs().max() <= 2e-4 * want.abs().max()


def test_opcheck():
    leaf = lambda *s: torch.randn(*s, requires_grad=True)
    u, w, k, start = leaf(2, 3, 5, 4), leaf(2, 3, 5, 6), leaf(2, 3, 5, 6), leaf(2, 6, 4)
    torch.library.opcheck(
        ops.delta_walk_fwd, (u, w, k, leaf(2, 3, 6, 1), leaf(2, 3, 6, 4), start, True, "float32")
    )
    quick = {"test_utils": ("test_schema", "test_autograd_registration", "test_faketensor")}
    torch.library.opcheck(ops.delta_walk_fwd, (u, w, k, None, None, start, False, "float16"), **quick)
    torch.library.opcheck(ops.delta_pairs, (leaf(2, 5, 3), leaf(2, 4, 3), "float32"))


def test_what_is_missing_names_the_way_out():
    args, _ = make("none", 3, 3, 130, 4)
    with pytest.raises(NotImplementedError, match="impl='torch'"):
        delta_scan(**{n: t.float() for n, t in args.items()}, impl="triton")
