"""Tiny physics-informed tasks and their training, for the tests of this folder."""

import lightning as L
import torch

from data import create_data
from tasks.pinn import PinnTask
from zoo.attention.slots import resolve_slots
from zoo.models.registry import build_model, get_model


def make(
    model="pinn_mlp",
    problem="reaction",
    physics=None,
    data=None,
    model_options=None,
    attention="softmax",
    **options,
):
    torch.manual_seed(0)
    few = {"interior": 48, "border": 20, "valid_points": 50}
    points = create_data("pinn", problem=problem, physics=physics, **few | (data or {}))
    points.setup()
    arguments = {"dim": 8, **PinnTask.model_arguments(points), **(model_options or {})}
    slots = get_model(model).slots(**arguments)
    factories = resolve_slots(slots, {"name": attention}) if slots else {}
    network = build_model(model, factories, **arguments)
    return PinnTask(network, points, **{"first_steps": 6, "resample_every": 3, **options})


def total(task):
    """The loss, with its gradients left in the weights."""
    return float(task._total(task.objective.backward(task.balance, task.points)))


def fit(task, folder, steps, resume=None, callbacks=()):
    task.data.steps_per_epoch = 4
    task.data._datasets = {}
    task.data.setup()
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=steps,
        logger=False,
        default_root_dir=folder,
        callbacks=list(callbacks),
        enable_checkpointing=bool(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(task, datamodule=task.data, ckpt_path=resume)
    return trainer
