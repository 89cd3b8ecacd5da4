"""Identities of the Aaren card."""

import torch
import torch.nn.functional as F
from variants import build, inputs

from zoo.attention import Pattern, create_attention


def test_causal_form_is_softmax_attention_with_a_repeated_query():
    module = build("aaren", Pattern.CAUSAL_SELF)
    (x,) = inputs(Pattern.CAUSAL_SELF, n=70)
    q, k, v = module.project(x, x, x)
    want = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(module.attend(q, k, v), want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(module.attend(q, k, v)[:, :, 0], v[:, :, 0])


def test_cross_is_one_softmax_pool_whatever_the_queries():
    module = build("aaren", Pattern.CROSS)
    x, context = inputs(Pattern.CROSS)
    q, k, v = module.project(x, context, context)
    want = F.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(module.attend(q, k, v), want, rtol=1e-4, atol=1e-5)
    assert torch.equal(module(x, context), module(2 * x + 1, context))


def test_two_directions_average_prefix_and_suffix():
    module = build("aaren", Pattern.SELF)
    (x,) = inputs(Pattern.SELF)
    weights = module.attention_map(x)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 2, 7))
    e = module._scores(module.project(x, x, x)[1])[0, 0].exp()
    want = 0.5 * torch.cat((e[:3] / e[:3].sum(), e[3:] / e[3:].sum()))
    torch.testing.assert_close(weights[0, 0, 2], want)


def test_state_is_constant_and_bias_weighs_keys():
    module = create_attention("aaren", 16, 2, pattern="causal_self")
    assert module.state_size(5) == module.state_size(5000) == 2 * (8 + 2)
    assert not hasattr(module, "qkv")
