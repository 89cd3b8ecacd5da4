"""Matched masks: against formulas where masks are constant, right places, void pixels, order, training."""

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[1] / "data"))
from scene_standins import small_scenes

from tasks import _mask_matching as matching
from tasks.segmentation import Segmentation
from zoo.attention.slots import resolve_slots
from zoo.errors import CapabilityError, ConfigError
from zoo.models import create_model, get_model

WEIGHTS = matching.MaskWeights()


def target_of_two():
    """A wide image: class 0 but for class 2 in the top right corner, and a void row."""
    target = torch.zeros(1, 8, 16, dtype=torch.int64)
    target[:, :2, 12:] = 2
    target[:, 7] = 255
    return target


def answer(target, classes=3, queries=4, strength=20.0):
    """Predictions that are right: query 1 for class 0, query 3 for class 2."""
    logits = torch.full((1, 1, queries, classes + 1), -strength)
    logits[..., classes] = strength
    masks = torch.full((1, 1, queries, *target.shape[1:]), -strength)
    for query, k in ((1, 0), (3, 2)):
        logits[0, 0, query, k], logits[0, 0, query, classes] = strength, -strength
        masks[0, 0, query] = torch.where(target[0] == k, strength, -strength)
    return logits, masks


def test_right_answers_cost_nothing_and_moved_ones_do():
    target = target_of_two()
    logits, masks = answer(target)
    # Bilinear reading blurs the borders, where most points lie; far from them nothing is lost.
    terms = matching.mask_set_losses(logits, masks, target, WEIGHTS, points=2000)
    assert float(terms["class"]) < 1e-5
    wrong = masks.clone()
    wrong[0, 0, 3] = masks[0, 0, 3].flip(0)  # the corner at the bottom
    moved = matching.mask_set_losses(logits, wrong, target, WEIGHTS, points=2000)
    assert moved["mask"] > 3 * terms["mask"] and moved["dice"] > 2 * terms["dice"]


def test_terms_of_constant_masks(monkeypatch):
    monkeypatch.setattr(matching, "IMPORTANT", 0.0)
    torch.manual_seed(0)
    target = torch.zeros(1, 10, 10, dtype=torch.int64)
    target[:, :3] = 1
    level = torch.tensor([2.0, -1.0])
    masks = level.view(1, 1, 2, 1, 1).expand(1, 1, 2, 4, 4)
    logits = torch.randn(1, 1, 2, 3)
    found = matching.mask_set_losses(logits, masks, target, WEIGHTS, points=40_000)

    def pair(query, k):
        share = 0.3 if k == 1 else 0.7
        x, p = level[query], level[query].sigmoid()
        mask = share * F.softplus(-x) + (1 - share) * F.softplus(x)
        return float(mask), float(1 - 2 * p * share / (p + share))

    def cost(query, k):
        mask, dice = pair(query, k)
        return 5 * mask + 5 * dice - 2 * float(logits[0, 0, query].softmax(-1)[k])

    straight = cost(0, 0) + cost(1, 1) < cost(0, 1) + cost(1, 0)
    own = [(0, 0), (1, 1)] if straight else [(0, 1), (1, 0)]
    assert float(found["mask"]) == pytest.approx(5 * sum(pair(*o)[0] for o in own) / 2, rel=0.02)
    assert float(found["dice"]) == pytest.approx(5 * sum(pair(*o)[1] for o in own) / 2, rel=0.02)
    truth = torch.tensor([k for _, k in own])
    assert float(found["class"]) == pytest.approx(2 * float(F.cross_entropy(logits[0, 0], truth)), rel=1e-5)


def test_the_order_of_queries_does_not_matter():
    target = target_of_two()
    logits, masks = answer(target, strength=2.0)
    order = torch.tensor([3, 0, 2, 1])
    terms = []
    for pick in (torch.arange(4), order):
        torch.manual_seed(5)
        terms.append(matching.mask_set_losses(logits[:, :, pick], masks[:, :, pick], target, WEIGHTS))
    assert torch.allclose(terms[0]["class"], terms[1]["class"])
    assert all(torch.allclose(terms[0][k], terms[1][k], rtol=0.1) for k in ("mask", "dice"))


def test_void_pixels_have_no_influence():
    target = torch.randint(3, (2, 8, 8))
    target[:, 4:] = 255
    masks = torch.randn(2, 2, 5, 8, 8, requires_grad=True)
    logits = torch.randn(2, 2, 5, 4, requires_grad=True)
    sum(matching.mask_set_losses(logits, masks, target, WEIGHTS).values()).backward()
    assert masks.grad[..., 5:, :].abs().max() == 0  # row 4 reaches up by interpolation
    assert masks.grad[..., :4, :].abs().max() > 0


def test_an_image_of_void_pixels_changes_nothing(monkeypatch):
    asked = []
    monkeypatch.setattr(
        matching, "mean_over_processes", lambda count: asked.append(count) or count.clamp(min=1)
    )
    logits, masks = torch.randn(2, 2, 5, 4), torch.randn(2, 2, 5, 8, 8)
    target = torch.randint(3, (2, 8, 8))
    target[1] = 255
    torch.manual_seed(4)  # the same points for the first image
    both = matching.mask_set_losses(logits, masks, target, WEIGHTS)
    torch.manual_seed(4)
    one = matching.mask_set_losses(logits[:, :1], masks[:, :1], target[:1], WEIGHTS)
    torch.testing.assert_close(both["class"], one["class"])
    none = matching.mask_set_losses(logits, masks, torch.full_like(target, 255), WEIGHTS)
    assert [float(v) for v in none.values()] == [0, 0, 0]
    assert len(asked) == 3, "a process without objects must take part in the sum over processes"


@pytest.mark.parametrize("size", [(64, 64), (37, 51)])
def test_eomt_trains_through_matched_masks(size):
    options = dict(head="eomt", dim=32, stem_width=8, depth=2, head_depth=2, head_queries=6)
    cls = get_model("segmenter")
    model = cls(resolve_slots(cls.slots(**options), {"name": "softmax"}, task="segmentation"), **options)
    logits, masks = model.query_predictions(torch.randn(2, 3, *size))
    assert logits.shape == (3, 2, 6, 12) and masks.shape[:3] == (3, 2, 6)
    task = Segmentation(model, small_scenes(), mask_loss="matched", mask_points=64)
    batch = {"image": torch.randn(2, 3, *size), "mask": torch.randint(11, (2, *size))}
    sum(task.losses(batch).values()).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


def test_matched_masks_need_queries():
    options = dict(head="linear", dim=32, stem_width=8, depth=1)
    cls = get_model("segmenter")
    model = cls(resolve_slots(cls.slots(**options), {"name": "softmax"}, task="segmentation"), **options)
    with pytest.raises(ConfigError, match=r"model\.head=eomt"):
        Segmentation(model, small_scenes(), mask_loss="matched")
    with pytest.raises(ConfigError, match="label_smoothing=0.1 belongs to task.mask_loss=pixel"):
        Segmentation(masked_segmenter(), small_scenes(), mask_loss="matched", label_smoothing=0.1)


def masked_segmenter() -> torch.nn.Module:
    options = dict(
        head="eomt", dim=32, stem_width=8, depth=2, head_depth=2, head_queries=6, masked_queries=True
    )
    cls = get_model("segmenter")
    return cls(resolve_slots(cls.slots(**options), {"name": "softmax"}, task="segmentation"), **options)


def test_masked_queries_see_their_own_mask_only():
    model, images = masked_segmenter(), torch.randn(2, 3, 64, 64)
    maps = torch.full((2, 6, 16, 16), -1.0)
    maps[:, 0, :2, :2] = 1.0  # query 0 owns the first patch of 8 x 8
    bias = model.head.attention_bias(maps, (8, 8), 1.0)
    assert bias.shape == (2, 1, 70, 70) and (bias[:, 0, 6:] == 0).all() and (bias[:, 0, :, :6] == 0).all()
    assert (bias[:, 0, 0, 6:] == 0).sum(1).eq(1).all() and (bias[:, 0, 1:6, 6:] == -torch.inf).all()
    assert (model.head.attention_bias(maps, (8, 8), 0.0) == 0).all()

    model.anneal(0.0)
    masked = model.query_predictions(images)[0]
    model.anneal(1.0)
    free = model.query_predictions(images)[0]
    assert torch.equal(masked[0], free[0]) and not torch.allclose(masked[1], free[1])
    model.eval()
    free = model.query_predictions(images)[0]
    model.anneal(0.0)
    assert torch.equal(model.query_predictions(images)[0], free)


def test_shares_of_masked_queries_fall_block_by_block():
    shares = masked_segmenter().head.mask_shares
    assert shares(0.0, 3) == [1, 1, 1] and shares(1.0, 3) == [0, 0, 0]
    assert shares(0.3, 3) == pytest.approx([0.5**0.9, 1, 1]) and shares(0.75, 3) == pytest.approx([0, 0, 1])


def test_masked_queries_need_a_variant_with_bias():
    cls = get_model("segmenter")
    with pytest.raises(CapabilityError, match="bias"):
        resolve_slots(
            cls.slots(head="eomt", masked_queries=True), {"name": "mala"}, task="segmentation", strict=True
        )
    with pytest.raises(ConfigError, match="head eomt"):
        create_model("segmenter", attention="softmax", head="linear", masked_queries=True)
