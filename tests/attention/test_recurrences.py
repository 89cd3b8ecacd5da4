"""Identities of the GLA, DeltaNet, Gated DeltaNet, KDA and mLSTM cards, through the modules."""

import pytest
import torch
from variants import build, inputs

from kernels.decay import decay_scan
from kernels.delta import delta_scan
from zoo.attention import Pattern, create_attention
from zoo.errors import ConfigError

NAMES = ("gla", "deltanet", "gdn", "kda", "mlstm")
D64 = torch.float64


def split(module, x):
    q, k, v = module.project(x, x, x)
    k, gates = module._split(k, v.dtype)
    return q * module.head_dim**-0.5, k, v, gates


@pytest.mark.parametrize("name", NAMES)
def test_padding_on_the_left_equals_deletion(name):
    """Recommenders pad on the left: convolutions and states start at the first real token."""
    for pattern in (Pattern.CAUSAL_SELF, Pattern.SELF):
        module = build(name, pattern)
        x = torch.randn(2, 9, 16)
        mask = torch.ones(2, 9, dtype=torch.bool)
        mask[:, :4] = False
        have = module(x, key_mask=mask)[:, 4:]
        torch.testing.assert_close(have, module(x[:, 4:]), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("name", NAMES)
def test_first_output_sees_one_token_and_two_directions_count_it_once(name):
    """On one token both directions together equal the causal form: the own term is not doubled."""
    torch.manual_seed(0)
    causal = build(name, Pattern.CAUSAL_SELF)
    both = create_attention(name, 16, 2, pattern="self").eval()
    both.load_state_dict(causal.state_dict())
    x = torch.randn(2, 1, 16)
    torch.testing.assert_close(both(x), causal(x))


def size(tree):
    """Numbers in a decoding state."""
    if tree is None:
        return 0
    if isinstance(tree, torch.Tensor):
        return tree.numel()
    return sum(map(size, tree.values() if isinstance(tree, dict) else tree))


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_state_does_not_grow(name):
    module = build(name, Pattern.CAUSAL_SELF, dim=8, heads=1)
    state = module.init_state(1)
    x = torch.randn(1, 1, 8)
    _, state = module.step(x, state)
    first = size(state)
    for _ in range(40):
        _, state = module.step(x, state)
    assert size(state) == first <= module.state_size(1) + 1
    assert module.state_size(10) == module.state_size(10_000)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_state_stays_constant_and_finite_over_ten_thousand_steps(name):
    module = build(name, Pattern.CAUSAL_SELF, dim=8, heads=1)
    state, x = module.init_state(1), torch.randn(10_000, 1, 1, 8)
    _, state = module.step(x[0], state)
    first = size(state)
    for x_t in x[1:]:
        y, state = module.step(x_t, state)
    assert size(state) == first and y.isfinite().all()


def test_gla_without_forgetting_is_linear_attention():
    module = build("gla", Pattern.CAUSAL_SELF)
    q, k, v, gates = split(module, inputs(Pattern.CAUSAL_SELF)[0])
    assert (gates < 0).all() and gates.shape == k.shape
    open_gates = torch.zeros_like(gates)
    want = (q @ k.mT).tril() @ v
    torch.testing.assert_close(decay_scan(q, k, v, log_g=open_gates), want, rtol=1e-4, atol=1e-5)


def test_gdn_and_kda_without_forgetting_are_deltanet_and_constant_channels_are_gdn():
    gdn = build("gdn", Pattern.CAUSAL_SELF, dtype=D64)
    q, k, v, gates = split(gdn, inputs(Pattern.CAUSAL_SELF, dtype=D64)[0])
    (beta,), named = gdn.arguments(gates)
    assert ((beta > 0) & (beta < 1)).all() and (named["log_g"] < 0).all()
    plain = delta_scan(q, k, v, beta)
    torch.testing.assert_close(delta_scan(q, k, v, beta, log_g=torch.zeros_like(beta)), plain)
    wide = named["log_g"][..., None].expand_as(k)
    torch.testing.assert_close(delta_scan(q, k, v, beta, log_g=wide), delta_scan(q, k, v, beta, **named))
    kda = build("kda", Pattern.CAUSAL_SELF, dtype=D64)
    _, k, _, gates = split(kda, inputs(Pattern.CAUSAL_SELF, dtype=D64)[0])
    (_,), named = kda.arguments(gates)
    assert named["log_g"].shape == k.shape


def test_queries_and_keys_of_delta_rules_have_length_one():
    for name in ("deltanet", "gdn", "kda"):
        module = build(name, Pattern.CAUSAL_SELF)
        q, k, _, _ = split(module, inputs(Pattern.CAUSAL_SELF)[0])
        assert (k.norm(dim=-1) - 1).abs().max() < 0.05
        assert (q.norm(dim=-1) * module.head_dim**0.5 - 1).abs().max() < 0.05


def test_kda_bounded_gate_stays_above_its_bound():
    module = build("kda", Pattern.CAUSAL_SELF)
    bounded = create_attention("kda", 16, 2, pattern="causal_self", lower=-5.0)
    _, _, _, gates = split(bounded, 50 * torch.randn(2, 7, 16))
    log_g = bounded.arguments(gates)[1]["log_g"]
    assert log_g.min() >= -5 and log_g.max() <= 0
    assert module.lower is None
    with pytest.raises(ConfigError, match="must be negative"):
        create_attention("kda", 16, 2, pattern="causal_self", lower=5.0)


def test_mlstm_with_open_gates_is_linear_attention_with_a_bound():
    module = build("mlstm", Pattern.CAUSAL_SELF, dtype=D64)
    q, k, v, _ = split(module, inputs(Pattern.CAUSAL_SELF, dtype=D64)[0])
    zero = torch.zeros_like(k[..., 0])
    weights = (q @ k.mT).tril()
    want = weights @ v / weights.sum(-1, keepdim=True).abs().clamp(min=1)
    torch.testing.assert_close(decay_scan(q, k, v, log_g=zero, log_i=zero, normalizer="mlstm"), want)


def test_mlstm_input_gates_cancel_while_the_bound_does_not_bind():
    """Adding a constant to all input gates changes nothing where |q.n| > 1."""
    module = build("mlstm", Pattern.CAUSAL_SELF, dtype=D64)
    q, k, v, gates = split(module, inputs(Pattern.CAUSAL_SELF, dtype=D64)[0])
    named = module.arguments(gates)[1]
    q, k = q.abs() + 1, k.abs() + 1
    run = lambda shift: decay_scan(
        q, k, v, log_g=named["log_g"], log_i=named["log_i"] + shift, normalizer="mlstm"
    )
    torch.testing.assert_close(run(6.0), run(9.0))
    torch.testing.assert_close(run(200.0), run(6.0))
    assert (run(-9.0) - run(6.0)).abs().max() > 1e-3


def test_mlstm_sigmoid_gate_equals_exp_gate_for_very_negative_inputs():
    q, k, v = (torch.randn(1, 2, 9, 4, dtype=D64) for _ in range(3))
    i = torch.full((1, 2, 9), -25.0, dtype=D64)
    sigmoid = decay_scan(q, k, v, log_i=torch.nn.functional.logsigmoid(i))
    torch.testing.assert_close(sigmoid, decay_scan(q, k, v, log_i=i), rtol=1e-9, atol=0)
    module = create_attention("mlstm", 16, 2, pattern="causal_self", gate="sigmoid", soft_cap=15.0).eval()
    (x,) = inputs(Pattern.CAUSAL_SELF)
    state, rows = module.init_state(2), []
    for t in range(7):
        y, state = module.step(x[:, t : t + 1], state)
        rows.append(y)
    torch.testing.assert_close(torch.cat(rows, 1), module(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_sets_are_refused_unless_allowed(name):
    from zoo.attention.slots import Slot, resolve_slots
    from zoo.errors import CapabilityError

    slots = {"features": Slot(Pattern.SELF, ordered=False)}
    with pytest.raises(CapabilityError, match="allow_order"):
        resolve_slots(slots, {"name": name}, strict=True)
    chosen = resolve_slots(slots, {"name": name}, strict=True, allow_order=True)
    assert chosen["features"](16, 2)(torch.randn(1, 5, 16)).shape == (1, 5, 16)


def test_options_that_cannot_be():
    for name, option in (
        ("gla", {"gate_rank": 0}),
        ("gla", {"temperature": 0.0}),
        ("mlstm", {"gate": "relu"}),
        ("mlstm", {"soft_cap": 0.0}),
        ("deltanet", {"conv": -1}),
    ):
        with pytest.raises(ConfigError, match="attention"):
            create_attention(name, 16, 2, pattern="causal_self", **option)
