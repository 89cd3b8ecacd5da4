"""Training steps of a task's model beside the peer that a user would pick, at equal configuration.

A function per task returns the contestants: ours first. Peers come from packages that are installed or not; what is
missing is said, never imitated.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from zoo.errors import ConfigError, unknown

Contestants = dict[str, Callable[[], None]]


def training_step(model: nn.Module, loss: Callable[[], Tensor], lr: float = 1e-3) -> Callable[[], None]:
    """zero_grad, forward, backward, AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss().backward()
        optimizer.step()

    return step


def vit(attention: str) -> Contestants:
    """28x28 grey images, patch 4, width 64, 4 blocks, 4 heads, class token, batch 100, against timm's ViT."""
    from timm.models.vision_transformer import VisionTransformer

    from zoo.models import create_model

    torch.manual_seed(0)
    images, labels = torch.randn(100, 1, 28, 28), torch.randint(10, (100,))
    shape = {"patch_size": 4, "num_classes": 10, "depth": 4, "num_heads": 4, "mlp_ratio": 2.0}
    mine = create_model(
        "vit_micro",
        attention=attention,
        image_size=28,
        in_channels=1,
        dim=64,
        stem="patch",
        class_token=True,
        pool="token",
        init="timm",
        **shape,
    )
    peer = VisionTransformer(img_size=28, in_chans=1, embed_dim=64, **shape)
    loss = nn.CrossEntropyLoss()
    return {
        f"zoo vit ({attention})": training_step(mine, lambda: loss(mine(images), labels)),
        "timm VisionTransformer": training_step(peer, lambda: loss(peer(images), labels)),
    }


def contestants(task: str, attention: str) -> Contestants:
    """The contestants of a task.

    Raises:
        ConfigError: Unknown task, or a peer's package is not installed.
    """
    known = find_tasks()
    if task not in known:
        raise unknown("benchmarked task", task, known)
    try:
        return known[task](attention)
    except ImportError as error:
        raise ConfigError(
            f"the peer of task {task!r} needs package {error.name!r}; install it with pip"
        ) from error


def mode(task: str) -> str:
    """What a call of the contestants is: a training step, unless `zoo.bench.peers_<task>` names another in `MODE`."""
    import importlib.util

    name = f"zoo.bench.peers_{task}"
    module = importlib.import_module(name) if importlib.util.find_spec(name) else None
    return getattr(module, "MODE", "training step")


def find_tasks() -> dict[str, Callable[[str], Contestants]]:
    """Tasks that have a peer: those here and those in `zoo.bench.peers_<task>`."""
    import importlib
    from pathlib import Path

    found: dict[str, Callable[[str], Contestants]] = {"vit": vit}
    for file in sorted(Path(__file__).parent.glob("peers_*.py")):
        found[file.stem.removeprefix("peers_")] = importlib.import_module(
            f"zoo.bench.{file.stem}"
        ).contestants
    return found
