"""Affine-scaled attention against its explicit matrix, softmax and the mean."""

import pytest
import torch
from variants import PATTERNS, make, qkv

from kernels import softmax as kernel


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("masked", [False, True])
def test_affine_equals_its_explicit_matrix(pattern, masked):
    module = make("affine", pattern)
    q, k, v = qkv(n=9, m=11) if module.pattern.cross else qkv()
    n = q.shape[2]
    mask = torch.ones(2, 11, dtype=torch.bool)
    if masked:
        mask[0, [1, 9]] = False
        mask[1] = False
    seen = mask[:, None, None].expand(2, 1, n, 11)
    if module.causal:
        seen = seen & (torch.arange(11) <= torch.arange(n)[:, None] + 11 - n)
    alpha = torch.rand(2, 4, n).double()
    module.average.uniform_()
    p = (q @ k.mT * 6**-0.5).masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(0.0)
    beta = (module.average[:, None] - alpha) / seen.sum(-1).clamp(min=1)
    weights = (alpha[..., None] * p + beta[..., None]) * seen
    have = module.attend(q, k, v, alpha=alpha, key_mask=mask if masked else None)
    assert (have - weights @ v).abs().max() < 1e-12
    full = seen.any(-1).expand(2, 4, n)
    assert (weights.sum(-1) - module.average[:, None])[full].abs().max() < 1e-12


def test_affine_reduces_to_softmax_and_to_the_mean():
    q, k, v = qkv()
    module = make("affine")
    module.average.fill_(1.0)
    assert (
        module.attend(q, k, v, alpha=torch.ones(2, 4, 11).double()) - kernel.attention(q, k, v)
    ).abs().max() < 1e-12
    module.average.fill_(0.7)
    mean = module.attend(q, k, v, alpha=torch.zeros(2, 4, 11).double())
    assert (mean - 0.7 * v.mean(2, keepdim=True)).abs().max() < 1e-12


def test_affine_average_moves_in_training_alone():
    module = make("affine", average_start=0.0, decay=0.9)
    x = torch.randn(2, 5, 24).double()
    module(x)
    assert module.average.abs().max() == 0
    module.train()(x, key_mask=torch.zeros(2, 5, dtype=torch.bool))
    assert module.average.abs().max() == 0  # nothing to see
    module(x).sum().backward()
    assert (module.average - 0.05).abs().max() < 1e-7  # 0.1 x the first alpha of a half
    assert "average" in module.state_dict()


def test_affine_average_is_over_the_tokens_of_all_processes(monkeypatch):
    """Another process with 30 tokens whose alphas are 0.9 each, beside 10 of a half here."""
    module = make("affine", average_start=0.0, decay=0.0).train()
    other = torch.tensor([27.0, 27.0, 27.0, 27.0, 30.0])
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda total: total.add_(other))
    module(torch.randn(2, 5, 24).double())
    assert (module.average - (27 + 5) / 40).abs().max() < 1e-6
