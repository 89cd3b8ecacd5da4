"""Identities of the recurrent view of softmax attention."""

import math

import pytest
import torch
import torch.nn.functional as F
from variants import build, inputs

from zoo.attention import Pattern, create_attention
from zoo.errors import CapabilityError, ConfigError


def run(pattern=Pattern.CAUSAL_SELF, scale=1.0, **options):
    module = create_attention("softmax_rnn", 16, 2, pattern=pattern, **options)
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 2, 9, 8, generator=g) for _ in range(3))
    return module.attend(scale * q, k, v), (scale * q, k, v)


def test_exponential_and_denominator_are_softmax_attention():
    have, qkv = run(norm="softmax")
    torch.testing.assert_close(have, F.scaled_dot_product_attention(*qkv, is_causal=True))


@pytest.mark.parametrize("order", [2, 4, 6, 8])
def test_series_converge_to_softmax(order):
    have, (q, k, v) = run(function="taylor", order=order, norm="softmax", scale=0.5)
    largest = float((q @ k.mT).abs().max()) * 8**-0.5
    bound = largest ** (order + 1) * math.exp(largest) / math.factorial(order + 1)
    want = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    # Numerator and denominator are each off by at most the bound per key; the denominator is at least e^-largest per key.
    assert (have - want).abs().max() <= 2 * bound * math.exp(largest) * v.abs().max()


@pytest.mark.parametrize("norm", ["l2", "rms"])
def test_norms_have_their_size_and_ignore_constants_in_the_scores(norm):
    module = create_attention("softmax_rnn", 16, 2, pattern="self", norm=norm, gain=False)
    q, k, v = (torch.randn(2, 2, 9, 8) for _ in range(3))
    out = module.attend(q, k, v)
    size = out.norm(dim=-1) if norm == "l2" else out.square().mean(-1).sqrt()
    torch.testing.assert_close(size, torch.ones_like(size), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(
        module.attend(q, k, v, bias=torch.randn(2, 2, 9, 1)), out, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("norm", ["l2", "rms", "gate", "none"])
@pytest.mark.parametrize("function", ["exp", "taylor", "identity"])
def test_every_combination_steps_and_masks(function, norm):
    module = build("softmax_rnn", Pattern.CAUSAL_SELF, function=function, order=3, norm=norm)
    (x,) = inputs(Pattern.CAUSAL_SELF)
    state, rows = module.init_state(2), []
    for t in range(7):
        y, state = module.step(x[:, t : t + 1], state)
        rows.append(y)
    torch.testing.assert_close(torch.cat(rows, 1), module(x), rtol=1e-3, atol=1e-4)
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[:, 5:] = False
    torch.testing.assert_close(module(x, key_mask=mask)[:, :5], module(x[:, :5]), rtol=1e-4, atol=1e-5)


def test_none_is_the_sum_itself():
    have, (q, k, v) = run(Pattern.SELF, norm="none")
    torch.testing.assert_close(have, ((q @ k.mT) * 8**-0.5).exp() @ v, rtol=1e-4, atol=1e-4)


def test_options_that_cannot_be():
    with pytest.raises(ConfigError, match="even order"):
        create_attention("softmax_rnn", 16, 2, pattern="self", function="taylor", order=3, norm="softmax")
    with pytest.raises(ConfigError, match="choose from exp"):
        create_attention("softmax_rnn", 16, 2, pattern="self", function="relu")
    module = create_attention("softmax_rnn", 16, 2, pattern="self", function="taylor")
    with pytest.raises(CapabilityError, match="function=exp"):
        module(torch.randn(1, 3, 16), bias=torch.zeros(1, 1, 3, 3))
