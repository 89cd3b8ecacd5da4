"""Second-order optimisers of the physics-informed task."""

import pytest
import torch

from tasks.optimizers.quasi_newton import QuasiNewton
from tasks.optimizers.soap import Soap
from tasks.optimizers.symmetric import ROWS, Update, multiply, scaled_identity


@pytest.mark.parametrize("second", ["ssbroyden", "bfgs", "lbfgs"])
def test_quasi_newton_minimises_rosenbrock(second):
    x = torch.tensor([-1.2, 1.0] * 5, dtype=torch.float64, requires_grad=True)
    optimizer = QuasiNewton([x], second)

    def closure():
        optimizer.zero_grad()
        loss = (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()
        loss.backward()
        return loss

    for _ in range(400):
        optimizer.step(closure)
        if optimizer.exit_reason:
            break
    assert (x.detach() - 1).abs().max() < 1e-6
    assert optimizer.exit_reason


def test_quasi_newton_survives_nan_and_keeps_the_best():
    x = torch.tensor([3.0], dtype=torch.float64, requires_grad=True)
    optimizer = QuasiNewton([x], "bfgs")

    def closure():
        optimizer.zero_grad()
        loss = (x - 1).square().sum() if float(x.detach()) > 2.5 else (x * float("nan")).sum()
        loss.backward()
        return loss

    for _ in range(60):
        optimizer.step(closure)
    assert torch.isfinite(x).all() and 2.5 < float(x.detach()) <= 3.0
    assert "line search" in optimizer.exit_reason or "tolerance" in optimizer.exit_reason


@pytest.mark.parametrize("size", [5, 64, 150])
def test_symmetric_blocks_equal_the_dense_matrix(size):
    x, factors = torch.randn(size, dtype=torch.float64), torch.randn(2, size, 2, dtype=torch.float64)
    core = torch.randn(2, 2, 2, dtype=torch.float64)
    core = core + core.mT
    blocks, dense = scaled_identity(x, 0.7), 0.7 * torch.eye(size, dtype=torch.float64)
    torch.testing.assert_close(multiply(blocks, x), dense @ x)
    for n in range(2):
        dense = 0.9 * dense + factors[n] @ core[n] @ factors[n].T
        torch.testing.assert_close(multiply(blocks, x, Update(0.9, factors[n], core[n])), dense @ x)
    assert sum(b.numel() for b in blocks) <= size * (size + ROWS) / 2


def test_soap_beats_adam_on_an_ill_conditioned_matrix():
    target = torch.randn(6, 6) * torch.logspace(0, -2, 6)
    mix = torch.randn(6, 6)
    losses = {}
    for cls, lr in ((Soap, 0.03), (torch.optim.Adam, 0.03)):
        w = torch.zeros(6, 6, requires_grad=True)
        optimizer = cls([w], lr=lr)
        for _ in range(300):
            optimizer.zero_grad()
            loss = (mix @ (w - target)).square().sum()
            loss.backward()
            optimizer.step()
        losses[cls] = float(loss.detach())
    assert losses[Soap] < losses[torch.optim.Adam]
