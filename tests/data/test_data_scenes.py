"""Scenes: exact boxes and masks, repeatable batches, splits by digit; scores and baselines."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

# tests are no package: their helpers are found beside them
sys.path.insert(0, str(Path(__file__).parent))
from scene_standins import small_scenes

from data import create_data
from data.base import DataError
from data.detection_base import confusion_scores
from data.detection_eval import coco_scores, per_class_ap
from data.sampler import BatchKey
from tasks.registry import get_data, options_of


@pytest.fixture(scope="module")
def data():
    return small_scenes()


def test_boxes_are_the_tight_bounds_of_the_visible_masks(data):
    scenes = data.scenes("test")
    count = 0
    for boxes, labels, mask in zip(scenes["boxes"], scenes["labels"], scenes["mask"], strict=True):
        seen = torch.zeros_like(mask, dtype=torch.bool)
        for box, label in zip(boxes.int(), labels, strict=True):
            if label < 0:
                assert box.sum() == 0
                continue
            x1, y1, x2, y2 = box.tolist()
            inside = mask[y1:y2, x1:x2] == label + 1
            assert inside[0].any() and inside[-1].any() and inside[:, 0].any() and inside[:, -1].any()
            seen[y1:y2, x1:x2] = True
            count += 1
        assert not ((mask > 0) & ~seen).any()
    assert count > 6


def test_a_batch_depends_on_seed_epoch_and_batch_alone(data):
    key = BatchKey(np.arange(4), 2, 5)
    first, again = data.batch("train", key), small_scenes().batch("train", key)
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert not torch.equal(first["image"], data.batch("train", BatchKey(np.arange(4), 3, 5))["image"])
    assert not torch.equal(first["image"], small_scenes(seed=1).batch("train", key)["image"])
    fixed = data.batch("val", BatchKey(np.array([4, 1]), -1, 0))
    assert torch.equal(fixed["mask"][1], data.scenes("val")["mask"][1])
    assert torch.equal(
        fixed["image"], small_scenes(seed=9).batch("val", BatchKey(np.array([4, 1]), -1, 0))["image"]
    )


def test_scenes_show_only_digits_of_their_own_split(data):
    for split in ("train", "val", "test"):
        images = data._objects[split][0]
        assert len(images) == {"train": 40, "val": 20, "test": 20}[split]


def test_ground_truth_is_a_coco_dictionary(data):
    truth = data.ground_truth("test")
    assert [i["id"] for i in truth["images"]] == list(range(6))
    scenes = data.scenes("test")
    assert len(truth["annotations"]) == int((scenes["labels"] >= 0).sum())
    assert all(a["area"] > 0 and a["bbox"][2] > 0 for a in truth["annotations"])


def test_perfect_detections_score_one(data):
    truth = data.ground_truth("test")
    rows = [
        [a["image_id"], a["bbox"][0], a["bbox"][1], a["bbox"][0] + a["bbox"][2], a["bbox"][1] + a["bbox"][3], 0.9,
         a["category_id"]]
        for a in truth["annotations"]
    ]  # fmt: skip
    scores = coco_scores(truth, np.array(rows))
    assert scores["ap"] == scores["ap50"] == scores["ap_agnostic"] == 1.0
    wrong = np.array(rows)
    wrong[:, 6] = (wrong[:, 6] + 1) % 10
    scores = coco_scores(truth, wrong)
    assert scores["ap"] < 0.5 and scores["ap_agnostic"] == 1.0
    assert coco_scores(truth, np.zeros((0, 7)))["ap"] == 0.0
    some = np.array([row for row in rows if row[0] < 3])
    assert {v for v in per_class_ap(truth, some, [0, 1, 2]).values() if v == v} == {1.0}
    assert min(per_class_ap(truth, some).values()) < 1.0, (
        "objects of images that were not asked for are missed"
    )


def test_ap_equals_pycocotools(data):
    pytest.importorskip(
        "pycocotools", reason="pycocotools is not installed; faster-coco-eval alone is needed"
    )
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    truth = data.ground_truth("test")
    random = np.random.RandomState(0)
    rows = []
    for a in truth["annotations"]:
        x, y, w, h = np.array(a["bbox"]) + random.normal(0, 2, 4)
        rows += [[a["image_id"], x, y, x + abs(w), y + abs(h), random.rand(), a["category_id"]]] * (
            1 + random.randint(2)
        )
    truth["annotations"][0]["iscrowd"] = 1
    ours = coco_scores(truth, np.array(rows), class_agnostic=False)
    coco = COCO()
    coco.dataset = {**truth, "info": {}}
    coco.createIndex()
    found = [
        {
            "image_id": int(r[0]),
            "bbox": [r[1], r[2], r[3] - r[1], r[4] - r[2]],
            "score": r[5],
            "category_id": int(r[6]),
        }
        for r in rows
    ]
    theirs = COCOeval(coco, coco.loadRes(found), "bbox")
    theirs.evaluate(), theirs.accumulate(), theirs.summarize()
    for name, value in zip(("ap", "ap50", "ap75", "ap_small"), theirs.stats[:4], strict=True):
        assert ours[name] == pytest.approx(value, abs=1e-6)


def test_baselines_are_filtered_by_target(data, tmp_path, monkeypatch):
    monkeypatch.setenv("ZOO_DATA", str(tmp_path))
    one = small_scenes()
    one.require("boxes", "detr")
    boxes = one.baselines()
    assert "constant_boxes" in boxes and "all_background" not in boxes
    assert 0 <= boxes["components_svm"]["ap50"] <= 1 and "miou" not in boxes["components_svm"]
    one.require("masks", "segmentation")
    assert one.baselines()["all_background"]["miou_foreground"] == 0.0


def test_confusion_scores_by_hand():
    counts = np.array([[6, 2, 0], [1, 3, 0], [0, 0, 0]])
    scores = confusion_scores(counts, True, ["bg", "a", "b"])
    assert scores["iou_a"] == pytest.approx(3 / 6) and scores["miou"] == pytest.approx((6 / 9 + 0.5) / 2)
    assert scores["miou_foreground"] == pytest.approx(0.5)
    assert scores["dice_foreground"] == pytest.approx(2 * 3 / (4 + 5)) and scores["accuracy"] == 0.75


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_scale": 2.0}, "max_scale"),
        ({"image_size": 20}, "image_size"),
        ({"noise": 2.0}, "noise"),
        ({"texturee": 1}, "texture"),
    ],
)
def test_bad_options_name_the_way_out(options, message):
    with pytest.raises(DataError, match=message):
        create_data("scenes", **options)


@pytest.mark.parametrize("name", ["scenes", "stamps", "coco", "voc", "yolo", "png_masks"])
def test_yaml_lists_every_option_with_its_default(name):
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
    path = Path(__file__).parents[2] / "conf" / "data" / f"{name}.yaml"
    config = yaml.safe_load(path.read_text())
    assert config.pop("name") == name
    assert config == options_of(get_data(name))


def test_a_scene_of_digits_is_what_it_was(data):
    """Scores of equal seeds stay comparable: raise GENERATOR_VERSION when this has to change."""
    scenes = data.scenes("test")
    found = float(scenes["image"].double().mean() + scenes["boxes"].double().sum())
    assert found == pytest.approx(2333.42998, rel=1e-6)


@pytest.fixture
def stamps(tmp_path):
    """Coloured ellipses as stamps, one picture without a transparent part."""
    from PIL import Image, ImageDraw

    from data.stamps import CLASSES, STAMPS

    for k, place in enumerate(CLASSES.values()):
        folder = tmp_path / STAMPS / place / "sub"
        folder.mkdir(parents=True)
        for i in range(7):
            image = Image.new("RGBA", (90 + 10 * i, 60), (0, 0, 0, 0))
            ImageDraw.Draw(image).ellipse((5, 5, 80, 50), fill=(30 * k, 200 - 20 * k, 90, 255))
            image.save(folder / f"{i}.png")
    Image.new("RGB", (10, 10)).save(folder / "solid.png")
    return tmp_path


def make_stamps(root, **options):
    small = dict(train_scenes=8, val_scenes=4, test_scenes=4, batch_size=4)
    return create_data("stamps", root=str(root), **{**small, **options})


def test_stamps_keep_their_colours_and_split_by_file(stamps):
    data = make_stamps(stamps, noise=0.0, rotate_deg=0.0)
    data.setup()
    assert list(data.skipped.values()) == ["no transparent part, or nothing else"]
    assert [len(data._objects[s][0]) for s in ("train", "val", "test")] == [40, 8, 8]
    scenes = data.scenes("test")
    assert scenes["image"].shape == (4, 3, 128, 128)
    checked = 0
    for image, mask in zip(scenes["image"], scenes["mask"], strict=True):
        for k in mask.unique()[1:].tolist():
            wanted = torch.tensor([30 * (k - 1), 200 - 20 * (k - 1), 90]) / 255
            middle = image[:, mask == k].median(1).values
            assert torch.allclose(middle, wanted, atol=0.03)
            checked += 1
    assert checked > 3
    batch = next(iter(data.train_dataloader()))
    real = batch["boxes"][batch["labels"] >= 0]
    longest = (real[:, 2:] - real[:, :2]).amax(1)
    assert 5 <= float(longest.min()) and float(longest.max()) <= 67


def test_missing_stamps_name_the_package(tmp_path):
    with pytest.raises(DataError, match="tuxpaint-stamps-default"):
        make_stamps(tmp_path).setup()
