"""Genuine COCO and VOC files: the example data in the source distribution of labelme 6.3.1 (three VOC photographs).

The archive is read from the data cache's folder `carriers`; `pytest -m network` fetches it once.
"""

import hashlib
import subprocess
import sys
import tarfile

import lightning as L
import numpy as np
import pytest
import torch

from data import create_data
from data.carriers import cache_dir
from data.detection_base import VOID
from data.detection_eval import coco_scores
from tasks.detection import Detection
from tasks.segmentation import Segmentation
from zoo.attention.slots import resolve_slots
from zoo.models import get_model

NAME, DIGEST = "labelme-6.3.1.tar.gz", "2947e0d8341a92faa7b3ee50cf4b672f838051c6bf24892526e95b64fd3a707e"


@pytest.fixture(scope="module")
def examples(tmp_path_factory, request):
    path = cache_dir() / "carriers" / NAME
    if not path.is_file():
        if "network" not in (request.config.option.markexpr or ""):
            pytest.skip(f"{NAME} is not in the cache; pytest -m network fetches it (14 MB)")
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--no-deps",
            "--no-binary=:all:",
            "labelme==6.3.1",
        ]
        subprocess.run([*command, "--dest", str(path.parent)], check=True, timeout=600)
    assert hashlib.sha256(path.read_bytes()).hexdigest() == DIGEST
    folder = tmp_path_factory.mktemp("labelme")
    with tarfile.open(path) as archive:
        # The archive is pinned by its digest; Python 3.11.2 knows no filter yet.
        archive.extractall(folder, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    return folder / "labelme-6.3.1" / "examples"


@pytest.mark.network
def test_coco(examples):
    data = create_data(
        "coco", root=str(examples / "instance_segmentation" / "data_dataset_coco"), image_size=96
    )
    data.setup()
    records = [r for split in data._records.values() for r in split]
    assert len(records) == 3 and sum(len(r.labels) for r in records) == 12 and not data.skipped
    assert len(data.labels) == 21 and data.category_ids[0] == 0
    for record in records:
        classes = data.pixel_classes(record)
        seen = {data.mask_labels[i] for i in np.unique(classes) if i != VOID}
        assert {data.labels[i] for i in record.labels} <= seen
        for box, label, area in zip(record.boxes, record.labels, record.area, strict=True):
            x1, y1, x2, y2 = np.round(box).astype(int)
            assert (classes[y1:y2, x1:x2] == label + 1).sum() > 0.5 * area
    batch = next(iter(data.train_dataloader()))
    assert batch["image"].shape[1:] == (3, 96, 96) and (batch["labels"] >= 0).any()
    truth = data.ground_truth("train")
    rows = [
        [a["image_id"], a["bbox"][0], a["bbox"][1], a["bbox"][0] + a["bbox"][2], a["bbox"][1] + a["bbox"][3], 1.0,
         a["category_id"]]
        for a in truth["annotations"]
    ]  # fmt: skip
    assert coco_scores(truth, np.array(rows))["ap"] == pytest.approx(1.0)


@pytest.mark.network
def test_voc_boxes_and_masks(examples):
    boxes = create_data("voc", root=str(examples / "bbox_detection" / "data_dataset_voc"), image_size=96)
    boxes.setup()
    records = [r for split in boxes._records.values() for r in split]
    assert len(records) == 3 and "person" in boxes.labels and all(len(r.boxes) for r in records)
    root = str(examples / "semantic_segmentation" / "data_dataset_voc")
    masks = create_data("voc", root=root, masks=True, image_size=96)
    batch = next(iter(masks.train_dataloader()))
    assert masks.mask_labels[0] == "background" and "person" in masks.mask_labels
    inside = batch["mask"][batch["mask"] != VOID]
    assert int(inside.max()) < len(masks.mask_labels) and int(inside.max()) > 0


def train_one_epoch(task_class, data, model, **options):
    """An epoch, validation and test; returns the test's metrics."""
    data.setup()
    cls = get_model(model)
    options = {**task_class.model_arguments(data), **options}
    factories = resolve_slots(cls.slots(**options), {"name": "softmax"})
    data.require("boxes" if task_class is Detection else "masks", model)
    task = task_class(cls(factories, **options), data)
    trainer = L.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(task, datamodule=data)
    assert trainer.global_step == 1 and torch.isfinite(trainer.callback_metrics["train/loss"])
    trainer.test(task, datamodule=data, verbose=False)
    return {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("test/")}


@pytest.mark.network
@pytest.mark.parametrize(
    ("kind", "place"),
    [
        ("coco", "instance_segmentation/data_dataset_coco"),
        ("voc", "bbox_detection/data_dataset_voc"),
    ],
)
def test_detection_trains_an_epoch_and_is_scored(examples, kind, place):
    data = create_data(kind, root=str(examples / place), image_size=64, batch_size=2)
    found = train_one_epoch(Detection, data, "plain_detr", dim=32, queries=6, many_queries=8)
    assert 0 <= found["test/ap"] <= found["test/ap50"] <= 1


@pytest.mark.network
@pytest.mark.parametrize(
    ("kind", "place", "options"),
    [
        ("coco", "instance_segmentation/data_dataset_coco", {}),
        ("voc", "semantic_segmentation/data_dataset_voc", {"masks": True}),
    ],
)
def test_segmentation_trains_an_epoch_and_is_scored(examples, kind, place, options):
    data = create_data(kind, root=str(examples / place), image_size=64, batch_size=2, **options)
    found = train_one_epoch(Segmentation, data, "segmenter", dim=32, depth=1, stem_width=8)
    assert 0 <= found["test/miou"] <= 1 and found["test/accuracy"] > 0
