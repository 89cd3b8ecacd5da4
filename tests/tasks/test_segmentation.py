"""Losses against plain computations, void pixels, image sizes, heads, every attention variant."""

import sys
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "data"))
from scene_standins import small_scenes, write_image

from data import create_data
from tasks._vision_metrics import SegmentationScores
from tasks.segmentation import Segmentation, segmentation_losses
from zoo.attention.registry import list_attention
from zoo.attention.slots import resolve_slots
from zoo.errors import CapabilityError, ConfigError, DataError
from zoo.models import get_model
from zoo.models.segmenter import HEADS

SMALL = dict(dim=32, stem_width=8, depth=2, head_width=16, head_depth=1)


def make(attention="softmax", **options):
    cls = get_model("segmenter")
    options = {**SMALL, **options}
    return cls(resolve_slots(cls.slots(**options), {"name": attention}, task="segmentation"), **options)


def test_losses_equal_a_dense_computation():
    logits, target = torch.randn(2, 4, 5, 6), torch.randint(3, (2, 5, 6))  # class 3 does not occur
    target[0, :2] = 255
    found = segmentation_losses(logits, target, dice_weight=2.0)
    keep = target != 255
    p = logits.softmax(1).permute(0, 2, 3, 1)[keep]
    y = target[keep]
    assert torch.allclose(found["cross_entropy"], -p[torch.arange(len(y)), y].log().mean())
    truth = F.one_hot(y, 4).float()
    score = 2 * (p * truth).sum(0) / (p.sum(0) + truth.sum(0))
    assert torch.allclose(found["dice"], 2 * (1 - score[:3]).mean(), atol=1e-5)


def test_smoothed_labels_equal_torch():
    logits, target = torch.randn(2, 4, 5, 6), torch.randint(4, (2, 5, 6))
    found = segmentation_losses(logits, target, dice_weight=0.0, label_smoothing=0.2)
    assert torch.allclose(found["cross_entropy"], F.cross_entropy(logits, target, label_smoothing=0.2))


def test_half_precision_logits_lose_nothing():
    logits, target = torch.randn(2, 3, 40, 40).bfloat16(), torch.randint(3, (2, 40, 40))
    torch.testing.assert_close(
        segmentation_losses(logits, target), segmentation_losses(logits.float(), target), rtol=0, atol=0
    )


def test_void_pixels_have_no_influence():
    logits, target = torch.randn(2, 3, 4, 4, requires_grad=True), torch.randint(3, (2, 4, 4))
    target[1] = 255
    sum(segmentation_losses(logits, target).values()).backward()
    assert logits.grad[1].abs().max() == 0 and logits.grad[0].abs().max() > 0
    terms = segmentation_losses(logits, torch.full_like(target, 255))
    assert all(float(v) == 0 for v in terms.values())
    sum(terms.values()).backward()
    assert torch.isfinite(logits.grad).all()


def test_metric_equals_torchmetrics_and_does_not_depend_on_batches():
    from torchmetrics.classification import MulticlassJaccardIndex

    predicted, target = torch.randint(4, (6, 5, 5)), torch.randint(4, (6, 5, 5))
    target[0] = 255
    whole = SegmentationScores(4, has_background=True)
    parts = SegmentationScores(4, has_background=True)
    whole.update(predicted, target)
    for i in range(6):
        parts.update(predicted[i], target[i])
    theirs = MulticlassJaccardIndex(4, ignore_index=255)
    theirs.update(predicted, target)
    assert float(whole.compute()["miou"]) == pytest.approx(float(theirs.compute()), abs=1e-6)
    assert whole.compute() == parts.compute()
    perfect = SegmentationScores(4, has_background=True)
    perfect.update(target[1:], target[1:])
    assert float(perfect.compute()["miou"]) == 1.0


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("size", [(64, 64), (40, 72), (37, 51), (1, 1)])
def test_output_has_the_size_of_the_image(head, size):
    out = make(head=head).eval()(torch.randn(1, 3, *size))
    assert out.shape == (1, 11, *size) and torch.isfinite(out).all()


@pytest.mark.parametrize("head", HEADS)
def test_output_does_not_depend_on_batch_mates(head):
    model = make(head=head).eval()
    x = torch.randn(3, 3, 64, 64)
    assert torch.allclose(model(x)[:1], model(x[:1]), atol=1e-4)


@pytest.mark.parametrize("head", HEADS)
def test_a_batch_of_one_image_trains(head):
    logits = make(head=head).train()(torch.randn(1, 3, 64, 64))
    sum(segmentation_losses(logits, torch.randint(11, (1, 64, 64))).values()).backward()


@pytest.mark.parametrize("head", HEADS)
def test_every_parameter_gets_a_gradient(head):
    model = make(head=head)
    sum(
        segmentation_losses(model(torch.randn(2, 3, 64, 64)), torch.randint(11, (2, 64, 64))).values()
    ).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patch_size": 6}, "power of two"),
        ({"head": "uppernet"}, "did you mean 'upernet'"),
        ({"num_classes": 1}, "at least 2"),
    ],
)
def test_bad_options_name_the_way_out(options, message):
    with pytest.raises(ConfigError, match=message):
        make(**options)


@pytest.mark.parametrize("attention", list_attention())
def test_every_variant_trains_or_refuses(attention):
    data = small_scenes(train_scenes=2, val_scenes=2, test_scenes=2, batch_size=2)
    try:
        model = make(attention=attention)
    except CapabilityError as error:
        assert "slot" in str(error) and "Variants that fit" in str(error)
        return
    task = Segmentation(model, data)
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
    assert 0 <= float(trainer.callback_metrics["test/miou"]) <= 1


@pytest.mark.parametrize("attention", list_attention())
def test_every_slot_takes_the_variant_or_says_why(attention):
    """Heads that mix tokens of their own into the attention, and images that are not of the table's size."""
    for head, slot in (("eomt", "encoder"), ("mask_transformer", "decoder"), ("linear", "encoder")):
        options = {**SMALL, "head": head, "image_size": 32}
        cls = get_model("segmenter")
        try:
            factories = resolve_slots(
                cls.slots(**options), {"name": "softmax"}, {slot: {"name": attention}}, task="segmentation"
            )
        except CapabilityError as error:
            assert f"slot {slot!r}" in str(error) and "Variants that fit" in str(error)
            continue
        model = cls(factories, **options)
        out = model(torch.randn(2, 3, 32, 32))
        sum(segmentation_losses(out, torch.randint(11, (2, 32, 32))).values()).backward()
        assert [n for n, p in model.named_parameters() if p.grad is None] == [], head


def test_windows_in_validation():
    data = small_scenes()
    task = Segmentation(make().eval(), data, window=32)
    batch = next(iter(data.val_dataloader()))
    task.update_metrics(batch, task.metrics["valid"], "valid")
    assert int(task.metrics["valid"]["scores"].counts.sum()) == batch["mask"].numel()
    with pytest.raises(ConfigError, match=r"task\.window=0"):
        Segmentation(make(), data, window=0)


@pytest.mark.parametrize("window", [None, 16])
def test_files_are_scored_at_their_own_resolution(tmp_path, window):
    for i in range(3):
        write_image(tmp_path / "images" / f"{i}.png", 40, 60, seed=i)
        (tmp_path / "masks").mkdir(exist_ok=True)
        mask = np.full((40, 60), 1, np.uint8)
        mask[:, :15], mask[0] = 0, 255
        Image.fromarray(mask).save(tmp_path / "masks" / f"{i}.png")
    data = create_data("png_masks", root=str(tmp_path), image_size=20, eval_batch_size=1)
    task = Segmentation(make(num_classes=2).eval(), data, window=window)
    # The first 5 of 20 columns, which show 15 of 60.
    task.model.forward = lambda images: F.one_hot((images[:, 0] < 9).long(), 2).movedim(-1, 1).float() * 50
    batch = next(iter(data.test_dataloader()))
    assert batch["size"].tolist() == [[13, 20]]
    batch["image"][:], batch["image"][..., :5] = 0, 10
    task.update_metrics(batch, task.metrics["test"], "test")
    assert task.metrics["test"]["scores"].counts.tolist() == [[39 * 15, 0], [0, 39 * 45]]


def test_figures_and_card(tmp_path):
    data = small_scenes(test_scenes=3)
    task = Segmentation(make(), data)
    trainer = L.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False
    )
    trainer.test(task, datamodule=data, verbose=False)
    assert {p.name for p in task.figures(tmp_path)} == {"masks.png", "classes.csv"}
    assert (tmp_path / "classes.csv").read_text().count("\n") == 12
    assert task.card()["labels"][0] == "background"


def test_data_without_masks_are_refused():
    class Boxes(type(small_scenes())):
        provides = frozenset(("boxes",))

    with pytest.raises(DataError, match="no masks, which task 'segmentation'"):
        Segmentation(make(), Boxes())
