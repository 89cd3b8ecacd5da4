"""Image files to boxes with classes and scores."""

from __future__ import annotations

from typing import Any

import torch

from zoo.layers.boxes import to_xyxy
from zoo.predict import Predictor
from zoo.predict._scenes import fit, open_image
from zoo.predict.images import SUFFIXES


class TaskPredictor(Predictor):
    """Finds objects in pictures given as paths or PIL images."""

    suffixes = SUFFIXES
    threshold = 0.3  # detections below are left out

    def preprocess(self, raw: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """A path or PIL image to [1, C, H, W] and the size [1, 2] without padding."""
        return fit(open_image(raw), self.preprocessing)

    @torch.no_grad()
    def predict(self, raw: Any) -> dict[str, Any]:
        """`{"objects": [{"label", "score", "box": [x1, y1, x2, y2]}, ...]}`, best first, boxes in pixels of the picture."""
        image = open_image(raw)
        pixels, size = fit(image, self.preprocessing)
        out = self.model(pixels, size)
        logits, boxes = out["logits"][-1, 0], out["boxes"][-1, 0]
        softmax = getattr(self.model, "softmax_classes", False)
        scores = logits.softmax(-1)[:, :-1] if softmax else logits.sigmoid()
        score, label = scores.max(-1)
        corners = to_xyxy(boxes).clamp(0, 1) * torch.tensor([image.width, image.height] * 2)
        found = [
            {
                "label": self.labels[int(label[k])],
                "score": round(float(score[k]), 4),
                "box": [round(v, 1) for v in corners[k].tolist()],
            }
            for k in score.argsort(descending=True).tolist()
            if score[k] >= self.threshold
        ]
        return {"objects": found}

    def rows(self, prediction: dict[str, Any]) -> list[dict[str, Any]]:
        """One row per object."""
        corners = ("x1", "y1", "x2", "y2")
        return [
            {"label": o["label"], "score": o["score"], **dict(zip(corners, o["box"], strict=True))}
            for o in prediction["objects"]
        ]

    def format(self, raw: Any, prediction: dict[str, Any]) -> str:
        found = (f"{o['label']} ({o['score']:.2f}) at {o['box']}" for o in prediction["objects"])
        return f"{raw}: {'; '.join(found) or 'nothing found'}"
