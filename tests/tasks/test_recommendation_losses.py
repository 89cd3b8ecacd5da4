"""The blocked softmax loss and the sampled ones against plain formulas."""

import math

import pytest
import torch
import torch.nn.functional as F

import zoo.layers.item_losses as losses


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("block", [1, 40, 1 << 19])
def test_full_softmax_equals_cross_entropy(
    monkeypatch: pytest.MonkeyPatch, block: int, smoothing: float
) -> None:
    monkeypatch.setattr(losses, "BLOCK_ELEMENTS", block)
    inputs = [
        torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((7, 5), (11, 5), (11,))
    ]
    with torch.no_grad():
        inputs[0].mul_(30)  # logits of a hundred: exp of them overflows float32
    targets = torch.tensor([0, 10, 3, 3, 3, 7, 1])
    users, table, bias = inputs
    expected = F.cross_entropy(users @ table.T + bias, targets, label_smoothing=smoothing)
    wanted = torch.autograd.grad(3 * expected, inputs)
    value = losses.full_softmax_loss(users, table, bias, targets, smoothing)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(torch.autograd.grad(3 * value, inputs), wanted)


def test_autocast_leaves_the_full_softmax_in_single_precision() -> None:
    users = torch.randn(7, 5).bfloat16()
    table, bias = torch.randn(11, 5, requires_grad=True), torch.zeros(11)
    targets = torch.arange(7)
    wanted = losses.full_softmax_loss(users.float(), table, bias, targets)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = losses.full_softmax_loss(users, table, bias, targets)
    assert value == wanted
    assert torch.equal(*(torch.autograd.grad(v, table)[0] for v in (value, wanted)))


def test_full_softmax_without_rows_is_zero() -> None:
    users = torch.zeros(0, 4, requires_grad=True)
    loss = losses.full_softmax_loss(
        users, torch.randn(3, 4), torch.zeros(3), torch.zeros(0, dtype=torch.long)
    )
    loss.backward()
    assert loss == 0 and users.grad.shape == (0, 4)


def test_sampled_softmax_estimates_the_full_one() -> None:
    torch.manual_seed(0)
    users, table, bias = torch.randn(6, 8), torch.randn(50, 8) * 0.3, torch.randn(50) * 0.1
    targets = torch.arange(6)
    weight = torch.arange(1.0, 51)
    log_probability = (weight / weight.sum()).log()
    drawn = torch.multinomial(weight, 200_000, replacement=True)
    estimate = losses.sampled_softmax_loss(users, table, bias, targets, drawn, log_probability)
    full = F.cross_entropy(users @ table.T + bias, targets)
    assert abs(estimate - full) < 0.01


def test_sampled_softmax_ignores_the_target_among_the_negatives() -> None:
    users, table, bias = torch.randn(1, 4), torch.randn(3, 4), torch.zeros(3)
    log_probability = torch.full((3,), -math.log(3))
    target = torch.tensor([1])
    loss = losses.sampled_softmax_loss(users, table, bias, target, torch.tensor([1, 1]), log_probability)
    assert loss == 0


def test_binary_loss_is_two_log_losses() -> None:
    users, table, bias = torch.randn(4, 3), torch.randn(5, 3), torch.randn(5)
    right, wrong = torch.tensor([0, 1, 2, 3]), torch.tensor([4, 4, 0, 3])
    score = users @ table.T + bias
    rows = torch.arange(4)
    expected = -F.logsigmoid(score[rows, right]).mean() - F.logsigmoid(-score[rows, wrong])[:3].mean()
    torch.testing.assert_close(losses.binary_loss(users, table, bias, right, wrong), expected)
