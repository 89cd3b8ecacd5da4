"""Exact derivatives: Taylor jets against nested reverse mode, forward mode and differences, for every model and variant."""

import copy

import pytest
import torch

from zoo.attention import Grid
from zoo.attention.registry import create_attention, get_attention, list_attention
from zoo.attention.slots import misfit, resolve_slots
from zoo.bench import peers_pinn
from zoo.errors import ConfigError
from zoo.layers.ansatz import ANSATZ
from zoo.layers.derivatives import Derivatives, choose_method, derivatives, points_mix, seed_jet
from zoo.layers.jet_algebra import Operator, algebra
from zoo.layers.jet_forward import forward_mode
from zoo.layers.jet_tensor import Jet
from zoo.models.registry import build_model, model_slots

WANTED = [(1, 0), (0, 1), (2, 0), (1, 1), (3, 0), (2, 1)]
HEAT = Operator((((0, 1), 1.0), ((2, 0), -0.3)))  # Taylor mode carries it alone beside (1, 0)
OBLIQUE = Operator((((2, 0), 0.7), ((1, 1), -2.0), ((0, 2), 1.5)))
SMALL = {
    "physicsformer": {"dim": 8, "tokens": 3, "step": 0.1, "hidden": (8,), "head": (8,)},
    "pinnsformer": {"dim": 8, "tokens": 3, "step": 0.1, "hidden": (8, 8), "head": (8, 8)},
    "pinn_mlp": {"dim": 8, "depth": 2, "modified": True, "fourier": 3},
    "lstm_pinn": {"dim": 6, "depth": 3},
}


def network(name="physicsformer", attention="softmax", **options):
    slots = model_slots(name)
    factories = resolve_slots(slots, {"name": attention}) if slots else {}
    options = {**SMALL[name], **options}
    return build_model(name, factories, **options).double()


def box(count):
    return torch.rand(count, 2, dtype=torch.float64) * torch.tensor([2.0, 1.0]) - torch.tensor([1.0, 0.0])


def gradients(model, table):
    loss = sum((k + 1) * v.square().mean() for k, v in enumerate(table.values()))
    found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return torch.cat(
        [
            (torch.zeros_like(p) if g is None else g).reshape(-1)
            for p, g in zip(model.parameters(), found, strict=True)
        ]
    )


@pytest.mark.parametrize("method", ["taylor", "jvp", "forward_reverse"])
@pytest.mark.parametrize("name", list(SMALL))
def test_methods_agree_to_third_order_with_weight_gradients(name, method):
    model, points = network(name, fields=2), box(4)
    expected = derivatives(model, points, WANTED, "reverse")
    found = derivatives(model, points, WANTED, method)
    for index in expected:
        scale = expected[index].abs().max().clamp(min=1)
        assert (found[index] - expected[index]).abs().max() < 1e-11 * scale, index
    g, h = gradients(model, found), gradients(model, expected)
    assert (g - h).abs().max() < 1e-10 * h.abs().max()


@pytest.mark.parametrize("name", list(SMALL))
@pytest.mark.parametrize(
    ("wanted", "channels"),
    [([(1, 0), HEAT], 3), ([(1, 0), (0, 1), OBLIQUE], 4), ([HEAT, (0, 1)], 4), ([HEAT, OBLIQUE], 6)],
    ids=["heat", "oblique", "part-wanted", "shared-part"],
)
def test_operators_are_the_sums_of_their_parts(name, wanted, channels):
    """In one channel where no other derivative needs the parts, and exact in any case."""
    model, points = network(name, fields=2), box(4)
    assert algebra(2, ((0, 0), *wanted)).size == channels
    expected, found = (derivatives(model, points, wanted, m) for m in ("reverse", "taylor"))
    parts = derivatives(model, points, [i for i, _ in OBLIQUE.terms], "reverse")
    torch.testing.assert_close(
        derivatives(model, points, [OBLIQUE], "jvp")[OBLIQUE],
        0.7 * parts[(2, 0)] - 2 * parts[(1, 1)] + 1.5 * parts[(0, 2)],
    )
    for key in wanted:
        torch.testing.assert_close(found[key], expected[key], rtol=1e-10, atol=1e-10)
    g, h = gradients(model, found), gradients(model, expected)
    assert (g - h).abs().max() < 1e-10 * h.abs().max()


@pytest.mark.parametrize("form", [f for f in ANSATZ if f != "none"])
def test_hard_conditions_have_exact_derivatives(form):
    unsteady = form == "taylor_green"
    fields = 3 if form in ("cavity", "kovasznay", "taylor_green") else 1
    sides = {"lower": [0.0] * 3, "upper": [1.0] * 3} if unsteady else {}
    model = network("pinn_mlp", ansatz=form, fields=fields, modified=False, fourier=0, **sides)
    points = torch.rand(5, 3 if unsteady else 2, dtype=torch.float64) * 0.5 + 0.2
    wanted = [(2, 0, 0), (0, 1, 1)] if unsteady else [(2, 0), (0, 2)]
    expected, found = (derivatives(model, points, wanted, m) for m in ("reverse", "taylor"))
    for index in expected:
        torch.testing.assert_close(found[index], expected[index], rtol=1e-9, atol=1e-9)


def usable():
    slot = model_slots("physicsformer")["encoder"]
    return [n for n in list_attention() if misfit(n, slot) is None]


def by_taylor(model, points, wanted):
    """None for variants with operations that Taylor mode cannot follow; `choose_method` tries the same, at the same cost."""
    try:
        return derivatives(model, points, wanted, "taylor")
    except (NotImplementedError, RuntimeError, TypeError, AttributeError):
        assert choose_method(model, points, wanted)[0] == "reverse"
        return None


@pytest.mark.parametrize("attention", usable())
def test_every_variant_with_second_derivatives(attention):
    """u_xx by double backward == jvp of jvp == Taylor, and == central difference where the variant is smooth."""
    torch.manual_seed(1)
    model, points = network(attention=attention).eval(), box(3)
    wanted = [(1, 0), (2, 0)]
    expected = derivatives(model, points, wanted, "reverse")[(2, 0)]
    scale = expected.abs().max().clamp(min=1)
    tables = {"taylor": by_taylor(model, points, wanted)}
    try:
        tables["jvp"] = derivatives(model, points, wanted, "jvp")
    except (NotImplementedError, RuntimeError) as error:
        assert tables["taylor"] is not None, error  # some operations have no forward mode and say so
    for method, table in tables.items():
        assert table is None or (table[(2, 0)] - expected).abs().max() < 1e-7 * scale, method
    if get_attention(attention).capabilities.smooth:
        h, x = 1e-4, torch.tensor([[1.0, 0.0]], dtype=torch.float64)
        middle = 2 * model(points)

        def second(step):
            return (model(points + step * x) - middle + model(points - step * x)) / step**2

        # Richardson's step removes the error in h squared, which matters where the curvature is large.
        difference = (4 * second(h / 2) - second(h)) / 3
        assert (difference - expected).abs().max() < 2e-5 * scale


@pytest.mark.parametrize("attention", [n for n in list_attention(double_backward=True) if n not in usable()])
def test_variants_that_need_a_grid(attention):
    """Declared twice differentiable but without a place in a PINN: tokens of an image along a curve, to third order."""
    module = create_attention(attention, 8, 2, pattern="self", grid=Grid((3, 3)), length=9, higher_order=True)
    module, base, along = module.double().eval(), *torch.randn(2, 9, 8, dtype=torch.float64)

    def curve(points):
        return module(base + points[:, :, None] * along)[:, 4]

    point, wanted, h = torch.tensor([[0.3]], dtype=torch.float64), [(2,), (3,)], 1e-3
    expected, pushed = (derivatives(curve, point, wanted, method) for method in ("reverse", "jvp"))
    for index in wanted:
        torch.testing.assert_close(pushed[index], expected[index], rtol=1e-8, atol=1e-10)
    difference = (curve(point + h) - 2 * curve(point) + curve(point - h)) / h**2
    torch.testing.assert_close(difference, expected[(2,)], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("attention", usable())
def test_third_orders_of_every_variant(attention):
    """What the stream function's equations need: triple backward == Taylor, on one point and two tokens."""
    torch.manual_seed(1)
    tiny = {"dim": 4, "tokens": 2, "hidden": (4,), "head": (4,), "encoder_layers": 1, "decoder_layers": 1}
    model, points, wanted = network(attention=attention, **tiny).eval(), box(1), [(3, 0), (2, 1)]
    expected = derivatives(model, points, wanted, "reverse")
    found = by_taylor(model, points, wanted) or derivatives(model, points, wanted, "jvp")
    for index in wanted:
        scale = expected[index].abs().max().clamp(min=1)
        assert (found[index] - expected[index]).abs().max() < 1e-7 * scale, index


@pytest.mark.parametrize("name", list(SMALL))
@pytest.mark.parametrize("method", ["taylor", "reverse"])
def test_points_do_not_mix(name, method):
    model, points = network(name), box(9)
    moved = points.clone()
    moved[7] += 0.3
    before, after = (derivatives(model, p, WANTED, method) for p in (points, moved))
    for index in before:
        assert torch.equal(before[index][3], after[index][3])
        assert not torch.equal(before[index][7], after[index][7])


@pytest.mark.parametrize("attention", usable())
def test_points_do_not_mix_in_any_variant(attention):
    """Variants with statistics over the batch do mix; they are noticed, and the task refuses them."""
    model, points = network(attention=attention).train(), box(9)
    if points_mix(model, points):
        assert attention == "affine"
        return
    moved = points.clone()
    moved[7] += 0.3
    copies = (copy.deepcopy(model), copy.deepcopy(model))  # running statistics may move from call to call
    before, after = (
        derivatives(m, p, [(2, 0)], "reverse")[(2, 0)] for m, p in zip(copies, (points, moved), strict=True)
    )
    torch.testing.assert_close(before[3], after[3], rtol=1e-9, atol=1e-12)
    assert not torch.equal(before[7], after[7])


@pytest.mark.parametrize("axis", [0, 1])
def test_pseudo_sequence_derivative_is_the_true_one(axis):
    """Also along the shifted axis; the published shortcut sums over outputs of k independent leaves."""
    model, points = network(tokens=4, step=0.2), box(5)
    h, e = 1e-6, torch.eye(2, dtype=torch.float64)[axis]
    true = (model(points + h * e) - model(points - h * e)) / (2 * h)
    index = (1 - axis, axis)
    assert (derivatives(model, points, [index])[index] - true).abs().max() < 1e-8


def test_causal_and_masked_softmax_rules():
    from kernels.softmax import attention

    ring = algebra(1, ((3,),))
    q, k, v = (Jet(torch.randn(ring.size, 2, 2, 4, 3, dtype=torch.float64), ring) for _ in range(3))
    mask = torch.tensor([[True, True, False, True], [True, False, True, True]])
    bias = torch.randn(1, 2, 4, 4, dtype=torch.float64)
    for call in ({"causal": True}, {"window": 1}, {"key_mask": mask}, {"bias": bias, "causal": True}):
        found = attention(q, k, v, **call)
        expected = forward_mode(
            "attention", lambda *a, c=call: attention(*a, higher_order=True, **c), (q, k, v), {}
        )
        torch.testing.assert_close(found.c, expected.c)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: torch.nn.functional.gelu(x),
        lambda x: torch.nn.functional.silu(x),
        lambda x: torch.nn.functional.elu(x) + 1,
        lambda x: torch.nn.functional.softplus(x),
        lambda x: torch.nn.functional.normalize(x, dim=-1),
        lambda x: torch.logsumexp(x, -1),
        lambda x: torch.einsum("bi,bj->bij", x, x.exp()),
        lambda x: (x * x + 1).rsqrt().cumsum(-1).clamp(min=0.2),
        lambda x: torch.where(x > 0, x**3, 1 / (2 + x)),
        lambda x: torch.stack([x.sigmoid(), x.tanh()], 1).flatten(1) @ torch.ones(6, 2, dtype=x.dtype),
        lambda x: torch.special.expm1(x),  # has no rule: forward mode on the spot
    ],
)
@pytest.mark.parametrize("wanted", [((2, 1), (3, 0)), ((1, 0), (0, 1), OBLIQUE)], ids=["third", "operator"])
def test_rules_equal_forward_mode(function, wanted):
    ring = algebra(2, wanted)
    x = Jet(torch.randn(ring.size, 4, 3, dtype=torch.float64), ring)
    found, expected = function(x), forward_mode("function", function, (x,), {})
    torch.testing.assert_close(found.c, expected.c)


def test_layer_norm_is_right_to_third_order_where_the_fused_one_is_not():
    norm, base, along = torch.nn.LayerNorm(3).double(), *torch.randn(2, 1, 3, dtype=torch.float64)
    norm.weight.data.uniform_(0.5, 2.0)

    def network(points):
        return norm(base + points * along + points * points * base.flip(0))

    point = torch.tensor([[0.3]], dtype=torch.float64)
    wanted = [(1,), (2,), (3,)]
    tables = {
        m: derivatives(network, point, wanted, m) for m in ("taylor", "jvp", "forward_reverse", "reverse")
    }
    h = 1e-3
    value = [network(point + k * h) for k in (-2, -1, 0, 1, 2)]
    third = (value[4] - 2 * value[3] + 2 * value[1] - value[0]) / (2 * h**3)
    for table in tables.values():
        torch.testing.assert_close(table[(3,)], third, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(table[(2,)], tables["reverse"][(2,)])


def test_taylor_mode_unless_it_cannot_follow():
    class InPlace(torch.nn.Module):
        def forward(self, points):
            return points[:, :1].clone().copy_(points[:, 1:] * 2)

    assert choose_method(network("pinn_mlp"), box(2), WANTED)[0] == "taylor"
    method, reason = choose_method(InPlace(), box(2), WANTED)
    assert method == "reverse" and "in-place" in reason


def test_algebra_counts_and_names():
    assert algebra(2, ((2, 0), (0, 1))).keys == [(0, 0), (1, 0), (0, 1), (2, 0)]
    jet = seed_jet(torch.rand(3, 2), [(2, 0)])
    assert jet.c[1, :, 0].eq(1).all() and jet.c[2].eq(0).all()
    d = Derivatives({(0, 0): torch.ones(2, 1)}, ("u",), ("x", "t"))
    with pytest.raises(ConfigError, match="was not asked for"):
        d("u", "xx")
    with pytest.raises(ConfigError, match="unknown field 'w'"):
        d("w")
    with pytest.raises(ConfigError, match="unknown derivative method"):
        derivatives(network("pinn_mlp"), box(2), WANTED, "tayler")


def test_the_benchmarked_step_has_the_loss_and_gradient_of_nested_reverse_mode():
    """The network, operator and 2,000 points of `zoo bench tasks pinn`, float32: the same loss to 1e-6."""
    model = peers_pinn.network("softmax")
    points = box(peers_pinn.POINTS).float()
    found = {}
    for method in ("taylor", "reverse"):
        loss = peers_pinn.burgers_loss(model, points, method)
        slopes = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
        found[method] = loss.item(), torch.cat([g.reshape(-1) for g in slopes if g is not None])
    (loss, slope), (nested_loss, nested_slope) = found["taylor"], found["reverse"]
    assert loss == pytest.approx(nested_loss, rel=1e-6)
    assert (slope - nested_slope).norm() < 1e-5 * nested_slope.norm()
