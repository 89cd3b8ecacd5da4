"""SQA is softmax attention with fewer query heads, in its output, its cost and its window."""

import pytest
import torch
from variants import make, qkv

from kernels import softmax as kernel
from zoo.attention import create_attention
from zoo.attention.sqa import default_reduction
from zoo.errors import CapabilityError, ConfigError


def test_sqa_is_attention_with_fewer_query_heads():
    q, k, v = qkv(h=2, hk=1)
    have = make("sqa", reduction=2, num_kv_heads=1).attend(q, k, v)
    assert (have - kernel.attention(q, k.expand(-1, 2, -1, -1), v.expand(-1, 2, -1, -1))).abs().max() < 1e-12
    whole = make("sqa", reduction=1)
    assert (whole.attend(*qkv()) - kernel.attention(*qkv())).abs().max() < 1e-12


def test_sqa_parameters_and_cost():
    c, heads, d = 64, 8, 8
    for reduction, kv in ((2, None), (2, 2), (4, None), (8, 1)):
        module = create_attention("sqa", c, heads, pattern="self", reduction=reduction, num_kv_heads=kv)
        hq, hk = heads // reduction, kv or heads // reduction
        wanted = (c + 1) * (hq + 2 * hk) * d + (hq * d + 1) * c
        assert module.cost(64).parameters == wanted
    full = create_attention("sqa", c, heads, pattern="self", reduction=1)
    half = create_attention("sqa", c, heads, pattern="self")
    assert half.attend_cost(64, 64)[0] * 2 == full.attend_cost(64, 64)[0]


def test_sqa_window_and_bias_of_all_heads():
    q, k, v = qkv(h=2, hk=2)
    banded = make("sqa", pattern="causal_self", window=3)
    assert (
        banded.attend(q, k, v) - kernel.attention(q, k, v, causal=True, window=(3, 0))
    ).abs().max() < 1e-12
    bias = torch.randn(2, 4, 11, 11, dtype=torch.float64)
    want = kernel.attention(q, k, v, bias=bias.unflatten(1, (2, 2)).mean(2))
    assert (make("sqa").attend(q, k, v, bias=bias) - want).abs().max() < 1e-12
    with pytest.raises(CapabilityError, match="window"):
        make("sqa", window=3, ordered=False)


def test_sqa_reduction_divides_the_heads(caplog):
    """A number that was asked for is kept or refused; the default fits any number of heads and says where it is not 2."""
    for heads, reduction in ((5, 2), (8, 3), (3, 4), (4, 0)):
        with pytest.raises(ConfigError, match=f"reduction={reduction} must divide the {heads} heads: 1, "):
            create_attention("sqa", 8 * heads, heads, pattern="self", reduction=reduction)
    default_reduction.cache_clear()
    for heads, queries in ((1, 1), (2, 1), (8, 4), (3, 1), (9, 3), (3, 1)):
        assert create_attention("sqa", 8 * heads, heads, pattern="self").num_heads == queries
    assert [r.getMessage().split("; ")[1] for r in caplog.records] == [
        "attention.reduction=3 instead, query heads: 1",
        "attention.reduction=3 instead, query heads: 3",
    ]
