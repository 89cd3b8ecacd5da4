"""Identities of the MALA card."""

import pytest
import torch
import torch.nn.functional as F
from variants import build, inputs

from kernels import linear as kernel
from zoo.attention import Grid, Pattern, create_attention
from zoo.errors import ConfigError


def qkv(n=12, m=12, d=8, seed=0):
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(2, 2, s, d, generator=g, dtype=torch.float64) for s in (n, m, m))


def pure(pattern="self", **options):
    return create_attention(
        "mala", 16, 2, pattern=pattern, rope="none", lepe="none", gate=False, **options
    ).double()


@pytest.mark.parametrize("key_norm", ["mean", "sum"])
def test_rows_sum_to_one_without_rope(key_norm):
    q, k, _ = qkv()
    weights = pure(key_norm=key_norm).weights(q, k)
    assert (weights.sum(-1) - 1).abs().max() < 1e-4  # eps 1e-6 over z
    assert weights.min() < 0


def test_equals_linear_attention_plus_centred_term():
    q, k, v = qkv()
    phi_q, phi_k = F.elu(q) + 1, F.elu(k) + 1
    s = (phi_q @ phi_k.mT) * 8**-0.5
    linear = s / s.sum(-1, keepdim=True) @ v
    centred = ((s - s.mean(-1, keepdim=True)) @ v) / 12
    assert (pure(eps=1e-12).attend(q, k, v) - linear - centred).abs().max() < 1e-9


def test_official_formula_step_by_step():
    q, k, v = qkv()
    c, n = 8**-0.5, 12
    phi_q, phi_k = F.elu(q) + 1, F.elu(k) + 1
    z = c * (phi_q * phi_k.mean(-2, keepdim=True)).sum(-1, keepdim=True)
    a = (c / n) * phi_k.mT @ v
    expected = (1 + 1 / (z + 1e-6)) * (phi_q @ a) - z * v.mean(-2, keepdim=True)
    assert (pure().attend(q, k, v) - expected).abs().max() < 1e-9


def test_magnitude_scales_the_centred_part_alone():
    q, k, v = qkv()
    phi_q, phi_k = F.elu(q) + 1, F.elu(k) + 1
    read = lambda scale: kernel.mala(scale * phi_q, phi_k, v, feature="identity", eps=1e-12)
    linear = kernel.linear_attention(phi_q, phi_k, v, feature="identity", eps=1e-12)
    assert ((read(3.0) - linear) - 3 * (read(1.0) - linear)).abs().max() < 1e-8


def test_cross_with_itself_equals_self_and_last_causal_row_equals_it():
    q, k, v = qkv()
    whole = pure().attend(q, k, v)
    assert torch.equal(pure("cross").attend(q, k, v), whole)
    assert (pure("causal_self").attend(q, k, v)[:, :, -1] - whole[:, :, -1]).abs().max() < 1e-10


def test_layer_equals_its_convolutional_form():
    """1x1 convolutions over the image, 5x5 depthwise LePE and rotation of both axes, as released weights have them."""
    h, w, c = 4, 6, 16
    module = create_attention("mala", c, 2, pattern="self", grid=Grid((h, w))).double()
    x = torch.randn(2, h * w, c, dtype=torch.float64)
    image = x.mT.unflatten(-1, (h, w))
    weight = torch.cat((module.qkv.weight, module.gate.weight))[..., None, None]
    bias = torch.cat((module.qkv.bias, module.gate.bias))
    q, k, v, u = F.conv2d(image, weight, bias).chunk(4, 1)
    lepe = F.conv2d(v, module.lepe.weight, module.lepe.bias, padding=2, groups=c)
    heads = lambda t: t.flatten(2).unflatten(1, (2, 8)).mT
    o = module.attend(heads(q), heads(k), heads(v), grid=Grid((h, w)))
    o = o.mT.flatten(1, 2).unflatten(-1, (h, w))
    y = F.conv2d((o + lepe) * u, module.proj.weight[..., None, None], module.proj.bias)
    assert (y.flatten(2).mT - module(x)).abs().max() < 1e-10


def test_rotation_follows_rows_and_columns():
    """Interleaved pairs; the first half of the channels turns with the row, the second with the column."""
    module = create_attention("mala", 8, 1, pattern="self", grid=Grid((3, 2)), lepe="none", gate=False)
    angles = module._angles(6, Grid((3, 2)), torch.device("cpu"))
    rows, columns = torch.tensor([0, 0, 1, 1, 2, 2.0]), torch.tensor([0, 1, 0, 1, 0, 1.0])
    frequencies = 10000.0 ** -torch.linspace(0, 1, 2)
    expected = torch.cat((rows[:, None] * frequencies, columns[:, None] * frequencies), -1)
    assert torch.allclose(angles, expected)


def test_prefix_tokens_have_neither_place_nor_lepe():
    module = build("mala", Pattern.SELF, m=7, grid=Grid((2, 3), 1))
    (x,) = inputs(Pattern.SELF)
    heads = module.mix(x, x, x, key_mask=None, bias=None, grid=Grid((2, 3), 1), positions=None)
    q, k, v = module.project(x, x, x)
    assert torch.equal(heads[:, :, 0], module.attend(q, k, v, grid=Grid((2, 3), 1))[:, :, 0])


def test_options_that_cannot_be():
    with pytest.raises(ConfigError, match="2-D grid"):
        create_attention("mala", 16, 2, pattern="self", rope="2d")
    with pytest.raises(ConfigError, match="divisible by 4"):
        create_attention("mala", 12, 2, pattern="self", rope="2d", grid=Grid((2, 2)))
    with pytest.raises(ConfigError, match="ordered"):
        create_attention("mala", 16, 2, pattern="cross", rope="1d")
