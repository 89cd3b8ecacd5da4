"""The perceptron control's step on Burgers' residual beside DeepXDE's at equal configuration: 2-32-32-32-32-1, tanh."""

from __future__ import annotations

import math
import os

import torch

from zoo.bench.peers_pinn import BOX, POINTS, residual_step
from zoo.bench.tasks import Contestants
from zoo.models import create_model


def contestants(attention: str) -> Contestants:
    """2,000 points of [-1, 1] x [0, 1], float32, Adam without conditions; the perceptron has no attention."""
    os.environ.setdefault("DDE_BACKEND", "pytorch")
    import deepxde as dde

    def residual(x: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        u_x = dde.grad.jacobian(u, x, i=0, j=0)
        u_t = dde.grad.jacobian(u, x, i=0, j=1)
        return u_t + u * u_x - 0.01 / math.pi * dde.grad.hessian(u, x, i=0, j=0)

    box = dde.geometry.GeometryXTime(dde.geometry.Interval(-1, 1), dde.geometry.TimeDomain(0, 1))
    data = dde.data.TimePDE(box, residual, [], num_domain=POINTS)
    peer = dde.Model(data, dde.nn.FNN([2, 32, 32, 32, 32, 1], "tanh", "Glorot uniform"))
    peer.compile("adam", lr=1e-3, verbose=0)
    points, truth, extra = data.train_next_batch()
    torch.manual_seed(0)
    mine = create_model("pinn_mlp", dim=32, depth=4, **BOX)
    at = torch.as_tensor(points, dtype=torch.float32)
    return {
        "zoo pinn_mlp": residual_step(mine, at, POINTS, side_by_side=False),
        "deepxde FNN": lambda: peer.train_step(points, truth, extra),
    }
