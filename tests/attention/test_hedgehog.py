"""Identities of the Hedgehog card."""

import copy

import pytest
import torch
from variants import build, inputs

from zoo.attention import Pattern, create_attention


@pytest.mark.parametrize("stable", [True, False])
def test_start_maps_are_the_identity_and_rows_sum_to_one(stable):
    module = create_attention("hedgehog", 16, 2, pattern="self", stable=stable)
    x = torch.randn(2, 2, 5, 8)
    both = torch.cat((x, -x), -1)
    torch.testing.assert_close(module.features_q(x), both.softmax(-1) if stable else both.exp())
    weights = module.attention_map(*inputs(Pattern.SELF))
    assert weights.min() > 0
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 2, 7), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("pattern", list(Pattern))
def test_distillation_pulls_the_maps_alone_towards_softmax(pattern):
    module = build("hedgehog", pattern)
    arguments = inputs(pattern)
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[0, 5:] = False
    mask[1] = False
    losses = []
    optimizer = torch.optim.Adam((p for n, p in module.named_parameters() if "features" in n), lr=0.02)
    for _ in range(60):
        loss = module.distillation_loss(*arguments, key_mask=mask)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0] and losses[-1] > 0
    touched = {n for n, p in module.named_parameters() if p.grad is not None}
    assert touched and all("features" in n for n in touched)


def test_distillation_is_zero_for_equal_rows():
    """Equal keys: softmax and every positive feature map give equal weights."""
    module = build("hedgehog", Pattern.CROSS)
    x, context = inputs(Pattern.CROSS)
    same = context[:, :1].expand_as(context)
    assert module.distillation_loss(x, same).abs() < 1e-4
    assert module.distillation_loss(x, context) > 1e-4


def test_auxiliary_loss_is_the_distillation_while_training():
    module = create_attention("hedgehog", 16, 2, pattern="self", distill_weight=2.0)
    (x,) = inputs(Pattern.SELF)
    module.train()(x)
    torch.testing.assert_close(module.auxiliary_loss(), 2 * module.distillation_loss(x))
    assert copy.deepcopy(module).auxiliary_loss() == 0  # the graph of a pass is no part of a copy
    module.eval()(x)
    assert module.auxiliary_loss() == 0
