"""Muon beside torch's own and AdamW."""

import copy

import pytest
import torch

from tasks.optimizers.muon import Muon, orthogonalise


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 5, 40), (1, 1, 6)])
def test_singular_values_become_one(shape):
    """The step keeps the directions of the matrix and makes them about equally long."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(0)) * 7
    u, _, v = torch.linalg.svd(x, full_matrices=False)
    inner = u.mT @ orthogonalise(x, iterations=8) @ v.mT
    values = inner.diagonal(dim1=1, dim2=2)
    assert 0.6 < float(values.min()) and float(values.max()) < 1.25
    torch.testing.assert_close(inner, torch.diag_embed(values), atol=1e-4, rtol=0)


def test_equals_torch_muon_and_adamw():
    """Matrices, tall and wide, move as torch.optim.Muon moves them, all else exactly as AdamW does."""
    torch.manual_seed(0)
    mine = torch.nn.Sequential(torch.nn.Linear(6, 20), torch.nn.Tanh(), torch.nn.Linear(20, 6))
    theirs = copy.deepcopy(mine)
    x, y = torch.randn(32, 6), torch.randn(32, 6)

    def split(model):
        matrices = [p for p in model.parameters() if p.ndim == 2]
        return matrices, [p for p in model.parameters() if p.ndim != 2]

    a, b = split(mine)
    options = {"lr": 1e-2, "weight_decay": 0.1}
    optimizers = [Muon([{"params": a, "orthogonal": True}, {"params": b}], **options)]
    a, b = split(theirs)
    others = [torch.optim.Muon(a, adjust_lr_fn="match_rms_adamw", **options), torch.optim.AdamW(b, **options)]
    for _ in range(4):
        for model, steps in ((mine, optimizers), (theirs, others)):
            model.zero_grad()
            (model(x) - y).square().mean().backward()
            for optimizer in steps:
                optimizer.step()
    for p, q in zip(mine.parameters(), theirs.parameters(), strict=True):
        # torch iterates in bfloat16: its steps of about 1e-2 are good to two digits.
        torch.testing.assert_close(p, q, atol=2e-3, rtol=0)


def test_state_survives_saving():
    """A run continued from its state takes the same steps."""
    torch.manual_seed(0)
    w, b = torch.nn.Parameter(torch.randn(4, 3)), torch.nn.Parameter(torch.randn(3))
    start = [w.detach().clone(), b.detach().clone()]

    def make(w, b):
        return Muon([{"params": [w], "orthogonal": True}, {"params": [b]}], lr=0.1)

    def steps(optimizer, w, b, count):
        for _ in range(count):
            optimizer.zero_grad()
            (w.square().sum() + (b * w.sum(0)).sum()).backward()
            optimizer.step()

    optimizer = make(w, b)
    steps(optimizer, w, b, 2)
    saved = copy.deepcopy(optimizer.state_dict())
    w2, b2 = (torch.nn.Parameter(p.detach().clone()) for p in (w, b))
    again = make(w2, b2)
    again.load_state_dict(saved)
    steps(optimizer, w, b, 3)
    steps(again, w2, b2, 3)
    assert torch.equal(w, w2) and torch.equal(b, b2)
    assert not torch.equal(w, start[0]) and not torch.equal(b, start[1])
