"""Identities of the plain linear attention card."""

import pytest
import torch
from variants import inputs

from kernels import linear as kernel
from zoo.attention import Pattern, create_attention
from zoo.attention.slots import resolve_slots
from zoo.errors import CapabilityError, ConfigError
from zoo.models.registry import model_slots

# dpfp with one shift is left out: its features can all be zero, and such a row has no weights.
POSITIVE = ["elu1", "relu", "sqrelu", "exp", "softplus", "t2r", "dpfp2", "dpfp3"]


@pytest.mark.parametrize("feature", kernel.FEATURES)
def test_every_feature_map_runs_in_every_pattern(feature):
    for pattern in Pattern:
        if feature == "softmax" and pattern.causal:
            continue
        normalize = "none" if feature in ("silu", "identity") else "denom"
        module = create_attention("linear", 16, 2, pattern=pattern, feature=feature, normalize=normalize)
        y = module(*inputs(pattern))
        assert y.isfinite().all() and y.shape == (2, 7, 16)


@pytest.mark.parametrize("feature", [*POSITIVE, "softmax"])
def test_rows_sum_to_one(feature):
    module = create_attention("linear", 16, 2, pattern="self", feature=feature, eps=1e-9)
    weights = module.attention_map(*inputs(Pattern.SELF))
    assert weights.min() >= 0 and (weights.sum(-1) - 1).abs().max() < 1e-5


def test_length_of_the_query_is_lost():
    """The defect that MALA repairs."""
    q, k, v = (torch.randn(1, 2, 9, 8, dtype=torch.float64) for _ in range(3))
    read = lambda a: kernel.linear_attention(a * q.exp(), k.exp(), v, feature="identity", eps=1e-12)
    assert (read(1.0) - read(5.0)).abs().max() < 1e-10


@pytest.mark.parametrize("normalize", ["none", "rmsnorm", "groupnorm"])
def test_steps_equal_parallel_without_denominator(normalize):
    module = create_attention("linear", 16, 2, pattern="causal_self", normalize=normalize).eval()
    (x,) = inputs(Pattern.CAUSAL_SELF)
    state, rows = module.init_state(2), []
    for t in range(7):
        y, state = module.step(x[:, t : t + 1], state)
        rows.append(y)
    assert (torch.cat(rows, 1) - module(x)).abs().max() < 1e-5


def test_options_that_cannot_be():
    with pytest.raises(ConfigError, match="cannot be causal"):
        create_attention("linear", 16, 2, pattern="causal_self", feature="softmax")
    with pytest.raises(ConfigError, match="choose from"):
        create_attention("linear", 16, 2, pattern="self", feature="gelu")


@pytest.mark.parametrize("feature", kernel.FEATURES)
def test_what_is_declared_holds_for_the_feature(feature):
    """Log weights of keys (quadrature in tno) are refused where the model is made, signed maps are declared."""
    normalize = "none" if feature in ("silu", "identity") else "denom"
    wanted = {"name": "linear", "feature": feature, "normalize": normalize}
    module = create_attention("linear", 16, 2, pattern="self", feature=feature, normalize=normalize)
    (x,) = inputs(Pattern.SELF)
    assert module.capabilities.signed_map == bool(module.attention_map(x).min() < 0)
    bias = torch.zeros(1, 1, 1, 7)
    if feature in ("silu", "softmax"):
        for refused in (lambda: resolve_slots(model_slots("tno"), wanted), lambda: module(x, bias=bias)):
            with pytest.raises(
                CapabilityError, match=f"key bias .with attention.feature={feature}; .*: elu1, relu"
            ):
                refused()
    else:
        assert resolve_slots(model_slots("tno"), wanted)["encoder"].name == "linear"
        torch.testing.assert_close(module(x, bias=bias), module(x))
