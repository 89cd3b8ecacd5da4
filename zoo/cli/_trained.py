"""A finished run brought back from its weights and card, as several commands need it."""

from __future__ import annotations

from typing import Any

from zoo.errors import WeightsError


def trained(name: str) -> tuple[Any, Any, Any, dict[str, Any]]:
    """Task with its trained model, data, configuration and card of weights.

    Raises:
        WeightsError: No such weights, or a card without the configuration of its run.
    """
    from omegaconf import OmegaConf

    from tasks.engine.run import build_data, build_task, quiet
    from zoo.pretrained.weights import load_weights, read_card, resolve, swap_layers

    quiet()
    path = resolve(name)
    card = read_card(path)
    if "config" not in card:
        raise WeightsError(
            f"the card of {name} holds no configuration, so neither its data nor its test can be repeated"
        )
    cfg = OmegaConf.create(card["config"])
    data = build_data(cfg)
    task, _ = build_task(cfg, data)
    swap_layers(task.model, card)
    load_weights(task.model, path)
    return task, data, cfg, card
