"""Muon: both of its halves against PyTorch's optimisers, which weights count as hidden, state, resume."""

import io

import pytest
import torch
from torch import nn

from tasks.base import ZooTask, parameter_groups
from tasks.optimizers.muon import Muon, orthogonal, split_matrices
from tests.commands import logged, run
from zoo.attention.slots import resolve_slots
from zoo.errors import ConfigError
from zoo.models.registry import build_model, get_model


def params():
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(s)) for s in ((12, 8), (12, 8), (8, 12), (8, 4, 3), (5,))]


def steps(optimizer, weights, count, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        for p in weights:
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()
    return [p.detach().clone() for p in weights]


def test_matrices_move_as_in_torch():
    ours, theirs = params()[:3], params()[:3]
    options = {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.1}
    peer = torch.optim.Muon(theirs, adjust_lr_fn="match_rms_adamw", **options)
    found = steps(Muon([{"params": ours, "matrix": True}], **options), ours, 4)
    for a, b, start in zip(found, steps(peer, theirs, 4), params(), strict=False):
        # The iteration amplifies bfloat16's rounding, and ours may run in float32.
        assert (a - b).norm() < 0.05 * (b - start.detach()).norm()


def test_the_rest_moves_as_with_adamw():
    ours, theirs = params(), params()
    options = {"lr": 0.02, "betas": (0.8, 0.95), "weight_decay": 0.1}
    expected = steps(torch.optim.AdamW(theirs, fused=True, **options), theirs, 4)
    for a, b in zip(steps(Muon(ours, **options), ours, 4), expected, strict=True):
        torch.testing.assert_close(a, b, atol=0, rtol=0)


def test_steps_are_orthogonal_and_as_large_as_adamws():
    x = torch.randn(3, 16, 40)
    values = torch.linalg.svdvals(orthogonal(x).float())
    assert float(values.min()) > 0.6 and float(values.max()) < 1.3
    weights = params()[3:4]  # a kernel: [8, 4, 3] is the matrix [8, 12]
    moved = steps(Muon([{"params": weights, "matrix": True}], lr=1.0, weight_decay=0.0), weights, 1)[0]
    assert float((moved - params()[3].detach()).square().mean().sqrt()) == pytest.approx(0.2, rel=0.2)


def test_hidden_layers_alone_are_matrices():
    options = {"vocab_size": 15, "dim": 32, "num_heads": 2, "encoder_layers": 1, "decoder_layers": 1}
    model = build_model(
        "aed", resolve_slots(get_model("aed").slots(**options), {"name": "softmax"}), **options
    )
    groups = split_matrices(parameter_groups(model, 0.1), model, 0.5)
    names = {id(p): n for n, p in model.named_parameters()}
    hidden = {names[id(p)] for g in groups if g["matrix"] for p in g["params"]}
    rest = {names[id(p)] for g in groups if not g["matrix"] for p in g["params"]}
    assert hidden | rest == set(names.values()) and not hidden & rest
    assert {"stem.layers.1.weight", "stem.out.weight", "encoder.0.mlp1.fc1.weight"} <= hidden
    assert {"ctc_head.weight", "embedding.weight", "encoder.0.conv.depthwise.weight"} <= rest
    assert all(n.endswith("weight") for n in hidden) and all(
        g["weight_decay"] == 0.1 for g in groups if g["matrix"]
    )


def test_a_stored_state_goes_on_exactly():
    weights = params()
    groups = [{"params": weights[:4], "matrix": True}, {"params": weights[4:], "matrix": False}]
    optimizer = Muon(groups, lr=0.02)
    steps(optimizer, weights, 3)
    file = io.BytesIO()
    torch.save((optimizer.state_dict(), weights), file)
    expected = steps(optimizer, weights, 3, seed=2)
    file.seek(0)
    state, again = torch.load(file)
    fresh = Muon([{"params": again[:4], "matrix": True}, {"params": again[4:]}], lr=0.5)
    fresh.load_state_dict(state)
    for a, b in zip(steps(fresh, again, 3, seed=2), expected, strict=True):
        assert torch.equal(a, b)


def test_a_resumed_run_is_on_the_same_curve(tmp_path):
    small = ["data=digits", "model.patch_size=2", "model.dim=16", "model.num_heads=2", "model.depth=1"]
    small += [
        "task.optimizer=muon",
        "task.muon_lr=2e-2",
        "task.schedule=constant",
        "callbacks.progress=lines",
    ]
    folders = [tmp_path / "whole", tmp_path / "cut"]
    for folder, epochs in zip(folders, (2, 1), strict=True):
        assert (
            run(*small, f"trainer.max_epochs={epochs}", "task.warmup_fraction=0", f"hydra.run.dir={folder}")
            == 0
        )
    assert run(f"resume={folders[1]}", "trainer.max_epochs=2") == 0
    curves = [logged(folder) for folder in folders]
    assert curves[0] == curves[1] and len(curves[0]) > 20


def test_an_unknown_optimiser_is_named():
    with pytest.raises(ConfigError, match=r"task.optimizer='moun': choose adamw or muon"):
        ZooTask(nn.Linear(2, 2), None, optimizer="moun")
    with pytest.raises(ConfigError, match=r"task.muon_lr=0 must be positive"):
        ZooTask(nn.Linear(2, 2), None, optimizer="muon", muon_lr=0)
