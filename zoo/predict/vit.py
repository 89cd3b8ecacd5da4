"""Image files to class names."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zoo.predict import Predictor
from zoo.predict.images import SUFFIXES, prepare_image


class TaskPredictor(Predictor):
    """Classifies pictures given as paths or PIL images."""

    suffixes = SUFFIXES

    def preprocess(self, raw: Any) -> Tensor:
        """A path or PIL image to [1, channels, height, width], as the weights were trained."""
        return prepare_image(raw, self.preprocessing)[None]

    @torch.no_grad()
    def predict(self, raw: Any) -> dict[str, Any]:
        """`{"label", "confidence", "top": [[label, probability], ...]}`, five best classes."""
        probability, index = self.model(self.preprocess(raw)).softmax(-1)[0].sort(descending=True)
        top = [
            [self.labels[i], round(float(p), 4)]
            for p, i in zip(probability[:5], index[:5].tolist(), strict=True)
        ]
        return {"label": top[0][0], "confidence": top[0][1], "top": top}

    def format(self, raw: Any, prediction: dict[str, Any]) -> str:
        others = ", ".join(f"{label} {p:.3f}" for label, p in prediction["top"][1:3])
        return f"{raw}: {prediction['label']} ({prediction['confidence']:.3f}; then {others})"
