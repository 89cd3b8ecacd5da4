"""COCO average precision of detections, computed by faster-coco-eval."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

NAMES = (
    "ap",
    "ap50",
    "ap75",
    "ap_small",
    "ap_medium",
    "ap_large",
    "recall_1",
    "recall_10",
    "recall_100",
    "recall_small",
    "recall_medium",
    "recall_large",
)


def coco_scores(
    truth: Mapping[str, Any],
    detections: np.ndarray,
    image_ids: Sequence[int] | None = None,
    *,
    class_agnostic: bool = True,
) -> dict[str, float]:
    """The COCO summary: AP over IoU .50:.05:.95, at .50 and .75, by area, and average recall.

    Args:
        truth: COCO dictionary with images, annotations (crowds included) and categories.
        detections: Rows of image id, x1, y1, x2, y2 in original pixels, score, category id, [n, 7].
        image_ids: Images that count; all when left out.
        class_agnostic: Also `ap_agnostic` and `ap50_agnostic`, with every class made the same.

    Returns:
        Values of `NAMES`; areas without any object, which COCO reports as -1, are left out.
    """
    ids = sorted(i["id"] for i in truth["images"]) if image_ids is None else sorted(image_ids)
    scores = _evaluate(truth, detections, ids)
    if class_agnostic:
        merged = {**truth, "annotations": [{**a, "category_id": 0} for a in truth["annotations"]]}
        merged["categories"] = [{"id": 0, "name": "object"}]
        rows = np.array(detections, dtype=float).reshape(-1, 7)
        rows[:, 6] = 0
        scores |= {f"{k}_agnostic": v for k, v in _evaluate(merged, rows, ids).items() if k in ("ap", "ap50")}
    return scores


def per_class_ap(
    truth: Mapping[str, Any], detections: np.ndarray, image_ids: Sequence[int] | None = None
) -> dict[str, float]:
    """AP of every class that occurs in the truth, by name; arguments as of `coco_scores`."""
    rows = np.asarray(detections, float).reshape(-1, 7)
    ids = sorted({int(i) for i in ([i["id"] for i in truth["images"]] if image_ids is None else image_ids)})
    out = {}
    for category in truth["categories"]:
        annotations = [a for a in truth["annotations"] if a["category_id"] == category["id"]]
        if annotations:
            one = {**truth, "annotations": annotations, "categories": [category]}
            # Where crowds are all there is, no AP is defined.
            scores = _evaluate(one, rows[rows[:, 6] == category["id"]], ids)
            out[category["name"]] = scores.get("ap", float("nan"))
    return out


def _evaluate(truth: Mapping[str, Any], detections: np.ndarray, ids: Sequence[int]) -> dict[str, float]:
    rows = np.asarray(detections, float).reshape(-1, 7)
    kept = {int(i) for i in ids}
    if not any(a["image_id"] in kept for a in truth["annotations"]):
        return dict.fromkeys(NAMES[:3], float("nan"))  # no object to find: precision means nothing
    if len(rows) == 0:
        return dict.fromkeys((*NAMES[:3], *NAMES[6:9]), 0.0)
    from faster_coco_eval import COCO, COCOeval_faster

    logging.getLogger("faster_coco_eval").setLevel(logging.WARNING)
    found = [
        {
            "image_id": int(r[0]),
            "bbox": [float(r[1]), float(r[2]), float(r[3] - r[1]), float(r[4] - r[2])],
            "score": float(r[5]),
            "category_id": int(r[6]),
        }
        for r in rows
        if int(r[0]) in kept
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO({"info": {}, **copy.deepcopy(dict(truth))})
        evaluation = COCOeval_faster(
            coco, coco.loadRes(found), iouType="bbox", print_function=lambda *a: None
        )
        evaluation.params.imgIds = list(ids)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return {k: float(v) for k, v in zip(NAMES, evaluation.stats, strict=False) if v > -1}
