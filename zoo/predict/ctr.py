"""A candidate and the items a user had, oldest first, to the probability of a click."""

from __future__ import annotations

from typing import Any

import torch

from zoo.errors import DataError
from zoo.predict import Predictor


class TaskPredictor(Predictor):
    """Inputs such as `17:3,8,8,41`: candidate, colon, history; item numbers from 1."""

    def preprocess(self, raw: Any) -> tuple[torch.Tensor, ...]:
        """Candidate, its category, history and its categories, batch of one."""
        category = torch.tensor(self.preprocessing["category"])
        head, colon, tail = str(raw).partition(":")
        try:
            item, history = int(head), [int(part) for part in tail.split(",") if part.strip()]
        except ValueError:
            raise DataError(f"{raw!r} is not CANDIDATE:ITEM,ITEM,... in item numbers") from None
        if not colon:
            raise DataError(f"{raw!r} has no history; write CANDIDATE:ITEM,ITEM,... or CANDIDATE: for none")
        if bad := [i for i in (item, *history) if not 1 <= i < len(category)]:
            raise DataError(
                f"item {bad[0]} of {raw!r} is not in the catalogue, whose numbers run 1 .. {len(category) - 1}"
            )
        history = history[-self.preprocessing["max_length"] :]
        items = torch.tensor([history or [0]])
        one = torch.tensor([item])
        return one, category[one], items, category[items]

    @torch.no_grad()
    def predict(self, raw: Any) -> dict[str, Any]:
        """`{"probability": of a click}`."""
        logit = self.model(*self.preprocess(raw))["logit"]
        return {"probability": round(float(logit.sigmoid()), 6)}

    def format(self, raw: Any, prediction: dict[str, Any]) -> str:
        return f"{raw}: click probability {prediction['probability']:.4f}"
