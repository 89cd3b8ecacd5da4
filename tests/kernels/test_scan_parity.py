"""Scans, and softmax attention with sinks, against the naive references of fla-core, a development dependency.

By Songlin Yang, Yu Zhang et al. Its files are loaded one by one: importing the package needs a GPU. Tensors there are [B, T, H, D]; queries
are scaled inside.
"""

import importlib.util
from pathlib import Path

import pytest
import torch

from kernels import softmax
from kernels.decay import decay_scan
from kernels.delta import delta_scan
from kernels.linear import linear_attention
from zoo.bench import scans

if importlib.util.find_spec("fla") is None:
    pytest.skip("fla-core is not installed (pip install --no-deps fla-core)", allow_module_level=True)


def naive(op, name):
    root = Path(importlib.util.find_spec("fla").origin).parent
    spec = importlib.util.spec_from_file_location(f"_fla_{op}", root / "ops" / op / "naive.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)


def make(n=33, d=6, e=5):
    gen = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, c, generator=gen) for c in (d, d, e))
    k = torch.nn.functional.normalize(k, dim=-1)
    beta = torch.rand(2, 3, n, generator=gen)
    vector = -torch.rand(2, 3, n, d, generator=gen)
    return q, k, v, beta, vector


def t(x):
    return x.transpose(1, 2)


def near(have, want):
    torch.testing.assert_close(have, want.float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["scalar", "vector"])
def test_gla(kind):
    q, k, v, _, g = make()
    g = g[..., 0] if kind == "scalar" else g
    wide = g if kind == "vector" else g[..., None].expand_as(k)
    want = naive("gla", "naive_recurrent_gla")(t(q), t(k), t(v), t(wide))[0]
    near(decay_scan(q * 6**-0.5, k, v, log_g=g), t(want))


def test_delta_rule():
    q, k, v, beta, _ = make()
    want = naive("delta_rule", "delta_rule_recurrence")(q, k, v, beta)[0]
    near(delta_scan(q * 6**-0.5, k, v, beta), want)


def test_gated_delta_rule():
    q, k, v, beta, g = make()
    want = naive("gated_delta_rule", "naive_recurrent_gated_delta_rule")(
        t(q), t(k), t(v), beta=t(beta), g=t(g[..., 0])
    )[0]
    near(delta_scan(q * 6**-0.5, k, v, beta, log_g=g[..., 0]), t(want))


def test_kda():
    q, k, v, beta, g = make()
    want = naive("kda", "naive_recurrent_kda")(t(q), t(k), t(v), t(g), t(beta))[0]
    near(delta_scan(q * 6**-0.5, k, v, beta, log_g=g), t(want))


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("decay", "fla simple gla"),
        ("decay per channel", "fla gla step by step"),
        ("delta", "fla gated delta"),
        ("kda", "fla kda"),
    ],
)
def test_what_the_benchmark_compares_is_the_same_function(ours, theirs):
    """Values and gradients, gates included: they are computed from the inputs."""
    gen = torch.Generator().manual_seed(0)
    leaves = [torch.randn(1, 2, 128, 16, generator=gen).requires_grad_() for _ in range(3)]
    q, k, v = leaves
    near_all(scans.ours()[ours](q / 4, k, v), scans.peers()[theirs](q, k, v), leaves)


def test_causal_linear_attention():
    gen = torch.Generator().manual_seed(0)
    leaves = [torch.randn(1, 2, 128, 16, generator=gen).requires_grad_() for _ in range(3)]
    near_all(linear_attention(*leaves, causal=True), scans.peers()["fla linear"](*leaves), leaves)


@pytest.mark.parametrize("reference", ["naive_parallel_based", "naive_chunk_based"])
def test_based(reference):
    q, k, v, _, _ = make(n=32)
    options = {"chunk_size": 8} if "chunk" in reference else {}
    want = naive("based", reference)(q, k, v, **options)
    near(linear_attention(q * 6**-0.25, k * 6**-0.25, v, feature="taylor2", causal=True), want)


@pytest.mark.parametrize("window", [None, 5])
def test_attention_with_sinks_and_groups(window):
    q, k, v, _, _ = make()
    q, sink = torch.cat((q, -2 * q), 1), torch.tensor([-1.0, 0.0, 3.0, 0.5, 0.0, 8.0])
    want = naive("attn", "naive_parallel_attn")(t(q), t(k), t(v), window_size=window, sink_bias=sink)[0]
    band = None if window is None else (window - 1, 0)
    found = softmax.attention(q, k, v, causal=True, window=band, return_lse=True)
    near(softmax.apply_sink(*found, sink[:, None])[0], t(want))


def near_all(have, want, leaves):
    near(have, want)
    grads = [torch.autograd.grad(o.sin().sum(), leaves) for o in (have, want)]
    for mine, other in zip(*grads, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-3)
