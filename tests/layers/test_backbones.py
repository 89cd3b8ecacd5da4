"""timm models as backbones: shapes, padding, names, published weights, whole models."""

import pytest
import torch

from tasks._detection_losses import detection_losses
from tasks._matching import Weights
from zoo.attention.slots import resolve_slots
from zoo.errors import ConfigError
from zoo.layers.backbones import load_pretrained_backbone, make_backbone
from zoo.layers.pyramid import valid_pixels
from zoo.models import get_model

timm = pytest.importorskip("timm", reason="timm is not installed")


def build(name="test_resnet", stride=8, size=64):
    return make_backbone(name, 3, 32, stride=stride, stem_width=8, image_size=size)


@pytest.mark.parametrize(
    ("name", "stride", "strides"),
    [("test_resnet", 8, (2, 4, 8)), ("test_convnext", 16, (4, 8, 16)), ("test_vit", 16, (16,))],
)
@pytest.mark.parametrize("size", [(64, 64), (37, 51)])
def test_maps_have_the_strides_that_heads_expect(name, stride, strides, size):
    body = build(name, stride).eval()
    maps = body(torch.randn(2, 3, *size))
    full = [-(-s // stride) * stride for s in size]
    assert [tuple(m.shape[-2:]) for m in maps] == [tuple(f // s for f in full) for s in strides]
    assert [m.shape[1] for m in maps] == list(body.widths) and body.widths[-1] == 32


def test_padding_is_zero_in_every_map():
    body = build().eval()
    size = torch.tensor([[64, 64], [32, 48]])
    maps = body(torch.randn(2, 3, 64, 64), valid_pixels(size, 64, 64))
    for stride, found in zip((2, 4, 8), maps, strict=True):
        assert (
            found[1, :, 32 // stride :].abs().max() == 0 and found[1, :, :, 48 // stride :].abs().max() == 0
        )
        assert found[1, :, : 32 // stride, : 48 // stride].abs().max() > 0
    hidden = torch.randn(2, 3, 64, 64)
    other = hidden.clone()
    other[1, :, 32:] = 7.0
    pair = [body(x, valid_pixels(size, 64, 64))[-1] for x in (hidden, other)]
    assert torch.equal(*pair)


def test_bad_names_and_strides_name_the_way_out():
    with pytest.raises(ConfigError, match="did you mean '.*resnet18"):
        build("resnet_18")
    with pytest.raises(ConfigError, match=r"maps of stride 16, none of 8"):
        build("test_vit", 8)
    with pytest.raises(ConfigError, match="power of two"):
        build(None, 6)


def test_published_weights_replace_the_start_and_freeze_statistics(monkeypatch):
    model = torch.nn.Module()
    model.stem = build()
    create = timm.create_model

    def published(name, pretrained=False, **options):
        body = create(name, **options)
        for p in body.parameters():
            p.data.fill_(0.25 if pretrained else 0.5)
        return body

    monkeypatch.setattr(timm, "create_model", published)
    load_pretrained_backbone(model)
    assert all(torch.all(p == 0.25) for p in model.stem.body.parameters())
    norms = [m for m in model.train().modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert norms and not any(m.training for m in norms) and model.stem.project.training
    model.stem = build(None)
    with pytest.raises(ConfigError, match=r"model\.backbone=resnet18"):
        load_pretrained_backbone(model)


def test_detector_on_a_timm_backbone_trains():
    options = dict(
        backbone="test_vit", stride=16, dim=32, queries=4, many_queries=4, decoder_depth=1, padded=True
    )
    cls = get_model("plain_detr")
    model = cls(resolve_slots(cls.slots(**options), {"name": "softmax"}, task="detr"), **options)
    out = model(torch.randn(2, 3, 64, 64), torch.tensor([[64, 64], [40, 64]]))
    labels, boxes = torch.tensor([[1], [2]]), torch.full((2, 1, 4), 0.4)
    sum(detection_losses(out, labels, boxes, Weights(), delta=True).values()).backward()
    assert all(p.grad is not None for p in model.stem.parameters())


@pytest.mark.parametrize("head", ["linear", "upernet", "macmd", "eomt"])
def test_segmenter_on_a_timm_backbone(head):
    options = dict(backbone="test_resnet", dim=32, depth=2, head=head, head_width=16)
    cls = get_model("segmenter")
    model = cls(resolve_slots(cls.slots(**options), {"name": "softmax"}, task="segmentation"), **options)
    out = model(torch.randn(2, 3, 40, 56))
    assert out.shape == (2, 11, 40, 56)
    out.sum().backward()
