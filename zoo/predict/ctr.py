"""A candidate and the items a user had, oldest first, to the probability of a click."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from zoo.errors import DataError
from zoo.predict import Predictor


class TaskPredictor(Predictor):
    """Inputs such as `17:3,8,8,41`: candidate, colon, history; ids of the log, or item numbers from 1 for simulated clicks."""

    def __init__(self, model: nn.Module, card: dict[str, Any]) -> None:
        super().__init__(model, card)
        self.category = torch.tensor(self.preprocessing["category"])
        items = self.preprocessing.get("items") or [str(i) for i in range(1, len(self.category))]
        self.number = {item: i for i, item in enumerate(items, 1)}

    def preprocess(self, raw: Any) -> tuple[torch.Tensor, ...]:
        """Candidate, its category, history and its categories, batch of one."""
        return self._read(raw)[0]

    def _read(self, raw: Any) -> tuple[tuple[torch.Tensor, ...], list[str]]:
        """Model input, and the ids of the history that the catalogue lacks."""
        head, colon, tail = str(raw).partition(":")
        item, history = head.strip(), [part.strip() for part in tail.split(",") if part.strip()]
        if not colon:
            raise DataError(f"{raw!r} has no history; write CANDIDATE:ITEM,ITEM,... or CANDIDATE: for none")
        known = [self.number[i] for i in history if i in self.number]
        ignored = [i for i in history if i not in self.number]
        if item not in self.number or (history and not known):
            lost = ignored[0] if item in self.number else item
            some = ", ".join(list(self.number)[:3])
            raise DataError(f"item {lost!r} of {raw!r} is not in the catalogue, whose ids look like {some}")
        items = torch.tensor([known[-self.preprocessing["max_length"] :] or [0]])
        one = torch.tensor([self.number[item]])
        return (one, self.category[one], items, self.category[items]), ignored

    @torch.no_grad()
    def predict(self, raw: Any) -> dict[str, Any]:
        """`{"probability": of a click, "ignored": [ids of the history not in the catalogue]}`."""
        inputs, ignored = self._read(raw)
        logit = self.model(*inputs)["logit"]
        return {"probability": round(float(logit.sigmoid()), 6), "ignored": ignored}

    def format(self, raw: Any, prediction: dict[str, Any]) -> str:
        text = f"{raw}: click probability {prediction['probability']:.4f}"
        if prediction["ignored"]:
            text += f" (not in the catalogue, ignored: {', '.join(prediction['ignored'])})"
        return text
