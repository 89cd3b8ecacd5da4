"""Shared layers: blocks, positions, stems, pooling, dropping."""

import pytest
import torch
import torch.nn.functional as F

from zoo.attention.slots import AttentionFactory, Slot
from zoo.errors import ConfigError
from zoo.layers import (
    ACTIVATIONS,
    AttentionPool,
    ConvStem,
    DecoderBlock,
    DropPath,
    Mlp,
    PatchEmbed,
    TransformerBlock,
    depth_rates,
    mean_pool,
    resample_positions,
    sine_positions,
    sine_positions_2d,
)

SELF = AttentionFactory(Slot("self"), "softmax")
CAUSAL = AttentionFactory(Slot("causal_self", streaming=True), "softmax")
CROSS = AttentionFactory(Slot("cross", streaming=True), "softmax")


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("norm", ["pre", "post"])
def test_block_equals_torchs_encoder_layer(norm, activation):
    block = TransformerBlock(SELF, 16, 4, mlp_ratio=3.0, activation=activation, norm=norm, norm_eps=1e-5)
    torch.manual_seed(0)
    theirs = torch.nn.TransformerEncoderLayer(
        16, 4, 48, 0.0, activation, batch_first=True, norm_first=norm == "pre"
    )
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(0.1 * torch.randn_like(p))
    names = {"self_attn.in_proj_": "attn.qkv.", "self_attn.out_proj.": "attn.proj.", "linear": "mlp.fc"}
    state = theirs.state_dict()
    for old, new in names.items():
        state = {k.replace(old, new): v for k, v in state.items()}
    block.load_state_dict(state)
    x = torch.randn(3, 7, 16)
    keep = torch.ones(3, 7, dtype=torch.bool)
    keep[1, 4:] = False
    theirs.train()  # the fast inference path zeroes padded queries
    torch.testing.assert_close(
        block(x, key_mask=keep), theirs(x, src_key_padding_mask=~keep), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_decoder_block_equals_torchs_decoder_layer(norm):
    torch.manual_seed(0)
    theirs = torch.nn.TransformerDecoderLayer(
        16, 4, 32, 0.0, "relu", batch_first=True, norm_first=norm == "pre"
    )
    ours = DecoderBlock(CAUSAL, CROSS, 16, 4, mlp_ratio=2.0, activation="relu", norm=norm, norm_eps=1e-5)
    state = theirs.state_dict()
    w, b = state.pop("multihead_attn.in_proj_weight"), state.pop("multihead_attn.in_proj_bias")
    for i, part in enumerate("qkv"):
        state[f"cross.{part}.weight"] = w[16 * i : 16 * (i + 1)]
        state[f"cross.{part}.bias"] = b[16 * i : 16 * (i + 1)]
    names = {
        "multihead_attn.out_proj": "cross.proj",
        "self_attn.in_proj_": "attn.qkv.",
        "self_attn.out_proj": "attn.proj",
        "linear": "mlp.fc",
        "norm2": "norm_cross",
        "norm3": "norm2",
    }
    for old, new in names.items():
        state = {k.replace(old, new) if old in k else k: v for k, v in state.items()}
    ours.load_state_dict(state)
    x, context = torch.randn(2, 5, 16), torch.randn(2, 6, 16)
    keep = torch.ones(2, 6, dtype=torch.bool)
    keep[0, 4:] = False
    causal = torch.nn.Transformer.generate_square_subsequent_mask(5)
    expected = theirs(x, context, tgt_mask=causal, tgt_is_causal=True, memory_key_padding_mask=~keep)
    torch.testing.assert_close(ours(x, context, context_key_mask=keep), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_steps_equal_the_parallel_form(norm):
    torch.manual_seed(0)
    x, context = torch.randn(2, 5, 16), torch.randn(2, 6, 12)
    keep = torch.ones(2, 6, dtype=torch.bool)
    keep[0, 4:] = False
    with torch.no_grad():
        block = TransformerBlock(CAUSAL, 16, 4, norm=norm).eval()
        state, outputs = block.init_state(2), []
        for t in range(5):
            out, state = block.step(x[:, t : t + 1], state)
            outputs.append(out)
        torch.testing.assert_close(torch.cat(outputs, 1), block(x), atol=1e-5, rtol=1e-5)
        decoder = DecoderBlock(CAUSAL, CROSS, 16, 4, context_dim=12, norm=norm).eval()
        state, outputs = decoder.init_state(2, context, context_key_mask=keep), []
        for t in range(5):
            out, state = decoder.step(x[:, t : t + 1], state)
            outputs.append(out)
        torch.testing.assert_close(
            torch.cat(outputs, 1), decoder(x, context, context_key_mask=keep), atol=1e-5, rtol=1e-5
        )


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_block_keeps_the_first_tokens(norm):
    torch.manual_seed(0)
    block, x = TransformerBlock(SELF, 16, 4, norm=norm), torch.randn(3, 6, 16)
    torch.testing.assert_close(block(x, keep=2), block(x)[:, :2])


def test_block_errors():
    with pytest.raises(ConfigError, match="num_heads=3 must divide dim=16"):
        TransformerBlock(SELF, 16, 3)
    with pytest.raises(ConfigError, match="did you mean 'post'"):
        DecoderBlock(SELF, CROSS, 16, 4, norm="pst")


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_mlp(activation):
    mlp = Mlp(6, 10, activation=activation).double()
    x = torch.randn(4, 3, 6, dtype=torch.double)
    act = {"swiglu": F.silu, "geglu": F.gelu, "reglu": F.relu, "tanh": torch.tanh}.get(activation)
    act = act or getattr(F, activation)
    y = F.linear(x, mlp.fc1.weight, mlp.fc1.bias)
    y = act(y[..., :10]) * y[..., 10:] if activation.endswith("glu") else act(y)
    torch.testing.assert_close(mlp(x), F.linear(y, mlp.fc2.weight, mlp.fc2.bias))


def test_drop_path_keeps_the_mean_and_drops_whole_samples():
    torch.manual_seed(0)
    drop = DropPath(0.25)
    out = drop(torch.ones(4000, 3, 2))
    rows = out.flatten(1)
    assert torch.equal(rows, rows[:, :1].expand_as(rows))
    assert set(rows.unique().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    assert out.mean().item() == pytest.approx(1.0, abs=0.05)
    assert torch.equal(drop.eval()(out), out)
    assert depth_rates(0.3, 4) == pytest.approx([0.0, 0.1, 0.2, 0.3])
    assert depth_rates(0.3, 1) == [0.3]


def test_sine_positions():
    table = sine_positions(50, 16)
    assert table.shape == (50, 16)
    # A shift is a rotation, so that products depend on the distance alone.
    products = table @ table.T
    torch.testing.assert_close(products[3, 7], products[30, 34], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(sine_positions(torch.tensor([2.0]), 16)[0], table[2])
    grid = sine_positions_2d(3, 5, 8).unflatten(0, (3, 5))
    torch.testing.assert_close(grid[1, 4], torch.cat((sine_positions(3, 4)[1], sine_positions(5, 4)[4])))
    with pytest.raises(ConfigError, match="divisible by 4"):
        sine_positions_2d(2, 2, 6)


def test_resampling_keeps_prefix_and_ramps():
    ramp = torch.arange(8.0)[:, None, None].expand(8, 8, 1).reshape(1, 64, 1)
    table = torch.cat((torch.full((1, 2, 1), -5.0), ramp), dim=1)
    out = resample_positions(table, (8, 8), (4, 4), prefix=2)
    assert out[0, :2].flatten().tolist() == [-5.0, -5.0]
    rows = out[0, 2:].reshape(4, 4)
    torch.testing.assert_close(rows, rows[:, :1].expand(4, 4), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(rows + rows.flip(0), torch.full((4, 4), 7.0), atol=1e-4, rtol=1e-4)
    assert rows[:, 0].diff().tolist() == pytest.approx([2.0, 2.0, 2.0], abs=0.15)
    with pytest.raises(ConfigError, match="grid of 7 x 7"):
        resample_positions(table, (7, 7), (4, 4), prefix=2)


def test_patch_embedding_is_the_strided_convolution():
    embed = PatchEmbed(3, 5, (2, 4))
    images = torch.randn(2, 3, 6, 8).transpose(2, 3).contiguous().transpose(2, 3)
    expected = F.conv2d(images, embed.proj.weight, embed.proj.bias, stride=(2, 4)).flatten(2).transpose(1, 2)
    torch.testing.assert_close(embed(images), expected, atol=1e-5, rtol=1e-5)


def test_conv_stem_reaches_the_grid():
    for patch in (2, 4, 8):
        stem = ConvStem(3, 32, patch)
        assert stem(torch.randn(2, 3, 16, 24)).shape == (2, (16 // patch) * (24 // patch), 32)
    with pytest.raises(ConfigError, match="power of two"):
        ConvStem(3, 32, 6)


def test_pools():
    x = torch.randn(3, 5, 8)
    keep = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]], dtype=torch.bool)
    pooled = mean_pool(x, keep)
    torch.testing.assert_close(pooled[0], x[0, :3].mean(0))
    torch.testing.assert_close(mean_pool(x)[1], pooled[1])
    assert pooled[2].abs().max() == 0
    pool = AttentionPool(CROSS, 8, 2, queries=3)
    out = pool(x, key_mask=keep)
    assert out.shape == (3, 3, 8)
    changed = x.clone()
    changed[0, 3:] = 9.0
    torch.testing.assert_close(pool(changed, key_mask=keep)[0], out[0])
