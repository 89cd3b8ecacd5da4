"""What every variant declares is true: run over the registry, so a new variant is tested by existing."""

import pytest
import torch
from omegaconf import OmegaConf
from variants import CASES, build, cases, ids, inputs

from zoo.attention import Pattern, create_attention, get_attention, list_attention, reorder_state
from zoo.attention._recurrent import RecurrentAttention
from zoo.attention.base import Attention, BiasFactors
from zoo.errors import CapabilityError, ConfigError

SIZES = [(1, 1, 8, 8, 1), (7, 7, 20, 12, 2), (63, 130, 8, 8, 2), (130, 63, 64, 20, 1), (5, 1, 8, 16, 1)]


def over(values):
    return pytest.mark.parametrize("name,pattern", values, ids=ids(values))


def close(a, b, tolerance=2e-5):
    scale = max(1.0, float(b.detach().abs().max())) if b.numel() else 1.0
    assert a.shape == b.shape
    assert float((a - b).detach().abs().max()) <= tolerance * scale if a.numel() else True


@over(CASES)
def test_ragged_sizes(name, pattern):
    for n, m, d, e, heads in SIZES:
        m = m if pattern.cross else n
        if pattern is Pattern.CAUSAL_CROSS and m < n:
            continue
        module = build(name, pattern, dim=24, heads=heads, m=m, head_dim=d, value_head_dim=e)
        arguments = [t.requires_grad_() for t in inputs(pattern, n=n, m=m, dim=24)]
        y = module(*arguments)
        assert y.shape == (2, n, 24) and y.dtype == torch.float32 and y.isfinite().all()
        y.square().sum().backward()
        for tensor in arguments:
            # A rule whose weights do not depend on the queries leaves their input without a gradient.
            assert tensor.grad is None or tensor.grad.isfinite().all()
        assert arguments[-1].grad is not None
        cost = module.cost(n, m)
        assert cost.flops > 0 and cost.parameters == sum(p.numel() for p in module.parameters())
        assert cost.state_size >= 0 and module.auxiliary_loss().isfinite()


@over(cases(key_mask=True))
def test_padding_equals_deletion(name, pattern):
    n, kept, m = 9, 6, 9
    can = get_attention(name).capabilities
    if can.fixed_length or can.needs_grid:
        return _masked_keys_have_no_influence(name, pattern)
    module = build(name, pattern, m=m)
    arguments = inputs(pattern, n=n, m=m)
    keys = arguments[-1]
    mask = torch.zeros(2, m, dtype=torch.bool)
    mask[:, :kept] = True
    padded = keys.clone()
    padded[:, kept:] = 1e3 * torch.randn(2, m - kept, 16)
    if pattern is Pattern.CAUSAL_CROSS:
        positions = torch.tensor([0, 0, 1, 2, 3, 4, 5, 5, 5])
        close(
            module(arguments[0], padded, key_mask=mask, positions=positions),
            module(arguments[0], keys[:, :kept], positions=positions),
        )
    elif pattern.cross:
        close(module(arguments[0], padded, key_mask=mask), module(arguments[0], keys[:, :kept]))
    else:
        close(module(padded, key_mask=mask)[:, :kept], module(keys[:, :kept]))


def _masked_keys_have_no_influence(name, pattern):
    module = build(name, pattern, m=9)
    arguments = list(inputs(pattern, n=9, m=9))
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[:, [2, 8]] = False
    before = module(*arguments, key_mask=mask)
    arguments[-1] = arguments[-1].masked_fill(~mask[..., None], 37.0)
    after = module(*arguments, key_mask=mask)
    rows = torch.ones(9, dtype=torch.bool) if pattern.cross else mask[0]
    close(after[:, rows], before[:, rows])


@over(cases(key_mask=True))
def test_masked_keys_have_no_gradient_and_empty_rows_give_zeros(name, pattern):
    module = build(name, pattern)
    arguments = [t.requires_grad_() for t in inputs(pattern, b=3)]
    mask = torch.ones(3, 7, dtype=torch.bool)
    mask[0, 5:] = False
    mask[1] = False
    context, value, call = module._check_call(
        arguments[0], arguments[1] if pattern.cross else None, None, key_mask=mask
    )
    heads = module.mix(arguments[0], context, value, **call)
    assert heads.isfinite().all()
    assert heads[1].abs().max() == 0
    rows = heads if pattern.cross else heads.masked_fill(~mask[:, None, :, None], 0.0)
    rows.square().sum().backward()
    gradient = arguments[-1].grad
    assert gradient.isfinite().all()
    assert gradient[~mask].abs().max() == 0
    assert all(p.grad is None or p.grad.isfinite().all() for p in module.parameters())


@over([c for c in CASES if not get_attention(c[0]).capabilities.key_mask])
def test_mask_is_refused_where_undefined(name, pattern):
    module = build(name, pattern)
    with pytest.raises(CapabilityError, match="variants that do"):
        module(*inputs(pattern), key_mask=torch.ones(2, 7, dtype=torch.bool))


@over([c for c in CASES if c[1].causal])
def test_causal_prefix(name, pattern):
    module = build(name, pattern, m=12)
    arguments = list(inputs(pattern, n=12, m=12))
    before = module(*arguments)
    changed = arguments[-1].clone()
    changed[:, 8:] = torch.randn(2, 4, 16)
    after = module(*arguments[:-1], changed)
    if get_attention(name).capabilities.strict_causal:
        close(after[:, :8], before[:, :8], 1e-6)
    else:
        assert (after[:, :8] - before[:, :8]).abs().max() > 1e-5
    assert (after[:, 8:] - before[:, 8:]).abs().max() > 1e-4


@over([c for c in CASES if c[1] is Pattern.CAUSAL_CROSS])
def test_positions_say_what_is_visible(name, pattern):
    module = build(name, pattern, m=11)
    x, context = inputs(pattern, n=5, m=11)
    close(module(x, context, positions=torch.arange(5) + 6), module(x, context))
    batched = (torch.arange(5) + 6).expand(2, 5)
    close(module(x, context, positions=batched), module(x, context))


@over(CASES)
def test_order(name, pattern):
    can = get_attention(name).capabilities
    order = torch.randperm(7, generator=torch.Generator().manual_seed(0))
    if can.needs_order(pattern):
        with pytest.raises(CapabilityError, match="allow_order"):
            build(name, pattern, ordered=False)
        if not pattern.causal:
            module = build(name, pattern)
            *x, keys = inputs(pattern)
            back = slice(None) if pattern.cross else order
            assert (module(*x, keys[:, order]) - module(*x, keys)[:, back]).abs().max() > 1e-6
        return
    if pattern.causal:
        return
    module = build(name, pattern, ordered=False)
    *x, keys = inputs(pattern)
    if pattern.cross:
        close(module(*x, keys[:, order]), module(*x, keys))
        close(module(x[0][:, order], keys), module(*x, keys)[:, order])
    else:
        close(module(keys[:, order]), module(keys)[:, order])


@over(CASES)
def test_rows_of_a_batch_do_not_meet(name, pattern):
    module = build(name, pattern)
    arguments = inputs(pattern, b=3)
    close(module(*(t[1:2] for t in arguments)), module(*arguments)[1:2])


@over([c for c in cases(streaming=True) if c[1] in (Pattern.CAUSAL_SELF, Pattern.CROSS)])
@torch.no_grad()
def test_step_equals_parallel(name, pattern):
    n, m = 21, 9
    module = build(name, pattern, m=m if pattern.cross else n)
    arguments = inputs(pattern, b=3, n=n, m=m)
    mask = torch.ones(3, m, dtype=torch.bool)
    mask[1, 6:] = False
    masked = {"key_mask": mask} if pattern.cross and get_attention(name).capabilities.key_mask else {}
    state = module.init_state(3, **({"context": arguments[1], **masked} if pattern.cross else {}))
    picked = torch.tensor([2, 0, 1])
    rows, x = [], arguments[0]
    for t in range(n):
        if t == n // 2:  # beam search moves rows about
            state = reorder_state(state, picked)
        source = x if t < n // 2 else x[picked]
        y, state = module.step(source[:, t : t + 1], state)
        rows.append(y if t < n // 2 else y[picked.argsort()])
    close(torch.cat(rows, 1), module(*arguments, **masked), 5e-5)


@over([c for c in CASES if not get_attention(c[0]).capabilities.streaming])
def test_streaming_is_refused_where_undefined(name, pattern):
    with pytest.raises(CapabilityError, match="variants that do"):
        build(name, pattern).init_state(1)


@over(cases(double_backward=True))
def test_gradients_of_both_orders(name, pattern):
    n = m = 4
    module = build(name, pattern, dim=8, m=m, dtype=torch.float64, higher_order=True)
    arguments = [
        t.requires_grad_() for t in inputs(pattern, b=1, n=n, m=m, dim=8, dtype=torch.float64, seed=5)
    ]
    parameter = next(module.parameters())

    def call(*tensors):
        return module(*tensors[:-1])

    tensors = (*arguments, parameter)
    assert torch.autograd.gradcheck(call, tensors, fast_mode=True, atol=1e-5)
    assert torch.autograd.gradgradcheck(call, tensors, fast_mode=True, atol=1e-4)


@over([c for c in CASES if not get_attention(c[0]).capabilities.double_backward])
def test_second_derivative_is_refused_where_undefined(name, pattern):
    with pytest.raises(CapabilityError, match="second derivative"):
        build(name, pattern, higher_order=True)


@over(cases(bias=("key", "factors", "full")))
def test_bias(name, pattern):
    kind = get_attention(name).capabilities.bias
    module = build(name, pattern, length=7)  # some rules divide by a fixed length
    arguments = inputs(pattern)
    plain = module(*arguments)
    zero = torch.zeros(1, 1, 1, 7, requires_grad=True)
    close(module(*arguments, bias=zero), plain)
    if name == "none":  # accepts biases, so that every slot can be controlled for, and mixes nothing
        return
    module(*arguments, bias=zero).sum().backward()
    assert zero.grad.shape == zero.shape and zero.grad.isfinite().all()
    # A key that a bias hides is still the next key's neighbour, which momentum looks at: hide the last one there.
    hidden = 6 if name == "momentum" else 3
    hide = torch.zeros(2, 1, 1, 7)
    hide[..., hidden] = -1e4
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[:, hidden] = False
    if not pattern.causal and get_attention(name).capabilities.key_mask:
        rows = slice(None) if pattern.cross else mask[0]
        close(module(*arguments, bias=hide)[:, rows], module(*arguments, key_mask=mask)[:, rows], 1e-4)
    if kind in ("factors", "full"):
        factors = BiasFactors(torch.randn(2, 2, 7, 3), torch.randn(2, 2, 7, 3))
        with_factors = module(*arguments, bias=factors)
        assert (with_factors - plain).abs().max() > 1e-4
        if kind == "full":
            close(with_factors, module(*arguments, bias=factors.dense()), 1e-4)


@over([c for c in CASES if get_attention(c[0]).capabilities.bias != "full"])
def test_dense_bias_is_refused_where_undefined(name, pattern):
    with pytest.raises(CapabilityError, match="variants that do.*softmax"):
        build(name, pattern)(*inputs(pattern), bias=torch.zeros(1, 1, 7, 7))


@over(cases(has_map=True))
def test_map_times_values_is_the_mixing(name, pattern):
    module = build(name, pattern, m=9)
    arguments = inputs(pattern, n=9, m=9)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[0, 7:] = False
    call = {"key_mask": mask} if module.capabilities.key_mask else {}
    weights = module.attention_map(*arguments, **call)
    assert weights.shape == (2, module.num_heads, 9, 9)
    if not module.capabilities.signed_map:
        assert weights.min() >= 0
    keys = arguments[-1]
    q, k, v = module.project(arguments[0], keys, keys)
    v = v.repeat_interleave(weights.shape[1] // v.shape[1], 1)
    context, value, call = module._check_call(
        arguments[0], keys if pattern.cross else None, None, key_mask=call.get("key_mask")
    )
    if type(module).attention_map in (Attention.attention_map, RecurrentAttention.attention_map):
        mixed = module.attend(q, k, v, **call)
    else:  # gates of each token, which `mix` applies, are part of the map
        mixed = module.mix(arguments[0], context, value, **call)
    close(weights @ v, mixed, 5e-5)


@over([c for c in CASES if not get_attention(c[0]).capabilities.has_map])
def test_map_is_refused_where_undefined(name, pattern):
    with pytest.raises(CapabilityError, match="variants that do"):
        build(name, pattern).attention_map(*inputs(pattern))


@over(cases(has_scores=True))
def test_scores_come_before_mask_and_normalisation(name, pattern):
    module, arguments = build(name, pattern), inputs(pattern)
    scores = module.scores(*arguments)
    assert scores.shape == (2, module.num_heads, 7, 7)
    mask = torch.zeros(2, 7, dtype=torch.bool)
    assert torch.equal(module.scores(*arguments, key_mask=mask), scores)
    bias = torch.randn(2, 1, 7, 7)
    close(module.scores(*arguments, bias=bias), scores + bias)
    # Where a row's scores are equal, so are its weights: the map is made of these scores and of nothing else.
    level = module.attention_map(*arguments, bias=-scores.detach())
    seen = torch.ones(7, 7).tril() if pattern.causal else torch.ones(7, 7)
    close(level, level.sum(-1, keepdim=True) / seen.sum(-1, keepdim=True) * seen)


@over([c for c in CASES if not get_attention(c[0]).capabilities.has_scores])
def test_scores_are_refused_where_undefined(name, pattern):
    with pytest.raises(CapabilityError, match="has no scores; variants that do"):
        build(name, pattern).scores(*inputs(pattern))


@over(CASES)
def test_low_precision_stays_near(name, pattern):
    module = build(name, pattern, m=20)
    arguments = inputs(pattern, n=20, m=20)
    exact = module(*arguments)
    low = module.bfloat16()(*(t.bfloat16() for t in arguments))
    assert low.dtype == torch.bfloat16 and low.isfinite().all()
    if module.capabilities.smooth:
        # 3 bits fewer than the rounding of the inputs would leave: products, sums and projections round again.
        assert (low.float() - exact).norm() <= 0.06 * exact.norm()


@pytest.mark.parametrize("name", list_attention())
def test_yaml_lists_the_options(name):
    from pathlib import Path

    file = Path(__file__).parents[2] / "conf" / "attention" / f"{name}.yaml"
    config = OmegaConf.to_container(OmegaConf.load(file))
    assert config.pop("name") == name
    options = {k: list(v) if isinstance(v, tuple) else v for k, v in get_attention(name).options().items()}
    assert config == options
    for line in file.read_text().splitlines():
        assert not line.strip() or "#" in line or line.startswith("  ") or line.endswith(":"), (
            f"no comment: {line}"
        )


@pytest.mark.parametrize("name", list_attention())
def test_docstring_states_source_and_differences(name):
    import importlib

    text = importlib.import_module(get_attention(name).__module__).__doc__
    assert "iffers" in text or "own definition" in text
    assert "arXiv:" in text or "no paper" in text


@pytest.mark.parametrize("name", list_attention())
def test_undefined_patterns_are_refused(name):
    for pattern in set(Pattern) - get_attention(name).capabilities.patterns:
        with pytest.raises(CapabilityError, match="does not define pattern.*variants that do"):
            create_attention(name, 16, 2, pattern=pattern)


def test_construction_errors_name_the_way_out():
    with pytest.raises(ConfigError, match="did you mean 'mala'"):
        create_attention("malla", 16, 2, pattern="self")
    with pytest.raises(ConfigError, match="key_norm"):
        create_attention("mala", 16, 2, pattern="self", keynorm="sum")
    with pytest.raises(ConfigError, match="mean, sum"):
        create_attention("mala", 16, 2, pattern="self", key_norm="median")
    with pytest.raises(ConfigError, match="not divisible"):
        create_attention("softmax", 10, 3, pattern="self")
    with pytest.raises(ConfigError, match="takes no context"):
        create_attention("softmax", 16, 2, pattern="self")(torch.zeros(1, 2, 16), torch.zeros(1, 2, 16))
    with pytest.raises(ConfigError, match="needs context"):
        create_attention("softmax", 16, 2, pattern="cross")(torch.zeros(1, 2, 16))
    with pytest.raises(ConfigError, match="True = attend"):
        create_attention("softmax", 16, 2, pattern="self")(torch.zeros(1, 2, 16), key_mask=torch.zeros(1, 2))
    with pytest.raises(ConfigError, match="did you mean 'self'"):
        create_attention("softmax", 16, 2, pattern="selfy")
    with pytest.raises(ConfigError, match="head_dim=-4 must be at least 1"):
        create_attention("softmax", 16, 2, pattern="self", head_dim=-4)
    with pytest.raises(ConfigError, match=r"write Grid\("):
        create_attention("softmax", 16, 2, pattern="self", grid=(3, 3))


def test_call_errors_name_the_shapes():
    module, x = create_attention("softmax", 16, 2, pattern="self"), torch.zeros(1, 2, 16)
    with pytest.raises(ConfigError, match=r"2 axes, shape \[2, 16\]"):
        module(x[0])
    with pytest.raises(ConfigError, match="dim=16, x has 8"):
        module(x[..., :8])
    with pytest.raises(ConfigError, match=r"grid=\(1, 2\) is no Grid"):
        module(x, grid=(1, 2))
    with pytest.raises(ConfigError, match=r"broadcastable to \[B, H, N, M\]; got \[2, 2\]"):
        module(x, bias=torch.zeros(2, 2))


def test_separate_values():
    module = build("softmax", Pattern.CROSS, context_dim=12, value_dim=5, head_dim=3, value_head_dim=10)
    x, context, value = torch.randn(2, 1, 16), torch.randn(2, 9, 12), torch.randn(2, 9, 5)
    assert module(x, context, value).shape == (2, 1, 16)
    with pytest.raises(ConfigError, match="needs value"):
        module(x, context)
