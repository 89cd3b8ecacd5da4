"""MoH: multi-head attention where every head is chosen, its gates, its balance loss and the heads left out."""

import pytest
import torch
from variants import PATTERNS

from kernels import softmax as kernel
from zoo.attention import create_attention


def moh(pattern="self", heads=8, **options):
    return create_attention("moh", 32, heads, pattern=pattern, **options).double().eval()


@pytest.mark.parametrize(
    "options", [{"shared_heads": 0, "active_heads": 8}, {"shared_heads": 8}, {"active_heads": 4}]
)
def test_even_routers_with_every_head_equal_multi_head_attention(options):
    module = moh(**options)
    for router in (module.route_shared, module.route, module.route_kind):
        if router is not None:
            torch.nn.init.zeros_(router.weight)
    x = torch.randn(2, 9, 32, dtype=torch.float64)
    gates, _ = module.gates(x)
    assert (gates - 1).abs().max() < 1e-12
    q, k, v = module.project(x, x, x)
    want = module.output(kernel.attention(q, k, v), x)
    assert (module(x) - want).abs().max() < 1e-10


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("extra", ["none", "mask+bias"])
def test_heads_left_out_are_not_computed_and_it_makes_no_difference(pattern, extra, monkeypatch):
    from zoo.attention import moh as file

    module = moh(pattern, shared_heads=2, active_heads=2)
    x, context = torch.randn(2, 24, 32, dtype=torch.float64), torch.randn(2, 24, 32, dtype=torch.float64)
    arguments = (x, context) if module.pattern.cross else (x,)
    call = {}
    if extra != "none":
        mask = torch.ones(2, 24, dtype=torch.bool)
        mask[0, 20:] = False
        call = {"key_mask": mask, "bias": torch.randn(1, 8, 24, 24, dtype=torch.float64)}
    rows = []
    whole = kernel.attention
    monkeypatch.setattr(
        file.kernel,
        "attention",
        lambda q, *a, **o: rows.append(q.shape[0] * q.shape[1] * q.shape[2]) or whole(q, *a, **o),
    )
    monkeypatch.setattr(file, "COMPACT_BELOW", 1.0)
    compact = module(*arguments, **call)
    few = sum(rows)
    rows.clear()
    monkeypatch.setattr(file, "COMPACT_BELOW", -1.0)
    dense = module(*arguments, **call)
    assert (compact - dense).abs().max() < 1e-10
    assert few < 0.85 * sum(rows)  # 2 shared + 2 of 6 routed heads, and the longest list decides


def test_moh_gate_arithmetic():
    x = torch.randn(3, 10, 32, dtype=torch.float64)
    module = moh(shared_heads=3, active_heads=2)
    gates, index = module.gates(x)
    kind = 2 * module.route_kind(x).softmax(-1)
    assert (gates[:, 3:].sum(1) / kind[..., 1] - 2).abs().max() < 1e-10  # routed gates sum to k
    assert (gates[:, :3].sum(1) / kind[..., 0] - 3).abs().max() < 1e-10
    assert ((gates[:, 3:] > 0).sum(1) == 2).all()
    best = module.route(x).topk(2, -1).indices.sort(-1).values
    assert torch.equal(index.sort(-1).values, best)
    paper = moh(shared_heads=3, active_heads=2, gating="paper")
    paper.load_state_dict(module.state_dict())
    plain, _ = paper.gates(x)
    alpha, prob = module.route_kind(x).softmax(-1), module.route(x).softmax(-1)
    chosen = torch.zeros_like(prob).scatter(-1, best, 1.0)
    assert (plain[:, 3:].transpose(1, 2) - alpha[..., 1:] * prob * chosen).abs().max() < 1e-12


def test_moh_balance_loss_is_k_when_balanced_and_steers_the_router():
    module = moh(shared_heads=2, active_heads=2).train()
    x = torch.randn(4, 12, 32, dtype=torch.float64)
    prob = torch.full((4, 12, 6), 1 / 6, dtype=torch.float64)
    chosen = torch.zeros_like(prob)
    for t in range(12):
        chosen[:, t, [(2 * t) % 6, (2 * t + 1) % 6]] = 1.0
    assert (module._load(prob, chosen, None) - 2).abs() < 1e-12
    module(x)
    loss = module.auxiliary_loss()
    loss.backward()
    assert loss > 0 and module.route.weight.grad.abs().max() > 0
    mask = torch.ones(4, 12, dtype=torch.bool)
    mask[:, 6:] = False
    module(x, key_mask=mask)
    half = module.auxiliary_loss()
    module(x[:, :6])
    assert (half - module.auxiliary_loss()).abs() < 1e-12
    assert module.__getstate__()["_balance"] is None
    module.eval()(x)
    assert module.auxiliary_loss() == 0  # and the graph of the training pass is gone


def test_unselected_heads_get_no_gradient_from_a_token():
    module = moh(shared_heads=2, active_heads=2)
    x = torch.randn(1, 6, 32, dtype=torch.float64)
    q, k, v = module.project(x, x, x)
    q = q.detach().requires_grad_()
    gates, index = module.gates(x)
    module._gated(q, k, v, gates, index).square().sum().backward()
    off = gates == 0
    assert q.grad[off].abs().max() == 0 and q.grad[~off].abs().min(-1).values.max() > 0
