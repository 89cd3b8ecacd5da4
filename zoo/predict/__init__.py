"""From raw input to a prediction that a person can read: one file per task, named after it.

A predictor needs the weights and their card, nothing of `tasks` or `data`.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from zoo.errors import DataError, WeightsError, unknown

COMMON_OPTIONS = ("--format", "--output", "--figures", "--json", "--quiet")


class Predictor:
    """A trained model with its preprocessing.

    Args:
        model: Model in evaluation mode.
        card: Its card; `preprocessing` and `labels` say how to use it.

    Attributes:
        suffixes: Ends of the names that a folder is searched for, in lower case; none for all files.
    """

    suffixes: ClassVar[tuple[str, ...]] = ()

    def __init__(self, model: nn.Module, card: dict[str, Any]) -> None:
        self.model, self.card = model, card
        self.labels: list[str] = card.get("labels", [])
        self.preprocessing: dict[str, Any] = card.get("preprocessing", {})

    def options(self, given: dict[str, str]) -> list[str]:
        """Take the task's own command line options; returns further inputs among them.

        Raises:
            ConfigError: An option that the task does not have.
        """
        for name in given:
            raise unknown("option of predict:", f"--{name}", COMMON_OPTIONS)
        return []

    def preprocess(self, raw: Any) -> Any:
        """Raw input (a path, an array ...) to model input with a batch of one."""
        raise NotImplementedError

    def predict(self, raw: Any) -> dict[str, Any]:
        """Prediction for one raw input: plain values.

        Raises:
            DataError: The input cannot be read.
        """
        raise NotImplementedError

    def inputs(self, arguments: list[str]) -> Iterator[str]:
        """Expand command line arguments to raw inputs: folders to the files in them that the task reads."""
        for argument in arguments:
            path = Path(argument)
            if path.is_dir():
                files = (str(p) for p in sorted(path.rglob("*")) if p.is_file())
                yield from (f for f in files if not self.suffixes or f.lower().endswith(self.suffixes))
            else:
                yield argument

    def rows(self, prediction: dict[str, Any]) -> list[dict[str, Any]]:
        """The prediction as rows of a table; lists and mappings inside a cell become JSON."""
        return [
            {k: json.dumps(v) if isinstance(v, (list, dict)) else v for k, v in prediction.items()},
        ]

    def format(self, raw: Any, prediction: dict[str, Any]) -> str:
        """One line for a person."""
        return f"{raw}: {prediction}"


def get_predictor(card: dict[str, Any]) -> type[Predictor]:
    """The predictor of a card's task.

    Raises:
        WeightsError: The task has none.
    """
    task = card.get("task", "?")
    for name in (task, card.get("kind", "?")):
        if (Path(__file__).parent / f"{name}.py").exists():
            return importlib.import_module(f"zoo.predict.{name}").TaskPredictor
    raise WeightsError(f"weights of task {task!r} have no predictor")


__all__ = ["DataError", "Predictor", "get_predictor"]
