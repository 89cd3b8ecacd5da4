"""FlashBias: its factors equal the dense bias that they stand for."""

import pytest
import torch
from variants import PATTERNS, build, inputs, make, qkv

from kernels import softmax as kernel
from zoo.attention import Grid, Pattern, create_attention
from zoo.attention.base import BiasFactors
from zoo.attention.flash_bias import factorize
from zoo.errors import CapabilityError


@pytest.mark.parametrize("pattern", PATTERNS)
def test_factors_equal_the_dense_bias(pattern):
    module = make("flash_bias", pattern, factors="none")
    q, k, v = qkv()
    factors = BiasFactors(torch.randn(2, 4, 11, 3).double(), torch.randn(1, 4, 11, 3).double())
    have = module.attend(q * 6**-0.5, k, v, bias=factors)
    assert (have - kernel.attention(q, k, v, bias=factors.dense(), causal=module.causal)).abs().max() < 1e-12
    turn = torch.randn(3, 3).double() + 3 * torch.eye(3).double()
    other = BiasFactors(factors.query @ turn, factors.key @ torch.linalg.inv(turn).mT)
    assert (module.attend(q * 6**-0.5, k, v, bias=other) - have).abs().max() < 1e-10
    assert (
        module.attend(q * 6**-0.5, k, v) - kernel.attention(q, k, v, causal=module.causal)
    ).abs().max() < 1e-12


def dense_of(module, x, grid=None):
    phi_q, phi_k = module._phi(x, x, 0, grid)
    return phi_q @ phi_k.mT


def test_exact_factors_equal_their_formulas():
    x = torch.randn(1, 12, 24, dtype=torch.float64)
    i = torch.arange(12).double()
    alibi = make("flash_bias", "causal_self", factors="alibi")
    slope = torch.nn.functional.softplus(alibi.slope)[:, None, None]
    assert (dense_of(alibi, x)[0] - slope * (i - i[:, None]) / 64).abs().max() < 1e-12
    line = make("flash_bias", factors="distance")
    p = 2 * i / 11 - 1
    assert (
        dense_of(line, x)[0] + torch.nn.functional.softplus(line.slope)[:, None, None] * (p - p[:, None]) ** 2
    ).abs().max() < 1e-12
    grid = Grid((3, 4))
    plane = make("flash_bias", factors="distance", grid=grid)
    rows, cols = i.div(4, rounding_mode="floor") - 1, 2 * (i % 4) / 3 - 1
    square = (rows - rows[:, None]) ** 2 + (cols - cols[:, None]) ** 2
    assert (
        dense_of(plane, x, grid)[0] + torch.nn.functional.softplus(plane.slope)[:, None, None] * square
    ).abs().max() < 1e-12
    assert plane.rank == 4 and line.rank == 3
    other = {"grid": Grid((2, 6))}  # a picture of another shape than the module was built for
    mixed = plane.attention_map(x, **other) @ plane.project(x, x, x)[2]
    torch.testing.assert_close(plane.output(mixed, x), plane(x, **other))
    wave = make("flash_bias", factors="cosine", rank=4)
    torch.nn.init.normal_(wave.slope)
    angle = wave.frequency * (p[:, None] - p)[..., None]
    assert (dense_of(wave, x)[0] - (wave.slope[:, None, None] * angle.cos()).sum(-1)).abs().max() < 1e-10


@pytest.mark.parametrize("factors", ["distance", "cosine"])
def test_places_of_a_padded_sequence_end_with_its_last_token(factors):
    module = build("flash_bias", Pattern.SELF, factors=factors)
    x, mask = torch.randn(3, 14, 16), torch.ones(3, 14, dtype=torch.bool)
    mask[0, 9:] = mask[1, 1:] = False
    whole, map_ = module(x, key_mask=mask), module.attention_map(x, key_mask=mask)
    for b, length in enumerate((9, 1, 14)):
        alone = x[b : b + 1, :length]
        torch.testing.assert_close(whole[b : b + 1, :length], module(alone), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(map_[b : b + 1, :, :length, :length], module.attention_map(alone))


def test_learned_factors_start_without_bias_and_learn():
    module = create_attention("flash_bias", 24, 4, pattern="self").double()
    x = torch.randn(2, 7, 24, dtype=torch.float64)
    q, k, v = super(type(module), module).project(x, x, x)
    assert (module(x) - module.output(kernel.attention(q, k, v), x)).abs().max() < 1e-12
    module(x).square().sum().backward()
    assert module.factor_q.down.weight.grad.abs().max() > 0


def test_factorize_keeps_the_energy():
    table = torch.randn(3, 20, 4) @ torch.randn(3, 4, 20) + 1e-4 * torch.randn(3, 20, 20)
    factors = factorize(table)
    assert factors.query.shape[-1] <= 4
    assert (factorize(table, rank=4).dense() - table).norm() < 1e-2 * table.norm()
    error = (factors.dense() - table).square().sum((1, 2)) / table.square().sum((1, 2))
    assert error.max() <= 0.005 + 1e-6


def test_infinite_key_bias_and_decoding_of_places():
    module = make("flash_bias", factors="none")
    q, k, v = qkv()
    hide = torch.zeros(1, 1, 1, 11).double()
    hide[..., 4] = -torch.inf
    assert (
        module.attend(q * 6**-0.5, k, v, bias=hide) - kernel.attention(q, k, v, bias=hide)
    ).abs().max() < 1e-12
    for factors in ("alibi", "distance", "cosine"):
        causal = build("flash_bias", Pattern.CAUSAL_SELF, factors=factors)
        (x,) = inputs(Pattern.CAUSAL_SELF)
        state, rows = causal.init_state(2), []
        with torch.no_grad():
            for t in range(7):
                y, state = causal.step(x[:, t : t + 1], state)
                rows.append(y)
            assert (torch.cat(rows, 1) - causal(x)).abs().max() < 1e-5
    with pytest.raises(CapabilityError, match="full rank"):
        make("flash_bias", factors="alibi")
    with pytest.raises(CapabilityError, match="ordered"):
        make("flash_bias", "cross", factors="distance")
