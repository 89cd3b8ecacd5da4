"""A sequence of token numbers that ends with a key, to the value that stood behind it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zoo.errors import DataError
from zoo.predict import Predictor


class TaskPredictor(Predictor):
    """Answers for sequences such as `5,200,17,131,5`."""

    def preprocess(self, raw: Any) -> Tensor:
        """Token numbers, int64 [1, L]."""
        words = raw.replace(",", " ").split() if isinstance(raw, str) else [str(item) for item in raw]
        vocabulary, length = self.preprocessing["vocabulary"], self.preprocessing["length"]
        for word in words:
            if not word.isdecimal() or int(word) >= vocabulary:
                raise DataError(
                    f"token {word!r}: give whole numbers below {vocabulary}, such as 5,200,17,131,5"
                )
        if not 1 <= len(words) <= length:
            raise DataError(f"{len(words)} tokens: the model takes 1 to {length}")
        return torch.tensor([[int(word) for word in words]])

    def predict(self, raw: Any) -> dict[str, Any]:
        with torch.inference_mode():
            probability, token = self.model(self.preprocess(raw))[0, -1].softmax(-1).max(-1)
        return {"value": int(token), "probability": float(probability)}

    def format(self, raw: Any, prediction: dict[str, Any]) -> str:
        return f"{raw} -> {prediction['value']} ({prediction['probability']:.2f})"
