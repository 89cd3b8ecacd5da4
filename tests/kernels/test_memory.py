"""Online memory: written-out chunk gradients against autograd token by token."""

import pytest
import torch
import torch.nn.functional as F

from kernels.delta import delta_scan
from kernels.memory import memory_read, memory_scan, memory_state, memory_step, predict

D64 = torch.float64
KINDS = ("linear", "mlp", "mlp-wide")


def make(kind, n=7, m=None, d=4, batch=2, heads=2, grad=False):
    gen = torch.Generator().manual_seed(0)
    m = n if m is None else m
    e = 3 if kind == "mlp-wide" else d
    new = lambda *s: torch.randn(*s, generator=gen, dtype=D64)
    args = {
        "q": F.normalize(new(batch, heads, n, d), dim=-1),
        "k": F.normalize(new(batch, heads, m, d), dim=-1),
        "v": new(batch, heads, m, e),
        "lr": 0.2 * new(batch, heads, m).sigmoid(),
        "log_keep": F.logsigmoid(3 + new(batch, heads, m)),
        "log_momentum": F.logsigmoid(new(batch, heads, m)),
    }
    if kind == "linear":
        args["weights"] = (new(heads, d, e),)
    else:
        args["weights"] = (new(heads, d, 5), new(heads, 5, e))
        args["gain"] = 1 + 0.1 * new(heads, e)
    flat = [*(t for n, t in args.items() if n != "weights"), *args["weights"]]
    for t in flat:
        t.requires_grad_(grad)
    return args, flat


def compare(kind, n, m, **options):
    args, flat = make(kind, n, m, grad=True)
    want, have = (memory_scan(**args, impl=impl, **options) for impl in ("reference", "torch"))
    torch.testing.assert_close(have, want, rtol=1e-8, atol=1e-8)
    grads = [torch.autograd.grad(o.sin().sum(), flat, allow_unused=True) for o in (want, have)]
    for want_grad, have_grad in zip(*grads, strict=True):
        if want_grad is None:  # nothing was learned with it
            assert have_grad is None or have_grad.abs().max() < 1e-12
        else:
            torch.testing.assert_close(have_grad, want_grad, rtol=1e-6, atol=1e-7)
    return have


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk", [1, 3])
def test_written_gradients_equal_autograd(kind, chunk):
    compare(kind, 7, 7, chunk=chunk)
    mask = torch.tensor([[True, False, True, True, False, True, True], [False] * 7])
    have = compare(kind, 7, 7, chunk=chunk, key_mask=mask, read="exclusive", reverse=True)
    assert (have[1] == 0).all()


@pytest.mark.parametrize("kind", KINDS[:2])
def test_reading_at_positions(kind):
    mask = torch.tensor([[True, False, True, True, True], [True, True, True, True, False]])
    compare(
        kind, 6, 5, chunk=2, key_mask=mask, positions=torch.tensor([[4, -1, 0, 2, 2, 9], [0, 1, 2, 3, 4, 4]])
    )
    compare(kind, 3, 6, chunk=2)


@pytest.mark.parametrize("kind", KINDS[:2])
def test_reverse_is_flip_run_flip_and_exclusive_reads_one_token_earlier(kind):
    args, _ = make(kind, 7)
    flipped = {n: t if n in ("weights", "gain") else t.flip(2) for n, t in args.items()}
    have = memory_scan(**args, chunk=3, reverse=True)
    torch.testing.assert_close(have, memory_scan(**flipped, chunk=3).flip(2))
    before = memory_scan(**args, chunk=3, positions=torch.arange(7) - 1)
    torch.testing.assert_close(memory_scan(**args, chunk=3, read="exclusive"), before)


def test_without_momentum_and_decay():
    args, _ = make("mlp", 6)
    args |= {"log_keep": None, "log_momentum": None}
    have, want = (memory_scan(**args, chunk=2, impl=i) for i in ("torch", "reference"))
    torch.testing.assert_close(have, want, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk", [1, 4])
def test_steps_equal_the_scan(kind, chunk):
    args, _ = make(kind, 11)
    want = memory_scan(**args, chunk=chunk)
    q, weights = args.pop("q"), args.pop("weights")
    cut = lambda a, b: {n: t if n == "gain" else t[:, :, a:b] for n, t in args.items()}
    state = memory_state(**cut(0, 5), weights=weights, chunk=chunk)
    rows = []
    for t in range(5, 11):
        state = memory_step(state, **cut(t, t + 1), chunk=chunk)
        rows.append(memory_read(q[:, :, t : t + 1], state, gain=args.get("gain")))
    torch.testing.assert_close(torch.cat(rows, 2), want[:, :, 5:], rtol=1e-9, atol=1e-9)


def test_linear_memory_with_fresh_gradients_is_the_delta_rule():
    args, _ = make("linear", 12)
    start = args["weights"][0]
    args |= {"log_keep": None, "log_momentum": None}
    want = delta_scan(
        args["q"], args["k"], args["v"], 2 * args["lr"], initial_state=start.expand(2, -1, -1, -1)
    )
    torch.testing.assert_close(memory_scan(**args, chunk=1), want, rtol=1e-9, atol=1e-9)


def test_no_step_leaves_the_memory_alone():
    args, _ = make("mlp", 6)
    args |= {"log_keep": None, "log_momentum": None, "lr": torch.zeros_like(args["lr"])}
    out = memory_scan(**args, chunk=2)
    want = predict(args["q"], tuple(w[None] for w in args["weights"]), args["gain"])
    torch.testing.assert_close(out, want)


@pytest.mark.parametrize("kind", KINDS[:2])
def test_second_derivatives(kind):
    args, flat = make(kind, 3, d=2, batch=1, heads=1, grad=True)
    names = list(args)

    def call(q, k, v, lr):
        return memory_scan(**{**args, "q": q, "k": k, "v": v, "lr": lr}, chunk=2)

    assert names[:4] == ["q", "k", "v", "lr"]
    assert torch.autograd.gradgradcheck(call, tuple(flat[:4]), atol=1e-4)


def test_errors_name_the_way_out():
    args, _ = make("mlp")
    with pytest.raises(ValueError, match="gain"):
        memory_scan(**{**args, "gain": None})
    with pytest.raises(ValueError, match="weights must be"):
        memory_scan(**{**args, "weights": (args["weights"][1], args["weights"][0])})
    with pytest.raises(ValueError, match="at least 1"):
        memory_scan(**args, chunk=0)
    single = {n: tuple(w.float() for w in t) if n == "weights" else t.float() for n, t in args.items()}
    with pytest.raises(NotImplementedError, match="memory of two layers; use impl='torch'"):
        memory_scan(**single, impl="triton")
