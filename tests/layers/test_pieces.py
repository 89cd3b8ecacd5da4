"""Pieces of a loss side by side: the same gradient as in one go, in the same order for any number of threads."""

import threading

import pytest
import torch

from zoo.layers.pieces import SMALLEST, add_gradients, count_pieces, each_gradient


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_pieces_add_up_to_the_whole(threads):
    net = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)).double()
    unused = torch.nn.Parameter(torch.ones(3))
    parameters, points, seen = [*net.parameters(), unused], torch.randn(7, 2, dtype=torch.float64), set()

    def piece(at):
        seen.add((threading.current_thread().name.startswith("pieces"), torch.get_num_threads()))
        return net(at).square().sum()

    expected = torch.autograd.grad(net(points).square().sum(), list(net.parameters()))
    for p, g in zip(net.parameters(), expected, strict=True):
        p.grad = g.clone()  # gradients are added to what is there
    values = add_gradients([lambda at=at: piece(at) for at in points.split(3)], parameters)
    assert seen == {(threads > 1, 1)} and torch.get_num_threads() == threads
    torch.testing.assert_close(sum(values), net(points).square().sum().detach())
    for p, g in zip(net.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, 2 * g)
    assert unused.grad is None


def test_factors_scale_gradients_and_not_values(threads):
    w = torch.tensor(3.0, requires_grad=True)
    factors = [torch.tensor(f) for f in (1.0, 10.0, -2.0)]
    found = list(each_gradient([lambda k=k: k * w * w for k in (1, 2, 3)], [w], factors))
    assert [float(v) for v, _ in found] == [9.0, 18.0, 27.0]
    assert [float(g) for _, (g,) in found] == [6.0, 120.0, -36.0]


def test_errors_of_a_piece_arrive(threads):
    def bad():
        raise ValueError("this piece")

    with pytest.raises(ValueError, match="this piece"):
        add_gradients([bad, bad], [torch.ones(1, requires_grad=True)])


def test_pieces_are_shared_among_threads(threads):
    assert count_pieces(3000, 1000) == {1: 3, 2: 4}[threads]
    assert count_pieces(2 * SMALLEST, 1000) == threads
    assert count_pieces(SMALLEST, 1000) == 1
    assert count_pieces(3000, 1000, "cuda") == count_pieces(3000, 1000, side_by_side=False) == 3
