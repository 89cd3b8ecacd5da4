"""Trained weights: files and cards (`weights`), and `load`, which makes them usable on raw input."""

from __future__ import annotations

from pathlib import Path

from zoo.predict import Predictor, get_predictor
from zoo.pretrained.weights import load_model, load_weights, pick_weights, read_card, resolve, save_weights


def load(name: str | Path) -> Predictor:
    """Weights by name, file or run folder, ready for raw input: `.model`, `.predict(...)`, `.labels`, `.card`."""
    model, card = load_model(name)
    return get_predictor(card)(model, card)


__all__ = ["load", "load_model", "load_weights", "pick_weights", "read_card", "resolve", "save_weights"]
