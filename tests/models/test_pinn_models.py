"""Published sizes and invariants of the PINN models."""

import pytest
import torch

from zoo.attention.slots import resolve_slots
from zoo.errors import ConfigError
from zoo.layers.pointwise import wave_numbers
from zoo.models.registry import build_model, model_slots


def make(name, attention="softmax", **options):
    slots = model_slots(name)
    return build_model(name, resolve_slots(slots, {"name": attention}) if slots else {}, **options)


def test_pinnsformer_has_the_published_size():
    assert sum(p.numel() for p in make("pinnsformer").parameters()) == 453_561
    flow = make("pinnsformer", lower=[0, 0, 0], upper=[1, 1, 1], fields=2)
    assert sum(p.numel() for p in flow.parameters()) == 454_106


def test_one_token_makes_attention_the_identity_on_values():
    torch.manual_seed(0)
    model = make("physicsformer", tokens=1)
    points = torch.rand(4, 2)
    before = model(points)
    for module in model.modules():
        if hasattr(module, "qkv"):
            module.qkv.weight.data[: 2 * module.dim] *= 7.0  # queries and keys
    assert torch.equal(model(points), before)


def test_tokens_come_from_the_point_and_the_first_is_the_point():
    model = make("physicsformer", tokens=3, step=0.1, lower=[0.0, 0.0], upper=[1.0, 2.0])
    tokens = model.sequence(torch.tensor([[0.5, 1.0]]))
    torch.testing.assert_close(tokens[0, :, 1], torch.tensor([1.0, 1.2, 1.4]))
    assert tokens[0, :, 0].eq(0.5).all()


def test_periodic_features_are_periodic():
    model = make("pinn_mlp", lower=[0.0, 0.0], upper=[2.0, 1.0], periods=[2.0, None], harmonics=2)
    a = model(torch.tensor([[0.3, 0.2], [0.0, 0.9]]))
    b = model(torch.tensor([[2.3, 0.2], [2.0, 0.9]]))
    torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"tokens": 0}, "must be at least 1"),
        ({"act": "relu"}, "unknown smooth activation"),
        ({"ansatz": "burgers"}, "did you mean 'burgers1d'"),
        ({"lower": [1.0, 0.0]}, "must be below"),
        ({"periods": [1.0]}, "one entry per coordinate"),
        ({"axis": 5}, "one of the 2 coordinates"),
    ],
)
def test_bad_options(options, text):
    with pytest.raises(ConfigError, match=text):
        make("physicsformer", **options)


def test_points_of_the_wrong_width():
    with pytest.raises(ConfigError, match=r"points must be \[N, 2\]"):
        make("pinn_mlp")(torch.rand(4, 3))


def test_oblique_waves_are_periodic_and_counted_once():
    assert wave_numbers(2, 1, 1) == [(1, 0), (0, 1), (1, -1), (1, 1)]
    assert len(wave_numbers(2, 2, 2)) == 12
    model = make(
        "pinn_mlp", lower=[0.0] * 3, upper=[2.0, 3.0, 1.0], periods=[2.0, 3.0, None], mixed=2
    ).double()
    assert model.features.width == 1 + 2 * (2 + 8)
    at = torch.tensor([[0.3, 0.2, 0.5]], dtype=torch.float64)
    torch.testing.assert_close(model(at), model(at + torch.tensor([[2.0, -3.0, 0.0]])), atol=1e-13, rtol=0)
    with pytest.raises(ConfigError, match="mixed=-1 at least 0"):
        make("pinn_mlp", mixed=-1)
