"""Conversion keeps what maps, teaches what is new, and says what it did."""

import pytest
import timm
import torch

import zoo
from zoo.conversion import convert
from zoo.errors import CapabilityError, ConfigError

SMALL = {"depth": 2, "dim": 16, "num_heads": 2, "image_size": 14, "patch_size": 2, "stem": "patch"}


def small(attention="softmax"):
    torch.manual_seed(0)
    return zoo.create_model("vit_micro", attention=attention, **SMALL).eval()


def peer():
    torch.manual_seed(0)
    shape = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
    return timm.models.VisionTransformer(**shape).eval()


def test_swapping_softmax_for_softmax_changes_nothing():
    images = torch.randn(3, 1, 14, 14)
    converted, report = convert(small(), "softmax")
    assert torch.equal(converted(images), small()(images))
    assert len(report.kept) == 8 and not report.new and not report.dropped and len(report.layers) == 2


def test_timm_model_with_our_softmax_gives_its_logits():
    images = torch.randn(3, 3, 16, 16)
    converted, report = convert(peer(), "softmax")
    assert (converted(images) - peer()(images)).abs().max() < 1e-5
    assert report.layers == ["blocks.0.attn", "blocks.1.attn"]


@pytest.mark.parametrize("objective, attention", [("output", "mala"), ("map", "linear")])
def test_transfer_brings_the_outputs_nearer(objective, attention):
    model = small()
    with torch.no_grad():  # attention that is worth imitating
        for block in model.blocks:
            block.attn.qkv.weight.mul_(3)
    batches = [torch.randn(16, 1, 14, 14) for _ in range(5)]
    untaught, before = convert(model, attention)
    taught, report = convert(model, attention, calibrate=batches, objective=objective, epochs=15)
    assert not before.losses and min(report.losses) < 0.97 * report.losses[0]
    assert not any(module.training for module in taught.modules())
    if attention == "mala":
        assert any("gate" in name for name in report.new) and len(report.kept) == 8
        images = torch.randn(8, 1, 14, 14)
        distance = [(m(images) - model(images)).norm() for m in (untaught, taught)]
        assert distance[1] < distance[0]


def test_the_original_is_left_alone_and_one_layer_can_be_swapped():
    model, images = small(), torch.randn(2, 1, 14, 14)
    before = model(images)
    converted, report = convert(model, "mala", layers=[1])
    assert torch.equal(model(images), before)
    assert report.layers == ["blocks.1.attn"] and converted.blocks[0].attn.name == "softmax"


def test_dropout_and_missing_biases_stay():
    model = zoo.create_model("vit_micro", attention="softmax", **SMALL, qkv_bias=False, dropout=0.1)
    converted, report = convert(model, "mala")
    attention = converted.blocks[0].attn
    assert attention.qkv.bias is None and attention.proj_drop.p == model.blocks[0].attn.proj_drop.p == 0.1
    assert not any(name.endswith("qkv.bias") for name in report.new)


def test_what_cannot_be():
    with pytest.raises(ConfigError, match="layers 0 ... 1"):
        convert(small(), "mala", layers=[2])
    with pytest.raises(CapabilityError, match="objective='output'"):
        convert(small(), "mala", objective="map")
    with pytest.raises(ConfigError, match="no self-attention"):
        convert(torch.nn.Linear(2, 2), "mala")
    with pytest.raises(ConfigError, match="did you mean 'mala'"):
        convert(small(), "malla")
    with pytest.raises(ConfigError, match="at least 2 batches"):
        convert(small(), "mala", calibrate=[torch.randn(2, 1, 14, 14)])


@pytest.mark.parametrize(
    "options",
    [
        {"reg_tokens": 2, "init_values": 0.1, "no_embed_class": True},
        {"class_token": False, "global_pool": "avg", "qkv_bias": False},
        {"qk_norm": True, "pre_norm": True},
    ],
    ids=["registers", "no-token", "qk-norm"],
)
def test_any_timm_vision_transformer_is_converted_and_taught(options):
    torch.manual_seed(0)
    shape = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
    model = timm.models.VisionTransformer(**shape, **options).eval()
    batches = [torch.randn(8, 3, 16, 16) for _ in range(5)]
    own = {"qk_norm": True} if options.get("qk_norm") else {}
    same, report = convert(model, "softmax", options=own)
    assert (same(batches[0]) - model(batches[0])).abs().max() < 1e-5 and not report.dropped and not report.new
    converted, report = convert(model, "mala", calibrate=batches, epochs=8)
    assert min(report.losses) < report.losses[0] and "transfer loss" in str(report)
    assert bool(report.dropped) == bool(own)


def test_layers_with_masks_are_taught_with_their_masks():
    torch.manual_seed(0)
    model = zoo.create_model("aed", dim=16, num_heads=2, encoder_layers=1, decoder_layers=1, n_mels=16).eval()
    sound = [(torch.randn(4, 4000), torch.tensor([4000, 3000, 2000, 1500])) for _ in range(4)]
    converted, report = convert(model, "mala", calibrate=sound, epochs=10)
    assert min(report.losses) < report.losses[0]
    assert report.layers == ["encoder.0.attn"] and converted.decoder[0].attn.name == "softmax"
    # What lies behind the end of a recording is of no importance to the taught layer either.
    louder = sound[0][0].clone()
    louder[3, 1500:] += 5
    after = [converted.encode(audio, sound[0][1])[0][3] for audio in (sound[0][0], louder)]
    places = int(converted.encode(*sound[0])[1][3])
    torch.testing.assert_close(after[0][:places], after[1][:places])


def test_fine_tuning_trains_the_whole_model_and_keeps_its_best():
    model = small()
    labels = torch.arange(80) % 10
    images = torch.randn(80, 1, 14, 14) + labels[:, None, None, None] / 3
    batches = list(zip(images.split(16), labels.split(16), strict=True))
    converted, report = convert(model, "mala", fine_tune=batches, fine_tune_epochs=6, fine_tune_lr=3e-3)
    assert min(report.tuning_losses) < report.tuning_losses[0] and "fine-tuning loss" in str(report)
    found = torch.nn.functional.cross_entropy(converted(batches[0][0]), batches[0][1])
    assert float(found.detach()) == pytest.approx(min(report.tuning_losses), rel=1e-5)
    assert not converted.training and not torch.equal(converted.head.weight, model.head.weight)
