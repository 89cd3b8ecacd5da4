"""Blocks with attention of their own: which gets which, what is refused, and that a card rebuilds them."""

import pytest
import torch

from zoo.attention import AttentionFactory, resolve_slots
from zoo.errors import CapabilityError, ConfigError
from zoo.models import build_model, create_model
from zoo.models.registry import model_slots

SIZES = {"vocabulary": 32, "max_length": 16, "dim": 16, "depth": 4}


def names(model):
    return [block.attn.name for block in model.blocks]


def test_blocks_take_the_variants_in_turn():
    choice = {"name": "kda", "conv": 2, "stack": ["kda", "kda", "softmax"]}
    slots = resolve_slots(model_slots("recall_lm", **SIZES), choice)
    for _ in range(2):  # each model begins with the first one
        model = build_model("recall_lm", slots, **SIZES)
        assert names(model) == ["kda", "kda", "softmax", "kda"]
        assert model.blocks[3].attn.conv_q.weight.shape[-1] == 2
    halves = [{"name": "based", "combine": c} for c in ("taylor", "window")]
    model = create_model("recall_lm", attention={"name": "based", "window": 8, "stack": halves}, **SIZES)
    assert [block.attn.window_heads for block in model.blocks] == [0, 1, 0, 1]
    assert all(block.attn.window == 8 for block in model.blocks)


def test_a_mixed_model_decodes_step_by_step():
    model = create_model("recall_lm", attention={"name": "gla", "stack": ["gla", "softmax"]}, **SIZES).eval()
    tokens = torch.randint(32, (2, 10))
    state, rows = model.init_state(2), []
    with torch.no_grad():
        for t in range(10):
            row, state = model.step(tokens[:, t], state)
            rows.append(row)
        torch.testing.assert_close(torch.stack(rows, 1), model(tokens), rtol=1e-4, atol=1e-5)


def test_the_card_rebuilds_the_stack():
    slots = model_slots("recall_lm", **SIZES)
    factory = resolve_slots(slots, {"name": "kda", "stack": ["softmax", "kda"]})["encoder"]
    assert factory.label == "softmax, kda"
    again = AttentionFactory.from_card(slots["encoder"], factory.card())
    assert names(build_model("recall_lm", {"encoder": again}, **SIZES)) == ["softmax", "kda"] * 2
    assert "stack" not in resolve_slots(slots, {"name": "kda"})["encoder"].card()


def test_blocks_that_do_not_fit_become_softmax_and_mistakes_are_named():
    slots = model_slots("recall_lm", **SIZES)
    factory = resolve_slots(slots, {"name": "linear", "stack": ["linear", "karat"]})["encoder"]
    assert factory.label == "linear, softmax" and factory.note.startswith("karat does not define")
    with pytest.raises(CapabilityError, match="karat"):
        resolve_slots(slots, {"name": "linear", "stack": ["linear", "karat"]}, strict=True)
    with pytest.raises(CapabilityError, match="karat"):
        resolve_slots(slots, {"name": "karat", "stack": ["softmax", "karat"]})
    for stack, said in [
        ("linear", "list the variants"),
        ([], "list the variants"),
        (["softmax"], "leaves attention=linear out"),
        (["linear", 3], "neither"),
        (["linear", "sofmax"], "softmax"),
        (["linear", {"name": "mala", "featur": 1}], "featur"),
    ]:
        with pytest.raises(ConfigError, match=said):
            resolve_slots(slots, {"name": "linear", "stack": stack})
