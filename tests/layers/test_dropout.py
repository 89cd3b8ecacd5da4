"""The fast dropout against the definition of dropout."""

import math

import pytest
import torch
from torch import nn

from zoo.dropout import SMALL, FastDropout, dropout_mask


@pytest.mark.parametrize("p", [0.01, 0.2, 0.5, 0.9])
def test_rate_and_mean_are_those_of_dropout(p: float) -> None:
    count = 400_000
    mask = dropout_mask((count,), p, torch.float64)
    spread = math.sqrt(p * (1 - p) / count)
    assert abs((mask == 0).double().mean().item() - p) < 5 * spread + 2**-16
    assert set(mask.unique().tolist()) == {0.0, mask.max().item()}
    assert mask.max().item() == pytest.approx(1 / (1 - p), rel=2**-14)


def test_neighbours_are_independent() -> None:
    dropped = (dropout_mask((500_000,), 0.5) == 0).double() - 0.5
    for lag in (1, 2, 3, 4, 8, 64):  # four neighbours share one word of the generator
        assert abs((dropped[lag:] * dropped[:-lag]).mean().item()) < 5 * 0.25 / math.sqrt(500_000)


def test_seed_of_torch_decides_the_mask() -> None:
    layer, x = FastDropout(0.3), torch.randn(3, 41, 64)
    torch.manual_seed(5)
    first, second = layer(x), layer(x)
    torch.manual_seed(5)
    assert torch.equal(layer(x), first)
    assert not torch.equal(first, second)


def test_gradient_uses_the_mask_of_the_forward_pass() -> None:
    x = torch.randn(2, SMALL, requires_grad=True)
    y = FastDropout(0.4)(x)
    y.sum().backward()
    assert torch.equal(y == 0, x.grad == 0)
    torch.testing.assert_close(x.grad * x.detach(), y.detach())


@pytest.mark.parametrize("shape", [(3,), (1, 4097), (0, 5), (SMALL // 2, 3)])
def test_every_shape_and_eval_mode(shape: tuple[int, ...]) -> None:
    x, layer = torch.ones(shape), FastDropout(0.25)
    assert layer(x).shape == x.shape
    assert layer.eval()(x) is x
    assert isinstance(layer, nn.Dropout)
