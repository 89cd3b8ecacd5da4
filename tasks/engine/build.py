"""From a resolved configuration to the data module, the network and the LightningModule."""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig, OmegaConf

from tasks.base import ZooTask
from tasks.registry import check_options, check_types, data_of_kind, get_data, get_task
from zoo.attention.registry import get_attention
from zoo.attention.slots import AttentionFactory, resolve_slots
from zoo.errors import ConfigError
from zoo.models.registry import build_model, check_model_options, get_model, list_models, task_of


def build_data(cfg: DictConfig) -> Any:
    """The data module, prepared and set up."""
    options = plain(cfg.data)
    name = options.pop("name")
    cls = get_data(name)
    kind = get_task(cfg.task.kind).data_kind
    if kind and cls.kind != kind:
        raise ConfigError(
            f"data {name!r} holds {cls.kind}, task {cfg.task.name!r} needs {kind}: {', '.join(data_of_kind(kind))}"
        )
    check_options(f"data {name!r}", cls, options)
    check_types("data", cls, options)
    # data.seed shifts the order and augmentation of a run; it is 0 unless the user wants the same weights on another order.
    options["seed"] = cfg.seed + (options.get("seed") or 0)
    data = cls(**options)
    data.prepare_data()
    data.setup("fit")
    return data


def build_task(cfg: DictConfig, data: Any) -> tuple[ZooTask, dict[str, AttentionFactory]]:
    """Model and LightningModule, and which attention fills which slot."""
    cls = get_task(cfg.task.kind)
    options = {k: v for k, v in plain(cfg.task).items() if k not in ("name", "kind")}
    check_options(f"task {cfg.task.name!r}", cls, options)
    check_types("task", cls, options)
    arguments = {**plain(cfg.model), **cls.model_arguments(data)}
    name = arguments.pop("name")
    model_cls = get_model(name)
    try:
        check_model_options(name, arguments)
    except ConfigError as error:  # options of the task or its data: Hydra has refused the user's own
        if task_of(name) == cfg.task.name:
            raise
        fitting = ", ".join(list_models(task=cfg.task.name))
        raise ConfigError(
            f"model {name!r} is for task={task_of(name)}; those of task {cfg.task.name!r}: {fitting} ({error})"
        ) from None
    check_types("model", model_cls, plain(cfg.model))
    attention = plain(cfg.attention)
    switches = {k: attention.pop(k, False) for k in ("strict", "allow_order")}
    for key, value in switches.items():
        if not isinstance(value, bool):
            raise ConfigError(f"attention.{key}={value!r}: write true or false")
    overrides = {
        key.removesuffix("_attention"): plain(value)
        for key, value in cfg.items()
        if key.endswith("_attention") and value is not None
    }
    for slot, chosen in (("attention", attention), *overrides.items()):
        for entry in (chosen, *(e for e in chosen.get("stack") or () if isinstance(e, dict) and "name" in e)):
            check_types(slot, get_attention(entry["name"]), entry)
    factories = resolve_slots(
        model_cls.slots(**arguments), attention, overrides, task=cfg.task.name, **switches
    )
    model = build_model(name, attention=factories, **arguments)
    # What rebuilds this very model from its card.
    model.build_arguments = {"name": name, "options": arguments}
    return cls(model, data, **options), factories


def plain(node: Any) -> dict[str, Any]:
    return OmegaConf.to_container(node, resolve=True) if node is not None else {}
