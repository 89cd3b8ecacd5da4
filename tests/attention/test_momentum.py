"""Identities of the momentum card."""

import pytest
import torch
import torch.nn.functional as F
from variants import build, inputs

from zoo.attention import Grid, Pattern, create_attention
from zoo.errors import ConfigError


def fixed(pattern="self", gamma=0.5, **options):
    return create_attention("momentum", 16, 2, pattern=pattern, gamma=gamma, learnable=False, **options)


def test_without_leaning_it_is_softmax_attention():
    (x,) = inputs(Pattern.SELF)
    module = create_attention("momentum", 16, 2, pattern="self")
    q, k, v = module.project(x, x, x)
    torch.testing.assert_close(module.attend(q, k, v), F.scaled_dot_product_attention(q, k, v))


def test_leaning_is_the_filter_with_taps_one_plus_gamma_and_minus_gamma():
    x = torch.randn(1, 2, 9, 8)
    have = fixed()._lean(x, None, None)
    torch.testing.assert_close(have[:, :, 0], x[:, :, 0])
    torch.testing.assert_close(have[:, :, 1:], 1.5 * x[:, :, 1:] - 0.5 * x[:, :, :-1])
    constant = x[:, :, :1].expand_as(x)
    torch.testing.assert_close(fixed()._lean(constant, None, None), constant)
    both = fixed(difference="symmetric")._lean(x, None, None)
    torch.testing.assert_close(
        both[:, :, 1:-1], x[:, :, 1:-1] + 0.5 * (x[:, :, 1:-1] - 0.5 * (x[:, :, :-2] + x[:, :, 2:]))
    )


def test_grid_differences_are_the_average_of_rows_and_columns():
    x = torch.randn(1, 2, 7, 8)
    have = fixed()._lean(x, None, Grid((2, 3), 1))
    torch.testing.assert_close(have[:, :, 0], x[:, :, 0])
    image = x[:, :, 1:].unflatten(2, (2, 3))
    p = 0.5 * (2 * image[:, :, 1, 2] - image[:, :, 0, 2] - image[:, :, 1, 1])
    torch.testing.assert_close(have[:, :, 6], image[:, :, 1, 2] + 0.5 * p)


def test_padded_neighbours_are_not_read():
    module = fixed()
    x = torch.randn(1, 2, 6, 8)
    mask = torch.tensor([[True, True, False, True, True, False]])
    have = module._lean(x, mask, None)
    torch.testing.assert_close(have[:, :, 3], x[:, :, 3])
    torch.testing.assert_close(have[:, :, 4], 1.5 * x[:, :, 4] - 0.5 * x[:, :, 3])


@pytest.mark.parametrize("order", ["post", "pre"])
def test_steps_with_rotation(order):
    module = build("momentum", Pattern.CAUSAL_SELF, gamma=0.7, rope="1d", order=order)
    (x,) = inputs(Pattern.CAUSAL_SELF)
    state, rows = module.init_state(2), []
    for t in range(7):
        y, state = module.step(x[:, t : t + 1], state)
        rows.append(y)
    torch.testing.assert_close(torch.cat(rows, 1), module(x), rtol=1e-4, atol=1e-5)


def test_options_that_cannot_be():
    with pytest.raises(ConfigError, match="looks ahead"):
        fixed("causal_self", difference="symmetric")
    with pytest.raises(ConfigError, match="use rope=none"):
        fixed("cross", rope="1d")
