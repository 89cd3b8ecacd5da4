"""Sinks and the importance of heads, over the variants and on maps whose answer is known."""

import json
import math

import pytest
import torch
from torch import nn
from variants import CASES, build, cases, ids, inputs

from zoo.__main__ import main
from zoo.analysis import head_ablation, head_importance, sink_scores, sinks
from zoo.analysis.modules import gated
from zoo.attention import Pattern, create_attention
from zoo.errors import ConfigError


def over(values):
    return pytest.mark.parametrize(("name", "pattern"), values, ids=ids(values))


def mean_square(module):
    return lambda arguments: module(*arguments).square().sum((1, 2)).mean()


@over(CASES)
def test_importance_is_the_derivative_by_a_gate_on_each_head(name, pattern):
    module = build(name, pattern, dtype=torch.float64)
    arguments = inputs(pattern, b=1, dtype=torch.float64)
    loss, weights = mean_square(module), module.state_dict()
    found = head_importance(module, [arguments], loss)[""]
    assert "output" not in vars(module) and not module.training
    assert all(torch.equal(value, weights[key]) for key, value in module.state_dict().items())
    for head in range(module.num_heads):
        moved = []
        for step in (1e-4, -1e-4):
            gate = torch.ones(module.num_heads, 1, 1, dtype=torch.float64)
            gate[head] += step
            with gated({"": module}, lambda _, heads, gate=gate: heads * gate), torch.no_grad():
                moved.append(float(loss(arguments)))
        assert float(found[head]) == pytest.approx(abs(moved[0] - moved[1]) / 2e-4, rel=1e-4, abs=1e-8)


def test_importance_is_of_samples_and_ablation_is_removal():
    """Shares of samples must not cancel; without a head the projection reads zeros where it was."""
    module = build("softmax", Pattern.SELF)
    first, second = (inputs(Pattern.SELF, b=1, seed=s) for s in (2, 3))
    both = (torch.cat((first[0], second[0])),)
    direction = torch.tensor([1.0, -1.0])[:, None, None]  # the same head helps one sample and harms the other

    def loss(arguments):
        y = module(*arguments)
        return (y * (direction if len(y) == 2 else 1.0)).sum((1, 2)).mean()

    alone = [head_importance(module, [sample], loss)[""] for sample in (first, second)]
    torch.testing.assert_close(head_importance(module, [both], loss)[""], (alone[0] + alone[1]) / 2)
    torch.testing.assert_close(head_importance(module, [first, second], loss)[""], (alone[0] + alone[1]) / 2)

    rise, whole = head_ablation(module, [both], loss)[""], float(loss(both).detach())
    for head in range(2):
        kept = module.proj.weight.detach().clone()
        with torch.no_grad():
            module.proj.weight[:, 8 * head : 8 * head + 8] = 0.0
        assert float(loss(both)) - whole == pytest.approx(float(rise[head]), rel=1e-4)
        with torch.no_grad():
            module.proj.weight.copy_(kept)


def test_scores_are_means_over_the_queries_that_see_a_key():
    weights = torch.tensor([[1, 0, 0, 0], [0.5, 0.5, 0, 0], [0.6, 0.2, 0.2, 0], [0.1, 0.2, 0.3, 0.4]])[
        None, None
    ]
    seen = torch.ones(4, 4).tril().bool()[None, None]
    expected = [2.2 / 4, 0.9 / 3, 0.5 / 2, 0.0]  # one query alone sees the last key
    torch.testing.assert_close(sink_scores(weights, seen)[0, 0], torch.tensor(expected))


class Attracted(nn.Module):
    """All queries look at the token whose first channel is 1; its value is zero."""

    def __init__(self, pattern):
        super().__init__()
        self.attn = create_attention("softmax", 4, 2, pattern=pattern, qkv_bias=True)
        with torch.no_grad():
            weight, bias = self.attn.qkv.weight.zero_(), self.attn.qkv.bias.zero_()
            bias[[0, 2]] = 30.0  # first channel of both heads' queries
            weight[[4, 6], 0] = 1.0  # and keys
            weight[8:] = 1.0
            weight[8:, 0] = -3.0

    def forward(self, x, **call):
        return self.attn(x, **call)


@pytest.mark.parametrize("pattern", ["self", "causal_self"])
def test_a_sink_is_found_where_it_is(pattern):
    model = Attracted(pattern)
    x = torch.ones(3, 12, 4)
    x[..., 0] = 0.0
    places = (0, 2, 2)
    for sample, place in enumerate(places):
        x[sample, place, 0] = 1.0
    (layer,) = sinks(model, [x], model)
    assert layer.layer == "attn" and layer.attention == "softmax" and layer.rate == [1.0, 1.0]
    before = 2 if pattern == "causal_self" else 0  # queries before the sink spread their weight on few keys
    assert layer.first == pytest.approx(1 / 3) and layer.others == pytest.approx(2 / 3)
    assert layer.value_norm == pytest.approx(0.0, abs=1e-6) and layer.effective_rank < (
        2.5 if before else 1.1
    )
    assert layer.alignment == pytest.approx(float(torch.cosine_similarity(x[1, 2], x[1, 0], dim=0)), rel=1e-5)
    assert layer.entropy < 0.2

    mask = torch.ones(3, 20, dtype=torch.bool)
    mask[:, 12:] = False
    padded = torch.cat((x, torch.full((3, 8, 4), 7.0)), 1)
    (again,) = sinks(model, [padded], lambda batch: model(batch, key_mask=mask))
    assert again.rate == layer.rate and again.first == layer.first and again.others == layer.others
    assert again.entropy == pytest.approx(layer.entropy, rel=1e-4)
    assert not model.attn._forward_pre_hooks


@over(cases(has_map=True, signed_map=False))
def test_every_unsigned_map_is_looked_at(name, pattern):
    module = build(name, pattern, m=16)
    (layer,) = sinks(module, [inputs(pattern, n=16, m=16)], lambda batch: module(*batch))
    assert layer.attention == name and len(layer.rate) == module.num_heads
    assert 0 <= layer.entropy <= 1 + 1e-5 and 1 - 1e-3 <= layer.effective_rank <= 16


def test_the_command_prints_and_writes(tmp_path, capsys):
    assert (
        main(["analyse", "recall_lm_softmax.mqar", "--batches", "1", "--ablate", "--out", str(tmp_path)]) == 0
    )
    printed = capsys.readouterr().out
    assert "blocks.0.attn" in printed and "validation" in printed
    found = json.loads((tmp_path / "analysis.json").read_text())
    assert [item["layer"] for item in found["sinks"]] == ["blocks.0.attn", "blocks.1.attn"]
    rise = found["ablation"]["blocks.0.attn"][0]
    assert rise > 1 and math.isfinite(rise), "this model recalls by its first layer"
    assert (tmp_path / "heads.png").stat().st_size > 1000
    assert main(["analyse", "physicsformer_softmax.burgers1d"]) == 2
    assert "no batches" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="no attention"):
        head_importance(nn.Linear(2, 2), [], lambda batch: batch)
