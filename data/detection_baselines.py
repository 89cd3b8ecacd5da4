"""What constant answers and classical image processing reach on scenes: the floor under a trained model.

The classical method subtracts the scene's background (a wide median filter), thresholds the difference, takes
connected components as objects and classifies each by a support vector machine on its 16x16 picture. Threshold and
smallest component are chosen on validation scenes, by AP50.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from data.detection_base import confusion_scores
from data.detection_eval import coco_scores

if TYPE_CHECKING:
    from data.scenes import ScenesData

VERSION = "1"  # part of the cache key: raise it when a method changes
_SIDE = 16
_TRAIN = 800  # training scenes that the classifier sees
_THRESHOLDS = (0.12, 0.16, 0.2, 0.24)
_SMALLEST = (15, 40)


def scene_baselines(data: ScenesData) -> dict[str, dict[str, float]]:
    """Constant boxes and masks, and components with a classifier; detection and segmentation scores on test."""
    train = {k: v.numpy() for k, v in data.compose("train", _TRAIN, _generator()).items()}
    val, test = ({k: v.numpy() for k, v in data.scenes(s).items()} for s in ("val", "test"))
    classes = len(data.labels) + 1
    background = np.zeros((classes, classes))
    background[:, 0] = np.bincount(test["mask"].ravel(), minlength=classes)
    scores: dict[str, dict[str, float]] = {
        "constant_boxes": coco_scores(data.ground_truth("test"), _constant_boxes(train, len(test["image"]))),
        "all_background": dict(confusion_scores(background, True)),
    }
    classifier = _fit_classifier(train)
    best, chosen = -1.0, (0.0, 0)
    differences = _differences(val["image"])
    for threshold in _THRESHOLDS:
        for smallest in _SMALLEST:
            rows, _ = _components(val, differences, classifier, threshold, smallest)
            found = coco_scores(data.ground_truth("val"), rows, class_agnostic=False)["ap50"]
            if found > best:
                best, chosen = found, (threshold, smallest)
    rows, masks = _components(test, _differences(test["image"]), classifier, *chosen)
    counts = np.bincount((test["mask"] * classes + masks).ravel(), minlength=classes**2).reshape(
        classes, classes
    )
    scores["components_svm"] = {
        **coco_scores(data.ground_truth("test"), rows),
        **confusion_scores(counts, True),
    }
    return scores


def _generator() -> Any:
    import torch

    return torch.Generator().manual_seed(20)


def _constant_boxes(train: dict[str, np.ndarray], images: int) -> np.ndarray:
    """Each class's mean training box, in every image, scored by how common the class is."""
    labels, boxes = train["labels"].ravel(), train["boxes"].reshape(-1, 4)
    rows = []
    for label in np.unique(labels[labels >= 0]):
        own = boxes[labels == label]
        rows += [[i, *own.mean(0), len(own) / len(labels), label] for i in range(images)]
    return np.array(rows)


def _fit_classifier(train: dict[str, np.ndarray]) -> Any:
    from sklearn.svm import SVC

    pictures, labels = [], []
    for image, boxes, classes, mask in zip(
        train["image"], train["boxes"], train["labels"], train["mask"], strict=True
    ):
        for box, label in zip(boxes.astype(int), classes, strict=True):
            if label >= 0:
                pictures.append(_picture(image, box, mask == label + 1))
                labels.append(label)
    return SVC(C=10.0, probability=False).fit(np.array(pictures), np.array(labels))


def _picture(image: np.ndarray, box: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """The box's difference from its surroundings as 16x16 grey values."""
    from PIL import Image

    x1, y1, x2, y2 = (int(v) for v in box)
    grey = image.mean(0)
    outside = grey[~inside]
    difference = np.abs(grey - (np.median(outside) if outside.size else 0.0)) * inside
    crop = difference[y1 : max(y2, y1 + 1), x1 : max(x2, x1 + 1)]
    small = Image.fromarray(crop.astype(np.float32)).resize((_SIDE, _SIDE), Image.Resampling.BILINEAR)
    values = np.asarray(small).ravel()
    return values / max(1e-6, float(np.linalg.norm(values)))


def _differences(images: np.ndarray) -> list[np.ndarray]:
    """How much each pixel differs from the median of its surroundings, [H, W] per image."""
    from scipy import ndimage

    out = []
    for image in images:
        smooth = ndimage.gaussian_filter(image, (0, 0.7, 0.7)).mean(0)
        out.append(np.abs(smooth - ndimage.median_filter(smooth, size=21)))
    return out


def _components(
    scenes: dict[str, np.ndarray],
    differences: list[np.ndarray],
    classifier: Any,
    threshold: float,
    smallest: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Detections [n, 7] and masks [N, H, W] of the classical method."""
    from scipy import ndimage

    rows, pictures, parts = [], [], []
    masks = np.zeros(scenes["mask"].shape, dtype=np.int64)
    for number, (image, difference) in enumerate(zip(scenes["image"], differences, strict=True)):
        regions, _ = ndimage.label(difference > threshold, structure=np.ones((3, 3)))
        for k, (ys, xs) in enumerate(ndimage.find_objects(regions), 1):
            inside = regions == k
            area = int(inside[ys, xs].sum())
            if area < smallest:
                continue
            box = np.array([xs.start, ys.start, xs.stop, ys.stop])
            pictures.append(_picture(image, box, inside))
            parts.append((number, inside))
            rows.append([number, *box, float(difference[inside].mean()), 0])
    if rows:
        labels = classifier.predict(np.array(pictures))
        for row, label, (number, inside) in zip(rows, labels, parts, strict=True):
            row[6] = int(label)
            masks[number][inside] = int(label) + 1
    return np.array(rows).reshape(-1, 7), masks
