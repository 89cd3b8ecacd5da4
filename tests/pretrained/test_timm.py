"""timm's vision transformers as ours and back, by timm's own names; what ours lacks is refused by name."""

import pytest
import timm
import torch

import zoo
from zoo.errors import WeightsError
from zoo.pretrained.from_timm import to_timm

NAMES = {
    "vit_tiny_patch16_224": {},
    "deit3_small_patch16_224": {},  # LayerScale, no position for the class token
    "vit_small_patch14_reg4_dinov2": {"img_size": 28},  # four registers
    "vit_mediumd_patch16_reg4_gap_256": {},  # registers, no class token, mean pooling
    "vit_giant_patch14_reg4_dinov2": {"img_size": 28},  # gated MLP
    "vit_tiny_patch16_224 with qk-norm": {"qk_norm": True, "qkv_bias": False},
    "vit_tiny_patch16_224 rectangular": {"img_size": (32, 64), "reg_tokens": 2},
}


def peer(name, **options):
    torch.manual_seed(0)
    shape = {"embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 5, "img_size": 32, **options}
    model = timm.create_model(name.split()[0], **shape).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_equal_both_ways(name):
    theirs = peer(name, **NAMES[name])
    ours = zoo.from_timm(theirs)
    images = torch.randn(2, 3, *theirs.patch_embed.img_size)
    expected = theirs(images)
    assert expected.std() > 0.1 and (ours(images) - expected).abs().max() < 1e-5
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.mul_(1.1)
    to_timm(ours, theirs)
    assert (theirs(images) - ours(images)).abs().max() < 1e-5 < (theirs(images) - expected).abs().max()


def test_other_attention_keeps_what_maps():
    theirs = peer("vit_tiny_patch16_224")
    ours = zoo.from_timm(theirs, "mala")
    assert torch.equal(ours.blocks[1].attn.qkv.weight, theirs.blocks[1].attn.qkv.weight)
    report = ours.load_report
    assert report["kept"] == len(theirs.state_dict()) and not report["dropped"]
    assert report["new"] and all(".attn." in name for name in report["new"])
    with pytest.raises(WeightsError, match="our attention here is mala"):
        to_timm(ours, theirs)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("vit_base_patch16_clip_224", "another eps"),
        ("vit_base_patch16_siglip_224", "pooling 'map'"),
        ("vit_medium_patch16_gap_240", "norm.bias"),
        ("vit_small_patch16_18x2_224", "no plain timm VisionTransformer"),
        ("deit_tiny_distilled_patch16_224", "dist"),
    ],
)
def test_what_ours_lacks_is_named(name, reason):
    options = {"depth": 1, "embed_dim": 48, "num_heads": 3, "img_size": 32, "num_classes": 5}
    with pytest.raises(WeightsError, match=reason):
        zoo.from_timm(timm.create_model(name, **options))
    with pytest.raises(WeightsError, match="no plain timm VisionTransformer"):
        zoo.from_timm(torch.nn.Linear(2, 2))
