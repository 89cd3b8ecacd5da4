"""Identities of the variants that know places: neighborhood, clear, ppma, karat; and efficient probing."""

import math

import pytest
import torch
from variants import build, inputs

from kernels import softmax as kernel
from zoo.attention import Grid, Pattern, create_attention
from zoo.attention.karat import tie_operators
from zoo.attention.ppma import path_tables, polyline
from zoo.errors import CapabilityError, ConfigError
from zoo.layers.pool import EfficientProbe


def qkv(n, h=2, d=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(2, h, n, d, generator=g, dtype=torch.float64) for _ in range(3)]


def make(name, **options):
    return create_attention(name, 12, 2, pattern=options.pop("pattern", "self"), **options).double().eval()


# ---------------------------------------------------------------- neighborhood


def test_a_window_over_everything_is_softmax_and_one_of_one_is_the_value():
    for grid in (Grid((12,)), Grid((3, 4)), Grid((2, 3, 2))):
        q, k, v = qkv(12)
        wide = make("neighborhood", window=12, grid=grid)
        assert (wide.attend(q, k, v, grid=grid) - kernel.attention(q, k, v)).abs().max() < 1e-12
        assert (make("neighborhood", window=1, grid=grid).attend(q, k, v, grid=grid) - v).abs().max() < 1e-12


def test_every_query_has_exactly_the_window_and_dilation_splits_into_subgrids():
    grid = Grid((6, 8))
    q, k, v = qkv(48)
    module = make("neighborhood", window=[3, 4], grid=grid)
    assert ((module.weights(q, k, grid=grid) > 0).sum(-1) == 12).all()
    spread = make("neighborhood", window=3, dilation=2, grid=grid)
    have = spread.attend(q, k, v, grid=grid).unflatten(2, grid.shape)
    half = Grid((3, 4))
    small = make("neighborhood", window=3, grid=half)
    for a in range(2):
        for b in range(2):
            part = [t.unflatten(2, grid.shape)[:, :, a::2, b::2].flatten(2, 3) for t in (q, k, v)]
            want = small.attend(*part, grid=half).unflatten(2, half.shape)
            assert (have[:, :, a::2, b::2] - want).abs().max() < 1e-12


def test_stride_of_a_window_is_window_attention():
    grid = Grid((4, 6))
    q, k, v = qkv(24)
    have = make("neighborhood", window=2, stride=2, grid=grid).attend(q, k, v, grid=grid)

    def windows(t):
        t = t.unflatten(2, grid.shape).unflatten(3, (3, 2)).unflatten(2, (2, 2))
        return t.permute(0, 2, 4, 1, 3, 5, 6).flatten(4, 5).flatten(0, 2)

    want = kernel.attention(*(windows(t) for t in (q, k, v)))
    assert (windows(have) - want).abs().max() < 1e-12


def test_prefix_tokens_see_all():
    grid = Grid((3, 4), 2)
    weights = make("neighborhood", window=3, grid=grid).weights(*qkv(14)[:2], grid=grid)
    assert (weights[:, :, :2] > 0).all() and (weights[..., :2] > 0).all()
    assert ((weights[:, :, 2:, 2:] > 0).sum(-1) == 9).all()


@pytest.mark.parametrize(
    "options", [{"window": 3, "dilation": 2}, {"window": 4, "stride": 2}, {"window": 6, "dilation": 3}]
)
def test_a_padded_sequence_ends_at_its_last_token(options):
    module = build("neighborhood", Pattern.SELF, **options)
    x = torch.randn(3, 14, 16)
    mask = torch.ones(3, 14, dtype=torch.bool)
    mask[0, 9:] = mask[1, 5:] = False
    whole = module(x, key_mask=mask)
    for b, length in enumerate((9, 5, 14)):
        assert (whole[b : b + 1, :length] - module(x[b : b + 1, :length])).abs().max() < 1e-5


def test_dilated_causal_decoding_and_its_state():
    module = build("neighborhood", Pattern.CAUSAL_SELF, window=3, dilation=2)
    x, rows = torch.randn(2, 15, 16), []
    state = module.init_state(2)
    with torch.no_grad():
        for t in range(15):
            y, state = module.step(x[:, t : t + 1], state)
            rows.append(y)
        assert (torch.cat(rows, 1) - module(x)).abs().max() < 1e-5
    assert state["k"].shape[2] == 5 and module.state_size(100) == 5 * 2 * 16
    weights = module.attention_map(x)
    assert weights[0, 0, 10].nonzero().flatten().tolist() == [6, 8, 10]


def test_neighborhood_options_that_cannot_be():
    for options, text in (
        ({"window": 3, "stride": 4}, "stride <= window"),
        ({"window": [3, 3], "grid": Grid((9,))}, "each of the 1 axes"),
        ({"stride": 2, "pattern": "causal_self"}, "must be 1"),
    ):
        with pytest.raises(ConfigError, match=text):
            make("neighborhood", **options)


# ---------------------------------------------------------------- clear


def test_disc():
    grid = Grid((4, 5), 1)
    q, k, v = qkv(21)
    assert (
        make("clear", radius=9, grid=grid).attend(q, k, v, grid=grid) - kernel.attention(q, k, v)
    ).abs().max() < 1e-12
    bare = Grid((4, 5))
    q, k, v = qkv(20)
    assert (make("clear", radius=1, grid=bare).attend(q, k, v, grid=bare) - v).abs().max() < 1e-12
    weights = make("clear", radius=2, grid=bare).weights(q, k, grid=bare)
    rows, cols = torch.arange(20) // 5, torch.arange(20) % 5
    near = (rows[:, None] - rows) ** 2 + (cols[:, None] - cols) ** 2 < 4
    assert torch.equal(weights[0, 0] > 0, near)


def test_cells_are_further_keys_of_image_tokens():
    """Against a loop over cells, masked tokens and cut cells included; the map says the same."""
    grid, s = Grid((5, 6), 2), 2
    module = make("clear", radius=2, grid=grid, downsample=s)
    with torch.no_grad():
        module.pool.copy_(torch.tensor([[0.5, -0.1], [0.4, 0.3]]))
    q, k, v = qkv(32)
    mask = torch.ones(2, 32, dtype=torch.bool)
    mask[0, [3, 8, 9]] = mask[1, 1] = False
    k[0, :, 8] = v[0, :, 8] = 1e3
    rows, cols = torch.arange(30) // 6, torch.arange(30) % 6
    near = torch.ones(32, 32, dtype=torch.bool)
    near[2:, 2:] = (rows[:, None] - rows) ** 2 + (cols[:, None] - cols) ** 2 < 4
    want = torch.zeros(2, 2, 32, 6, dtype=torch.float64)
    for b in range(2):
        keys, values, seen = [*k[b].unbind(1)], [*v[b].unbind(1)], [*(near & mask[b]).unbind(1)]
        for i in range(0, 5, s):
            for j in range(0, 6, s):
                inside = [
                    (2 + 6 * (i + a) + j + c, module.pool[a, c])
                    for a in range(s)
                    for c in range(s)
                    if i + a < 5 and mask[b, 2 + 6 * (i + a) + j + c]
                ]
                share = len(inside) / s**2
                if inside:
                    keys.append(sum(w * k[b, :, t] for t, w in inside) / share)
                    values.append(sum(w * v[b, :, t] for t, w in inside) / share)
                    seen.append(torch.arange(32) >= 2)
        scores = q[b] @ torch.stack(keys, 1).mT / 6**0.5
        weights = scores.masked_fill(~torch.stack(seen, 1), -torch.inf).softmax(-1)
        want[b] = weights @ torch.stack(values, 1)
    have = module.attend(q, k, v, key_mask=mask, grid=grid)
    assert (have - want).abs().max() < 1e-12
    assert (module.weights(q, k, key_mask=mask, grid=grid) @ v - want).abs().max() < 1e-9


def test_cells_of_one_token_repeat_it_and_the_scale_grows():
    grid = Grid((4, 5))
    q, k, v = qkv(20)
    plain = kernel.attention(q, k, v)
    assert (make("clear", radius=9, grid=grid, downsample=1).attend(q, k, v) - plain).abs().max() < 1e-12
    x = torch.randn(2, 20, 12, dtype=torch.float64)
    grown, fixed = make("clear", grid=grid, train_tokens=10), make("clear", grid=grid)
    grown.load_state_dict(fixed.state_dict())
    ratio = grown.project(x, x, x)[0] / fixed.project(x, x, x)[0]
    assert (ratio - (math.log(20) / math.log(10)) ** 0.5).abs().max() < 1e-9
    for options, text in (({"downsample": 0}, "at least 1"), ({"train_tokens": 1}, "at least 2")):
        with pytest.raises(ConfigError, match=text):
            make("clear", grid=grid, **options)
    with pytest.raises(CapabilityError, match="bias"):
        make("clear", grid=grid, downsample=2)(x, bias=torch.zeros(1, 1, 20, 20, dtype=torch.float64))


# ---------------------------------------------------------------- ppma


def seg(values, i, j):
    return sum(values[t] for t in range(min(i, j) + 1, max(i, j) + 1))


def test_polyline_mask_by_its_definition():
    a, b = (-torch.rand(1, 1, 3, 4).double() for _ in range(2))
    rows, columns = path_tables(a, b)
    mask = polyline(rows, columns)[0, 0].unflatten(0, (3, 4)).unflatten(2, (3, 4))
    for h1 in range(3):
        for w1 in range(4):
            for h2 in range(3):
                for w2 in range(4):
                    want = seg(a[0, 0, h1], w1, w2) + seg(b[0, 0, :, w2], h1, h2)
                    assert abs(float(mask[h1, w1, h2, w2]) - float(want)) < 1e-12
    assert mask.max() <= 0
    turned = polyline(*path_tables(b.mT, a.mT))[0, 0].unflatten(0, (4, 3)).unflatten(2, (4, 3))
    # Transposing the image swaps the decays, and with them which axis a path walks first.
    assert (turned.permute(1, 0, 3, 2) - mask.permute(2, 3, 0, 1)).abs().max() < 1e-12


def test_without_decay_full_mode_is_softmax():
    grid = Grid((3, 4))
    q, k, v = qkv(12)
    module = make("ppma", rope=False, grid=grid)
    assert (module.attend(q, k, v, grid=grid) - kernel.attention(q, k, v)).abs().max() < 1e-12


@pytest.mark.parametrize("shape", [(1, 6), (6, 1)])
def test_on_a_line_both_modes_are_a_decay_along_it(shape):
    grid = Grid(shape)
    q, k, v = qkv(6)
    decays = tuple(-torch.rand(2, 2, 6).double() for _ in range(2))
    full = make("ppma", grid=grid).attend(q, k, v, grid=grid, decays=decays)
    axial = make("ppma", mode="axial", grid=grid).attend(q, k, v, grid=grid, decays=decays)
    plain = make("ppma", rope=False, grid=grid).attend(q, k, v, grid=grid, decays=decays)
    c = decays[0 if shape[0] == 1 else 1].cumsum(-1)
    bias = -(c[..., None] - c[..., None, :]).abs()
    assert (full - axial).abs().max() < 1e-12
    assert (plain - kernel.attention(q, k, v, bias=bias)).abs().max() < 1e-12


def test_axial_mode_by_hand():
    grid = Grid((3, 4))
    q, k, v = qkv(12)
    a, b = (-torch.rand(2, 2, 12).double() for _ in range(2))
    have = make("ppma", mode="axial", rope=False, grid=grid).attend(q, k, v, grid=grid, decays=(a, b))
    rows, columns = path_tables(a.unflatten(2, (3, 4)), b.unflatten(2, (3, 4)))
    at = torch.arange(12)
    same_row, same_col = at[:, None] // 4 == at // 4, at[:, None] % 4 == at % 4
    scores = q @ k.mT * 6**-0.5
    along = torch.zeros_like(scores)
    down = torch.zeros_like(scores)
    for i in range(12):
        for j in range(12):
            along[..., i, j] = rows[:, :, i // 4, i % 4, j % 4]
            down[..., i, j] = columns[:, :, i % 4, i // 4, j // 4]
    p_row = (scores + along).masked_fill(~same_row, -torch.inf).softmax(-1)
    p_col = (scores + down).masked_fill(~same_col, -torch.inf).softmax(-1)
    assert (have - 0.5 * (p_col @ (p_row @ v) + p_row @ (p_col @ v))).abs().max() < 1e-12


@pytest.mark.parametrize("mode", ["full", "axial"])
def test_ppma_map_times_values_is_the_mixing(mode):
    module = build("ppma", Pattern.SELF, m=12, mode=mode, grid=Grid((3, 4)), lepe=False)
    x = torch.randn(2, 12, 16)
    weights, v = module.attention_map(x), module.project(x, x, x)[2]
    torch.testing.assert_close(module.output(weights @ v, x), module(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 2, 12))


def test_ppma_axial_module_and_refusals():
    module = build("ppma", Pattern.SELF, m=12, mode="axial", grid=Grid((3, 4)))
    x = torch.randn(2, 12, 16, requires_grad=True)
    module(x).square().sum().backward()
    assert x.grad.isfinite().all() and module.step_size.weight.grad.abs().max() > 0
    with pytest.raises(CapabilityError, match="mode=full"):
        module(x, key_mask=torch.ones(2, 12, dtype=torch.bool))
    with pytest.raises(CapabilityError, match="prefix"):
        make("ppma", mode="axial", grid=Grid((3, 4), 1))
    prefixed = build("ppma", Pattern.SELF, m=13, grid=Grid((3, 4), 1))
    assert prefixed(torch.randn(2, 13, 16)).shape == (2, 13, 16)


# ---------------------------------------------------------------- karat


@pytest.mark.parametrize("rank", [5, None])
def test_karat_equals_its_dense_map(rank):
    module = make("karat", length=7, rank=rank, modes=2)
    q, k, v = qkv(7)
    scores = q @ k.mT * 6**-0.5
    inner = sum(
        torch.einsum("bhnj,hjp->bhnp", ((m + 1) * scores).cos(), module.cosine[:, m])
        + torch.einsum("bhnj,hjp->bhnp", ((m + 1) * scores).sin(), module.sine[:, m])
        for m in range(2)
    )
    sigma = inner if rank is None else torch.einsum("bhnp,hjp->bhnj", inner, module.spread)
    assert (module.attend(q, k, v) - sigma @ v).abs().max() < 1e-12
    assert module.cosine.numel() + module.sine.numel() == 2 * 2 * 2 * 7 * (rank or 7)
    if rank is not None:
        assert module.spread.numel() == 2 * rank * 7
    assert (module.rows(scores + 2 * torch.pi) - module.rows(scores)).abs().max() < 1e-10  # periodic


def test_karat_is_linear_in_its_coefficients_and_keeps_the_scale():
    one, two, both = (make("karat", length=9) for _ in range(3))
    with torch.no_grad():
        for a, b, c in zip(*(m.parameters() for m in (one, two, both)), strict=True):
            b.copy_(a) if a is not one.cosine and a is not one.sine else None
            c.copy_(a if a is not one.cosine and a is not one.sine else a + b)
    q, k, v = qkv(9)
    assert (one.attend(q, k, v) + two.attend(q, k, v) - both.attend(q, k, v)).abs().max() < 1e-12
    torch.manual_seed(0)
    large = create_attention("karat", 64, 2, pattern="self", length=200)
    x = torch.randn(2, 200, 64)
    q, k, v = large.project(x, x, x)
    ratio = large.attend(q, k, v).std() / v.std()
    assert 0.2 < ratio < 5.0


@pytest.mark.parametrize("base", ["silu", "identity"])
def test_karat_base_and_ties(base):
    layers = [create_attention("karat", 16, 2, pattern="self", length=7, base=base) for _ in range(3)]
    tie_operators(layers)
    assert layers[2].spread is layers[0].spread
    assert len({id(p) for layer in layers for p in (layer.cosine, layer.sine, layer.spread)}) == 3
    (x,) = inputs(Pattern.SELF)
    assert layers[1](x).isfinite().all()
    with pytest.raises(ConfigError, match="same heads"):
        tie_operators([layers[0], create_attention("karat", 16, 2, pattern="self", length=8)])


# ---------------------------------------------------------------- efficient probing


def test_efficient_probe_equals_its_definition():
    pool = EfficientProbe(12, queries=3, reduction=2).double()
    x = torch.randn(2, 7, 12).double()
    weights = (pool.query @ x.mT * 12**-0.5).softmax(-1)
    values = x @ pool.value.weight.T
    want = torch.cat([(weights[:, i : i + 1] @ values[..., 2 * i : 2 * i + 2])[:, 0] for i in range(3)], -1)
    assert (pool(x) - want).abs().max() < 1e-12 and pool(x).shape == (2, pool.out_dim)
    order = torch.randperm(7)
    assert (pool(x[:, order]) - pool(x)).abs().max() < 1e-12


def test_efficient_probe_mask_bias_and_refusal():
    pool = EfficientProbe(12, queries=3).double()
    x = torch.randn(2, 7, 12).double().requires_grad_()
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[0, 4:] = False
    mask[1] = False
    out = pool(x, key_mask=mask)
    assert (out[:1] - pool(x[:1, :4])).abs().max() < 1e-12 and out[1].abs().max() == 0
    out.square().sum().backward()
    assert x.grad.isfinite().all() and x.grad[~mask].abs().max() == 0
    hide = torch.zeros(1, 1, 7).double()
    hide[..., 4:] = -1e4
    assert (pool(x[:1], bias=hide) - out[:1]).abs().max() < 1e-10
    with pytest.raises(ConfigError, match="divisible by queries"):
        EfficientProbe(12, queries=5)
