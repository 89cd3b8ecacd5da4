"""Identities of the Based card."""

import pytest
import torch
import torch.nn.functional as F
from variants import build, inputs

from zoo.attention import Pattern, create_attention
from zoo.attention.based import feature_size, taylor2
from zoo.errors import ConfigError


def test_features_multiply_to_the_truncated_exponential():
    x, y = torch.randn(2, 50, 16, dtype=torch.float64)
    s = (x * y).sum(-1)
    torch.testing.assert_close((taylor2(x) * taylor2(y)).sum(-1), 1 + s + s * s / 2)
    assert taylor2(x).shape[-1] == feature_size(16) == 153
    assert (1 + s + s * s / 2).min() >= 0.5


@pytest.mark.parametrize("pattern", list(Pattern))
def test_state_form_equals_the_polynomial_of_scores(pattern):
    module = build("based", pattern, combine="taylor")
    arguments = inputs(pattern)
    keys = arguments[-1]
    q, k, v = module.project(arguments[0], keys, keys)
    torch.testing.assert_close(module.weights(q, k) @ v, module.attend(q, k, v), rtol=1e-4, atol=1e-5)


def test_wide_windows_are_full_softmax():
    for pattern in (Pattern.SELF, Pattern.CAUSAL_SELF):
        module = build("based", pattern, combine="window", window=64, rope="none")
        (x,) = inputs(pattern)
        q, k, v = module.project(x, x, x)
        want = F.scaled_dot_product_attention(q, k, v, is_causal=pattern.causal)
        torch.testing.assert_close(module.attend(q, k, v), want, rtol=1e-4, atol=1e-5)


def test_window_state_is_bounded_and_windows_forget():
    module = build("based", Pattern.CAUSAL_SELF, combine="window", window=3)
    assert module.state_size(10) == module.state_size(10_000)
    (x,) = inputs(Pattern.CAUSAL_SELF)
    changed = x.clone()
    changed[:, 0] += 1
    assert torch.equal(module(changed)[:, 3:], module(x)[:, 3:])
    state, rows = module.init_state(2), []
    for t in range(7):
        y, state = module.step(x[:, t : t + 1], state)
        rows.append(y)
    torch.testing.assert_close(torch.cat(rows, 1), module(x), rtol=1e-4, atol=1e-5)


def test_options_that_cannot_be():
    with pytest.raises(ConfigError, match="use combine=head"):
        create_attention("based", 16, 2, pattern="cross", combine="window")
    with pytest.raises(ConfigError, match="choose from head"):
        create_attention("based", 16, 2, pattern="self", combine="both")
