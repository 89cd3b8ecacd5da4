"""The vision transformer against timm's, and its own invariants."""

import pytest
import torch
from torch import nn

from zoo.attention.registry import get_attention
from zoo.attention.slots import Slot
from zoo.errors import ConfigError, WeightsError
from zoo.layers.flops import count_flops
from zoo.models import create_model
from zoo.models.vit import VisionTransformer

timm_vit = pytest.importorskip("timm.models.vision_transformer", reason="timm is not installed")
timm_layers = pytest.importorskip("timm.layers", reason="timm is not installed")

SMALL = {"image_size": 16, "patch_size": 4, "dim": 24, "depth": 2, "num_heads": 3, "num_classes": 5}
SMALL |= {"in_channels": 3, "stem": "patch"}


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter random and sizeable, so that a wrong or ignored one shows in the output."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            scale = 0.5 if p.dim() < 2 else 0.3
            p.copy_(torch.randn(p.shape, generator=generator) * scale)
            if name.endswith(("norm1.weight", "norm2.weight", "norm.weight", "gamma")):
                p.add_(1.0)
    return model.eval()


def timm_small(**kwargs):
    return timm_vit.VisionTransformer(
        **{
            "img_size": 16,
            "patch_size": 4,
            "in_chans": 3,
            "num_classes": 5,
            "embed_dim": 24,
            "depth": 2,
            "num_heads": 3,
            "mlp_ratio": 2.0,
        }
        | kwargs
    )


ARCHITECTURES = {
    "token": ({}, {"class_token": True, "pool": "token"}),
    "mean": (
        {"class_token": False, "global_pool": "avg"},
        {"class_token": False, "pool": "mean"},
    ),
    "token-mean": ({"global_pool": "avg"}, {"class_token": True, "pool": "mean"}),
    "registers-layerscale-noembed": (
        {"reg_tokens": 4, "no_embed_class": True, "init_values": 1e-5},
        {
            "class_token": True,
            "pool": "token",
            "num_registers": 4,
            "no_embed_class": True,
            "layer_scale": 1e-5,
        },
    ),
    "registers-mean": (
        {"reg_tokens": 2, "global_pool": "avg"},
        {"class_token": True, "pool": "mean", "num_registers": 2},
    ),
    "prenorm-nobias": (
        {"pre_norm": True, "qkv_bias": False},
        {"class_token": True, "pool": "token", "pre_norm": True, "qkv_bias": False},
    ),
    "swiglu": (
        {"mlp_layer": timm_layers.SwiGLUPacked, "act_layer": nn.SiLU, "mlp_ratio": 4.0},
        {"class_token": True, "pool": "token", "activation": "swiglu"},
    ),
    "rectangular": (
        {"img_size": (16, 24), "patch_size": 8},
        {"class_token": True, "pool": "token", "image_size": (16, 24), "patch_size": 8},
    ),
}


@pytest.mark.parametrize("key", ARCHITECTURES)
def test_timm_parity_both_ways(key):
    theirs_options, ours_options = ARCHITECTURES[key]
    theirs = randomise(timm_small(**theirs_options))
    ours = create_model("vit", **{**SMALL, "mlp_ratio": 2.0, **ours_options}).eval()
    images = torch.randn(3, 3, *ours.image_size, generator=torch.Generator().manual_seed(1))
    ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(ours(images), theirs(images), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        ours.forward_features(images), theirs.forward_features(images), atol=1e-5, rtol=1e-5
    )
    randomise(ours, seed=2)
    theirs.load_state_dict(ours.state_dict())
    torch.testing.assert_close(theirs(images), ours(images), atol=1e-5, rtol=1e-5)


@pytest.mark.skipif(
    "qk_norm" not in get_attention("softmax").options(), reason="softmax has no qk_norm option"
)
def test_timm_parity_with_qk_norm():
    theirs = randomise(timm_small(qk_norm=True))
    attention = {"name": "softmax", "qk_norm": True}
    options = {**SMALL, "mlp_ratio": 2.0, "class_token": True, "pool": "token"}
    ours = create_model("vit", attention=attention, **options).eval()
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(ours(images), theirs(images), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", ["tiny", "small", "base"])
def test_named_sizes_are_timms(size):
    with torch.device("meta"):
        theirs = timm_vit.VisionTransformer(
            **{
                "tiny": {"embed_dim": 192, "num_heads": 3},
                "small": {"embed_dim": 384, "num_heads": 6},
                "base": {"embed_dim": 768, "num_heads": 12},
            }[size]
        )
        ours = create_model(f"vit_{size}")
    shapes = {k: v.shape for k, v in theirs.state_dict().items()}
    assert {k: v.shape for k, v in ours.state_dict().items()} == shapes
    assert ours.blocks[0].attn.num_heads == theirs.blocks[0].attn.num_heads


def test_architecture_of_a_timm_checkpoint_gives_equal_logits():
    timm = pytest.importorskip("timm", reason="timm is not installed")
    torch.manual_seed(0)
    theirs = timm.create_model("vit_tiny_patch16_224", num_classes=7).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(0.02 * torch.randn_like(p))
    ours = create_model("vit_tiny", num_classes=7).eval()
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        expected = theirs(images)
        assert expected.std() > 0.1
        torch.testing.assert_close(ours(images), expected, atol=1e-5, rtol=0)


def test_micro_is_small_and_takes_grey_28():
    model = create_model("vit_micro")
    assert sum(p.numel() for p in model.parameters()) == 156_618
    assert model(torch.randn(2, 1, 28, 28)).shape == (2, 10)
    assert model.grid.shape == (7, 7)
    assert model.pos_embed.std().item() == pytest.approx(0.5, rel=0.1)


def test_patch_permutation_moves_tokens_when_positions_move_alike():
    model = randomise(create_model("vit", **SMALL, class_token=True, pool="token"))
    images = torch.randn(2, 3, 16, 16)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(3))
    patches = images.reshape(2, 3, 4, 4, 4, 4).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
    shuffled = patches[:, order].unflatten(1, (4, 4)).permute(0, 3, 1, 4, 2, 5).reshape(2, 3, 16, 16)
    expected = model.forward_features(images)
    logits = model(images)
    assert not torch.allclose(model(shuffled), logits, atol=1e-3)
    with torch.no_grad():
        model.pos_embed[:, 1:] = model.pos_embed[:, 1:][:, order]
    torch.testing.assert_close(model(shuffled), logits, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(
        model.forward_features(shuffled)[:, 1:], expected[:, 1:][:, order], atol=1e-5, rtol=1e-4
    )


@pytest.mark.parametrize("stem", ["patch", "conv"])
def test_logits_do_not_depend_on_the_batch(stem):
    model = randomise(create_model("vit_micro", stem=stem, drop_path=0.4, dropout=0.3))
    images = torch.randn(5, 1, 28, 28)
    alone = torch.cat([model(image[None]) for image in images])
    torch.testing.assert_close(model(images), alone, atol=1e-4, rtol=1e-4)


def test_drop_path_acts_in_training_only():
    torch.manual_seed(0)
    model = randomise(create_model("vit", **SMALL, class_token=True, pool="token", drop_path=0.5))
    images = torch.randn(8, 3, 16, 16)
    assert torch.equal(model(images), model(images))
    model.train()
    assert not torch.equal(model(images), model(images))
    assert [b.drop_path1.p if hasattr(b.drop_path1, "p") else 0.0 for b in model.blocks] == [0.0, 0.5]


def test_save_and_load_is_the_identity(tmp_path):
    model = randomise(create_model("vit_micro", num_registers=2, layer_scale=0.1))
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    other = create_model("vit_micro", num_registers=2, layer_scale=0.1).eval()
    images = torch.randn(2, 1, 28, 28)
    assert not torch.equal(other(images), model(images))
    other.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    assert torch.equal(other(images), model(images))


@pytest.mark.parametrize("no_embed_class", [False, True])
def test_weights_of_another_grid_are_resampled_as_timm_does(no_embed_class):
    options = {**SMALL, "class_token": True, "pool": "token", "no_embed_class": no_embed_class}
    source = randomise(create_model("vit", **options))
    target = create_model("vit", **{**options, "image_size": (16, 32)}).eval()
    target.load_state_dict(source.state_dict())
    own = 0 if no_embed_class else 1
    expected = timm_layers.resample_abs_pos_embed(
        source.pos_embed.detach(), new_size=[4, 8], num_prefix_tokens=own
    )
    torch.testing.assert_close(target.pos_embed.detach(), expected, atol=1e-6, rtol=1e-6)
    assert source.pos_embed.shape[1] == 16 + own
    images = torch.randn(2, 3, 16, 32)
    torch.testing.assert_close(source(images), target(images), atol=1e-5, rtol=1e-5)


def test_position_rows_of_prefix_tokens_move_into_the_tokens():
    source = randomise(create_model("vit", **SMALL, class_token=True, pool="token", num_registers=2))
    target = create_model(
        "vit", **SMALL, class_token=True, pool="token", num_registers=2, no_embed_class=True
    ).eval()
    target.load_state_dict(source.state_dict())
    images = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(target(images), source(images), atol=1e-5, rtol=1e-5)
    headless = create_model("vit", **SMALL, class_token=False, pool="mean")
    adapted = headless.adapt_state_dict(source.state_dict())
    assert torch.equal(adapted["pos_embed"], source.pos_embed[:, 3:])


def test_a_table_of_unknown_grid_is_refused():
    with pytest.raises(WeightsError, match="image_size"):
        create_model("vit", **SMALL, class_token=False, pool="mean").adapt_state_dict(
            {"pos_embed": torch.zeros(1, 19, 24)}
        )


def test_one_graph_under_torch_compile():
    model = randomise(create_model("vit_micro", class_token=True, pool="token"))
    images = torch.randn(2, 1, 28, 28)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(images), model(images), atol=1e-5, rtol=1e-5)


def test_initialisation_is_the_one_asked_for():
    xavier = create_model("vit_micro", init="xavier").blocks[0].mlp.fc1.weight
    timm = create_model("vit_micro", init="timm").blocks[0].mlp.fc1.weight
    assert xavier.std().item() == pytest.approx((2 / (64 + 128)) ** 0.5, rel=0.05)
    assert timm.std().item() == pytest.approx(0.02, rel=0.1)


def test_every_parameter_gets_a_gradient():
    model = create_model("vit_micro", class_token=True, num_registers=1, layer_scale=0.1, stem="conv")
    model(torch.randn(2, 1, 28, 28)).square().sum().backward()
    without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert without == []


def test_flops_count_every_product():
    model = create_model("vit", **SMALL, mlp_ratio=2.0, class_token=False, pool="mean")
    n, c = 16, 24
    projections = 2 * (2 * n * (4 * c * c + 2 * 2 * c * c))
    stem, head = 2 * n * 48 * c, 2 * c * 5
    attention = 2 * model.blocks[0].attn.attend_cost(n, n)[0]
    assert count_flops(model, (torch.randn(1, 3, 16, 16),)) == stem + head + projections + attention


def test_slots():
    (slot,) = VisionTransformer.slots(size="tiny").values()
    assert slot == Slot("self", grid_dims=2, length_known=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 5}, "num_heads=5 must divide dim=64"),
        ({"dim": 0}, "dim=0 must be a whole number of at least 1"),
        ({"depth": 2.5}, "depth=2.5"),
        ({"pool": "token"}, "class_token=true, pool='mean' or pool='ep'"),
        ({"pool": "men"}, "did you mean 'mean'"),
        ({"stem": "patc"}, "did you mean 'patch'"),
        ({"init": "xavir"}, "did you mean 'xavier'"),
        ({"size": "tini"}, "did you mean 'tiny'"),
        ({"patch_size": 5}, "stem='patch'"),
        ({"patch_size": 5, "stem": "patch"}, "does not divide into patches of 5"),
        ({"activation": "swigul"}, "did you mean 'swiglu'"),
        ({"drop_path": 1.0}, "drop_path=1.0"),
        ({"dropout": -0.1}, "dropout=-0.1"),
        ({"mlp_ratio": 0.0}, "mlp_ratio"),
        ({"num_registers": -1}, "num_registers=-1"),
    ],
)
def test_bad_options_name_the_way_out(options, message):
    with pytest.raises(ConfigError, match=message):
        create_model("vit", **options)


def test_bad_images_name_the_way_out():
    model = create_model("vit_micro")
    with pytest.raises(ConfigError, match="in_channels"):
        model(torch.randn(2, 3, 28, 28))
    with pytest.raises(ConfigError, match="30 x 28"):
        model(torch.randn(2, 1, 30, 28))


def test_probe_pooling_reads_patches_only_and_starts_as_their_mean():
    model = create_model("vit", **{**SMALL, "num_registers": 2, "pool": "ep", "pool_queries": 4}).eval()
    images = torch.randn(2, 3, 16, 16)
    nn.init.zeros_(model.probe.query)
    tokens = model.forward_features(images)
    mean = model.probe.value(tokens[:, 2:]).mean(1)
    torch.testing.assert_close(model(images), model.head(mean), atol=1e-5, rtol=1e-5)
    with pytest.raises(ConfigError, match="divisible by queries=5"):
        create_model("vit", **{**SMALL, "pool": "ep", "pool_queries": 5})
