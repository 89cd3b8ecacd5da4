"""Matching and losses against plain computations; BoxRPB against its definition; padding and batch mates; training."""

import itertools
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[1] / "data"))
from scene_standins import small_scenes

from tasks._detection_losses import decode, detection_losses, relative_boxes
from tasks._matching import Weights, match, set_losses
from tasks.detection import Detection
from zoo.attention.registry import list_attention
from zoo.attention.slots import resolve_slots
from zoo.errors import CapabilityError, ConfigError, DataError, ZooError
from zoo.layers.box_rpb import BoxRPB, box_bias_reference
from zoo.layers.boxes import apply_delta, delta_between, pairwise_giou, to_cxcywh, to_xyxy
from zoo.models import get_model

SMALL = dict(dim=32, stem_width=8, encoder_depth=1, decoder_depth=2, queries=6, many_queries=4, mlp_ratio=1.0)
WEIGHTS = Weights(2.0, 5.0, 2.0)


def make(name="plain_detr", attention="softmax", **options):
    cls = get_model(name)
    options = {**SMALL, **options} if name == "plain_detr" else options
    return cls(resolve_slots(cls.slots(**options), {"name": attention}, task="detr"), **options)


def problem(layers=2, batch=3, n=5, t=3, k=4):
    logits, boxes = torch.randn(layers, batch, n, k), torch.rand(layers, batch, n, 4) * 0.4 + 0.1
    labels = torch.randint(k, (batch, t))
    labels[1, 1], labels[2] = -1, -1  # a gap, and an image without objects
    return logits, boxes, labels, torch.rand(batch, t, 4) * 0.4 + 0.1


def dense_cost(logits, boxes, label, target):
    """One pair, term by term, from the formulas."""
    p = logits.sigmoid()[label]
    cls = 0.25 * (1 - p) ** 2 * -p.log() - 0.75 * p**2 * -(1 - p).log()
    a, b = to_xyxy(boxes).tolist(), to_xyxy(target).tolist()
    inter = max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inter
    hull = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
    giou = inter / union - (hull - union) / hull
    return 2 * float(cls) + 5 * float((boxes - target).abs().sum()) - 2 * giou, giou


def test_matching_is_the_cheapest_assignment():
    logits, boxes, labels, targets = problem()
    assigned = match(logits, boxes, labels, targets, WEIGHTS)
    for layer, image in itertools.product(range(2), range(3)):
        real = (labels[image] >= 0).nonzero().flatten().tolist()
        cost = {
            (q, t): dense_cost(
                logits[layer, image, q], boxes[layer, image, q], labels[image, t], targets[image, t]
            )[0]
            for q in range(5)
            for t in real
        }
        best = min(
            sum(cost[q, t] for q, t in zip(order, real, strict=True))
            for order in itertools.permutations(range(5), len(real))
        )
        own = [(q, t) for q, t in enumerate(assigned[layer, image].tolist()) if t >= 0]
        assert sorted(t for _, t in own) == real
        assert sum(cost[pair] for pair in own) == pytest.approx(best, abs=1e-4)


def test_losses_equal_a_dense_computation():
    logits, boxes, labels, targets = problem()
    assigned = match(logits, boxes, labels, targets, WEIGHTS)
    found = set_losses(logits, boxes, labels, targets, assigned, WEIGHTS)
    cls = l1 = giou = 0.0
    for layer, image, q in itertools.product(range(2), range(3), range(5)):
        t = int(assigned[layer, image, q])
        truth = torch.zeros(4)
        if t >= 0:
            truth[labels[image, t]] = 1
            l1 += float((boxes[layer, image, q] - targets[image, t]).abs().sum())
            giou += (
                1
                - dense_cost(
                    logits[layer, image, q], boxes[layer, image, q], labels[image, t], targets[image, t]
                )[1]
            )
        p = logits[layer, image, q].sigmoid()
        pt, alpha = torch.where(truth > 0, p, 1 - p), torch.where(truth > 0, 0.25, 0.75)
        cls += float((-alpha * (1 - pt) ** 2 * pt.log()).sum())
    count = int((labels >= 0).sum())
    assert float(found["class"]) == pytest.approx(2 * cls / count, rel=1e-4)
    assert float(found["l1"]) == pytest.approx(5 * l1 / count, rel=1e-4)
    assert float(found["giou"]) == pytest.approx(2 * giou / count, rel=1e-4)


@pytest.mark.parametrize("kind", ["focal", "mal"])
def test_order_of_objects_and_queries_does_not_matter(kind):
    logits, boxes, labels, targets = problem()
    order, objects = torch.randperm(5), torch.randperm(3)

    def total(lo, bo, la, ta):
        return set_losses(lo, bo, la, ta, match(lo, bo, la, ta, WEIGHTS), WEIGHTS, kind=kind)

    first = total(logits, boxes, labels, targets)
    second = total(logits[:, :, order], boxes[:, :, order], labels[:, objects], targets[:, objects])
    assert all(torch.allclose(first[k], second[k], atol=1e-5) for k in first)


@pytest.mark.parametrize("kind", ["focal", "mal"])
def test_half_precision_outputs_lose_nothing(kind):
    logits, boxes, labels, targets = problem()
    half = {"logits": logits.bfloat16(), "boxes": boxes.bfloat16()}
    single = {name: t.float() for name, t in half.items()}
    found, wanted = (detection_losses(out, labels, targets, WEIGHTS, kind=kind) for out in (half, single))
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)


def test_one_to_many_gives_every_object_its_queries():
    logits, boxes, labels, targets = problem(n=9, t=3)
    assigned = match(logits, boxes, labels, targets, WEIGHTS, repeat=3)
    assert [int((assigned[0, 0] == t).sum()) for t in range(3)] == [3, 3, 3]
    assert int((assigned[0, 1] >= 0).sum()) == 6 and int((assigned[0, 2] >= 0).sum()) == 0


def test_a_bad_cost_names_image_and_term():
    logits, boxes, labels, targets = problem()
    boxes[1, 1, 2, 0] = float("nan")
    with pytest.raises(ZooError, match="the l1 cost of image seven.*layer 1"):
        match(logits, boxes, labels, targets, WEIGHTS, names=["six", "seven", "eight"])


def test_softmax_loss_counts_unmatched_queries_as_no_object():
    logits, boxes, labels, targets = problem(layers=1)
    labels = labels.clamp(max=2)
    assigned = match(logits, boxes, labels, targets, WEIGHTS, softmax=True)
    found = set_losses(logits, boxes, labels, targets, assigned, WEIGHTS, kind="softmax")
    classes = torch.full((3, 5), 3)
    for image, q in itertools.product(range(3), range(5)):
        if (t := int(assigned[0, image, q])) >= 0:
            classes[image, q] = labels[image, t]
    wanted = F.cross_entropy(
        logits[0].flatten(0, 1), classes.flatten(), weight=torch.tensor([1.0, 1, 1, 0.1])
    )
    assert torch.allclose(found["class"], 2 * wanted)


def test_boxes():
    boxes = torch.rand(6, 4) + 0.1
    assert torch.allclose(to_cxcywh(to_xyxy(boxes)), boxes, atol=1e-6)
    assert torch.allclose(pairwise_giou(to_xyxy(boxes), to_xyxy(boxes)).diagonal(), torch.ones(6))
    ops = pytest.importorskip("torchvision.ops", reason="torchvision is not installed")
    other = torch.rand(4, 4) + 0.1
    theirs = ops.generalized_box_iou(to_xyxy(boxes), to_xyxy(other))
    assert torch.allclose(pairwise_giou(to_xyxy(boxes), to_xyxy(other)), theirs, atol=1e-6)
    assert torch.allclose(apply_delta(other, delta_between(other, boxes[:4])), boxes[:4], atol=1e-5)
    flat = torch.zeros(1, 4)
    assert torch.isfinite(pairwise_giou(flat, flat)).all()


@pytest.mark.parametrize("offsets", ["log", "linear"])
def test_box_bias_factors_equal_the_definition(offsets):
    layer = BoxRPB(3, hidden=8, offsets=offsets).double()
    boxes = to_xyxy(torch.rand(2, 4, 4, dtype=torch.float64) * 3 + 0.5)
    factors, plain = layer(boxes, (2, 3)), box_bias_reference(layer, boxes, (2, 3))
    assert torch.allclose(factors.dense(), plain, atol=1e-12)
    weight = torch.randn_like(plain)
    grads = [
        torch.autograd.grad((b * weight).sum(), list(layer.parameters())) for b in (factors.dense(), plain)
    ]
    assert all(torch.allclose(a, b, atol=1e-10) for a, b in zip(*grads, strict=True))
    moved = layer(boxes + torch.tensor([1.0, 1, 1, 1]), (3, 4)).dense().view(2, 3, 4, 3, 4)
    assert torch.allclose(moved[..., 1:, 1:], factors.dense().view(2, 3, 4, 2, 3), atol=1e-10)


def test_a_zero_last_layer_of_the_bias_is_plain_cross_attention():
    model, plain = make(many_queries=0), make(many_queries=0, box_rpb=False)
    for layer in model.rpb:
        torch.nn.init.zeros_(layer.mlp_x[2].weight), torch.nn.init.zeros_(layer.mlp_y[2].weight)
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("rpb")})
    x = torch.randn(2, 3, 64, 64)
    assert torch.allclose(model.eval()(x)["boxes"], plain.eval()(x)["boxes"], atol=1e-5)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("plain_detr", {}),
        ("plain_detr", {"bvr_proposals": 5}),
        ("plain_detr", {"box_form": "sigmoid", "two_stage": False}),
        ("detr", {"dim": 32, "encoder_depth": 1}),
    ],
)
def test_output_does_not_depend_on_padding_or_batch_mates(name, options):
    torch.manual_seed(1)
    model = make(name, padded=True, **options).eval()
    for p in model.parameters():  # zero biases would hide a leak of padding
        p.data += 0.05 * torch.randn_like(p)
    image = torch.randn(1, 3, 48, 40)
    alone = model(image, torch.tensor([[48, 40]]))
    mixed = torch.randn(2, 3, 64, 64)
    mixed[:1, :, :48, :40] = image
    together = model(mixed, torch.tensor([[48, 40], [64, 64]]))
    for key in ("logits", "boxes"):
        assert torch.allclose(alone[key][:, 0], together[key][:, 0], atol=1e-4), key


def test_the_one_to_many_group_does_not_touch_the_other():
    model = make()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        train = model.train()(x)
        model.many_queries = 0
        test = model(x)
    assert "many_logits" in train and "many_logits" not in test
    assert torch.allclose(train["logits"], test["logits"], atol=1e-5)


def test_images_without_objects_have_a_finite_class_loss_only():
    model = make()
    labels, boxes = torch.full((2, 3), -1), torch.zeros(2, 3, 4)
    terms = detection_losses(model(torch.randn(2, 3, 64, 64)), labels, boxes, WEIGHTS, delta=True)
    assert all(torch.isfinite(v) for v in terms.values())
    assert all(float(v) == 0 for k, v in terms.items() if k.endswith(("l1", "giou")))
    sum(terms.values()).backward()


@pytest.mark.parametrize("size", [(1, 1), (8, 64), (37, 51)])
def test_odd_image_sizes(size):
    out = make(padded=True).eval()(torch.randn(1, 3, *size), torch.tensor([size]))
    assert out["boxes"].shape == (2, 1, 6, 4) and torch.isfinite(out["boxes"]).all()


def test_bvr_starts_without_a_preference_and_trains():
    model = make(bvr_proposals=4)
    assert "bvr" in type(model).slots(bvr_proposals=4) and "bvr" not in type(model).slots()
    torch.nn.init.zeros_(model.bridge.offset.weight)
    x = torch.randn(2, 3, 64, 64)
    out = model(x)
    labels, boxes = torch.tensor([[1, 2], [3, -1]]), torch.rand(2, 2, 4) * 0.3 + 0.2
    sum(detection_losses(out, labels, boxes, WEIGHTS, delta=True).values()).backward()
    assert model.bridge.attn.q.weight.grad.abs().max() > 0 and model.bridge.offset.bias.grad.abs().max() > 0
    with pytest.raises(ConfigError, match="two_stage=true"):
        make(bvr_proposals=4, two_stage=False)


def test_decode_scales_clips_and_ranks():
    logits, boxes = (
        torch.tensor([[[0.0, 3.0], [2.0, -5.0]]]),
        torch.tensor([[[0.5, 0.5, 0.5, 2.0], [0.25, 0.5, 0.1, 0.2]]]),
    )
    (corners, scores, labels) = decode(logits, boxes, torch.tensor([[40, 80]]), limit=3)[0]
    assert labels.tolist() == [1, 0, 0] and scores.tolist() == sorted(scores.tolist(), reverse=True)
    assert torch.allclose(corners[0], torch.tensor([20.0, 0, 60, 40]))
    assert torch.allclose(corners[1], torch.tensor([16.0, 16, 24, 24]))
    assert torch.allclose(
        relative_boxes(corners[None, 1:2], torch.tensor([[40, 80]])), boxes[:, 1:2], atol=1e-6
    )


def test_queries_are_a_set():
    model = make(many_queries=0).eval()
    x = torch.randn(1, 3, 64, 64)
    order = torch.randperm(6)
    before = model(x)["logits"]
    model.content.data = model.content.data[order]
    keep = model._references
    model._references = lambda *args: keep(*args)[:, order]
    assert torch.allclose(model(x)["logits"], before[:, :, order], atol=1e-4)


@pytest.mark.parametrize("attention", list_attention())
def test_every_variant_trains_or_refuses(attention):
    data = small_scenes(train_scenes=2, val_scenes=2, test_scenes=2, batch_size=2)
    try:
        model = make(attention=attention)
    except CapabilityError as error:
        assert "slot" in str(error) and "Variants that fit" in str(error)
        return
    task = Detection(model, data)
    trainer = L.Trainer(
        fast_dev_run=True,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(task, datamodule=data)
    assert torch.isfinite(trainer.callback_metrics["train/loss"])
    trainer.test(task, datamodule=data, verbose=False)
    assert 0 <= float(trainer.callback_metrics["test/ap"]) <= 1


PLACES = [
    ("plain_detr", "encoder", {}),
    ("plain_detr", "encoder", {"padded": True}),
    ("plain_detr", "decoder", {}),
    ("plain_detr", "cross", {}),
    ("plain_detr", "cross", {"box_rpb": False, "padded": True}),
    ("plain_detr", "bvr", {"bvr_proposals": 3}),
    ("detr", "encoder", {"dim": 32, "encoder_depth": 1}),
    ("detr", "decoder", {"dim": 32, "encoder_depth": 1}),
    ("detr", "cross", {"dim": 32, "encoder_depth": 1}),
]


@pytest.mark.parametrize("attention", list_attention())
def test_every_slot_takes_the_variant_or_says_why(attention):
    """One slot at a time, the others softmax; through a variant that fits, the loss reaches the image's first layer."""
    images, size = torch.randn(2, 3, 32, 32), torch.tensor([[32, 32], [32, 32]])
    labels, boxes = torch.tensor([[1, -1], [0, 3]]), torch.rand(2, 2, 4) * 0.3 + 0.2
    for name, slot, options in PLACES:
        cls = get_model(name)
        options = {**SMALL, **options} if name == "plain_detr" else options
        options = {**options, "image_size": 32, "queries": 4}
        if name == "plain_detr":
            options["many_queries"] = 5
        try:
            factories = resolve_slots(
                cls.slots(**options), {"name": "softmax"}, {slot: {"name": attention}}, task="detr"
            )
        except CapabilityError as error:
            assert f"slot {slot!r}" in str(error) and "Variants that fit" in str(error)
            continue
        model = cls(factories, **options)
        kind = "softmax" if name == "detr" else "focal"
        out = model(images, size)
        terms = detection_losses(out, labels, boxes, WEIGHTS, kind=kind, delta=name == "plain_detr")
        sum(terms.values()).backward()
        assert all(torch.isfinite(v) for v in terms.values()), (name, slot)
        first = next(model.stem.parameters()).grad
        assert torch.isfinite(first).all() and first.abs().max() > 0, (name, slot)


def test_figures_and_card(tmp_path):
    data = small_scenes(test_scenes=3)
    task = Detection(make(), data)
    trainer = L.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False
    )
    trainer.test(task, datamodule=data, verbose=False)
    names = {p.name for p in task.figures(tmp_path)}
    assert names == {"boxes.png", "query_attention.png", "classes.csv"}
    detections, images = task._tested
    assert sorted(images) == [0, 1, 2] and set(detections[:, 0]) <= set(images)
    assert all((tmp_path / n).stat().st_size for n in names)


def test_data_without_boxes_are_refused():
    class Masks(type(small_scenes())):
        provides = frozenset(("masks",))

    with pytest.raises(DataError, match="no boxes, which task 'detr'"):
        Detection(make(), Masks())
