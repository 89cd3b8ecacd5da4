"""A transformer's step on Burgers' residual beside nested autograd and a plain step on the very same network.

2 blocks (encoder and decoder), width 32, 5 tokens a point, wavelet activations, 2,000 points, float32, no conditions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from zoo.bench.tasks import Contestants, training_step
from zoo.layers.derivatives import derivatives
from zoo.layers.jet_algebra import Operator
from zoo.layers.pieces import add_gradients, count_pieces
from zoo.models import create_model

POINTS, CHUNK = 2000, 1000
HEAT = Operator((((0, 1), 1.0), ((2, 0), -0.01 / math.pi)))
BOX = {"lower": [-1.0, 0.0], "upper": [1.0, 1.0]}


def contestants(attention: str) -> Contestants:
    """Taylor mode first; nested `torch.autograd.grad`; forward and backward of the bare output."""
    draw = torch.Generator().manual_seed(0)
    points = torch.rand(POINTS, 2, generator=draw) * torch.tensor([2.0, 1.0]) - torch.tensor([1.0, 0.0])
    plain, nested = network(attention), network(attention)
    return {
        f"zoo physicsformer ({attention}), Taylor mode": residual_step(network(attention), points),
        "same network, nested autograd": training_step(
            nested, lambda: burgers_loss(nested, points, "reverse")
        ),
        "same network, plain forward + backward": training_step(plain, lambda: plain(points).square().mean()),
    }


def network(attention: str) -> nn.Module:
    """The transformer, the same weights each time."""
    torch.manual_seed(0)
    size = {"dim": 32, "heads": 2, "tokens": 5, "hidden": [64], "head": [64], "act": "wavelet"}
    return create_model("physicsformer", attention=attention, **size, **BOX)


def burgers_loss(model: nn.Module, points: Tensor, method: str = "taylor") -> Tensor:
    """Sum of squared residuals of u_t + u u_x = u_xx / (100 pi) over `POINTS`."""
    d = derivatives(model, points, [(1, 0), HEAT], method)
    residual = d[HEAT] + d[(0, 0)] * d[(1, 0)]
    return residual.square().sum() / POINTS


def residual_step(
    model: nn.Module, points: Tensor, chunk: int = CHUNK, side_by_side: bool = True
) -> Callable[[], None]:
    """zero_grad, residual in Taylor mode and its gradient in the weights, Adam; as `task=pinn task.first=adam` does."""
    parameters = list(model.parameters())
    optimizer = torch.optim.Adam(parameters, lr=1e-3, fused=True)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        count = count_pieces(POINTS, chunk, side_by_side=side_by_side)
        pieces = [partial(burgers_loss, model, part) for part in points.tensor_split(count)]
        add_gradients(pieces, parameters)
        optimizer.step()

    return step
