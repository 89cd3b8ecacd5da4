"""Items a user had, oldest first, to the items to show next."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from zoo.errors import ConfigError, DataError, closest, unknown
from zoo.predict import COMMON_OPTIONS, Predictor
from zoo.predict._serving import blocked_top_k, pad_left


class TaskPredictor(Predictor):
    """Top-k for histories such as `50,181,172`, or a file with one history a line.

    Histories have no times: a model that was trained with them (hstu) leaves its biases of time out.
    """

    def __init__(self, model: nn.Module, card: dict[str, Any]) -> None:
        super().__init__(model, card)
        self.items: list[str] = self.preprocessing["items"]
        self.titles: list[str] = self.preprocessing.get("titles") or []
        self.number = {item: i + 1 for i, item in enumerate(self.items)}
        self.top_k = 10

    def options(self, given: dict[str, str]) -> list[str]:
        """`--user-history IDS` is a further input, `--top-k K` the length of the list."""
        inputs = []
        for name, value in given.items():
            if name == "user-history":
                inputs.append(value)
            elif name == "top-k":
                if not value.isdecimal() or not 1 <= int(value) <= len(self.items):
                    raise ConfigError(f"--top-k {value}: give a whole number from 1 to {len(self.items)}")
                self.top_k = int(value)
            else:
                raise unknown(
                    "option of predict:", f"--{name}", ("--user-history", "--top-k", *COMMON_OPTIONS)
                )
        return inputs

    def inputs(self, arguments: list[str]) -> Iterator[str]:
        for argument in arguments:
            if Path(argument).is_file():
                try:
                    lines = Path(argument).read_text(encoding="utf-8").splitlines()
                except (OSError, UnicodeDecodeError) as error:
                    raise DataError(
                        f"cannot read {argument} as text with one history a line: {error}"
                    ) from error
                yield from (line for line in lines if line.strip())
            else:
                yield argument

    def preprocess(self, raw: Any) -> tuple[list[int], list[str]]:
        """Item numbers and the ids that the catalogue lacks."""
        ids = raw.replace(" ", ",").split(",") if isinstance(raw, str) else [str(item) for item in raw]
        ids = [item.strip() for item in ids if item.strip()]
        known = [self.number[item] for item in ids if item in self.number]
        ignored = [item for item in ids if item not in self.number]
        if not known:
            if not ids:
                raise DataError("the history is empty; give item ids, oldest first, such as 50,181,172")
            near = closest(ids[0], self.items)
            hint = (
                f"did you mean {' or '.join(near)}?" if near else f"ids look like {', '.join(self.items[:3])}"
            )
            raise DataError(f"no item of the history {raw!r} is in the catalogue; {hint}")
        return known, ignored

    @torch.no_grad()
    def predict(self, raw: Any) -> dict[str, Any]:
        """`{"top": [[id, title, score], ...], "used": count, "ignored": [ids not in the catalogue]}`."""
        known, ignored = self.preprocess(raw)
        users = self.model.user_vector(pad_left([known], self.model.max_length))
        seen = torch.tensor([known]) - 1 if self.preprocessing["exclude_seen"] else None
        table, bias = self.model.item_table()
        scores, items = blocked_top_k(users, table, bias, min(self.top_k, len(table)), excluded=seen)
        top = [
            [self.items[i], self.titles[i] if self.titles else "", round(score, 4)]
            for i, score in zip(items[0].tolist(), scores[0].tolist(), strict=True)
            if score > float("-inf")
        ]
        return {"top": top, "used": min(len(known), self.model.max_length), "ignored": ignored}

    def rows(self, prediction: dict[str, Any]) -> list[dict[str, Any]]:
        """One row per item."""
        return [
            {"rank": n, "item": item, "title": title, "score": score}
            for n, (item, title, score) in enumerate(prediction["top"], 1)
        ]

    def format(self, raw: Any, prediction: dict[str, Any]) -> str:
        lines = [f"{raw}:"]
        lines += [
            f"  {n:3}. {item:>8}  {score:8.3f}  {title}"
            for n, (item, title, score) in enumerate(prediction["top"], 1)
        ]
        if prediction["ignored"]:
            lines.append(f"  not in the catalogue, ignored: {', '.join(prediction['ignored'])}")
        return "\n".join(lines)
