"""Teaching swapped layers what the old ones did, and fine-tuning: the training loops of `zoo.conversion`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.attention.base import Attention
from zoo.errors import ConfigError

Inputs = Tensor | tuple[Any, ...] | Mapping[str, Any]
Call = tuple[tuple[Any, ...], dict[str, Any]]
HELD_OUT = 0.2  # share of the batches that decides when to stop


def transfer(
    teacher: nn.Module,
    student: nn.Module,
    pairs: list[tuple[str, str]],
    batches: list[Any],
    objective: str,
    epochs: int,
    lr: float,
    patience: int,
    losses: list[float],
    run: Callable[[nn.Module, Any], Any],
) -> None:
    """Train the swapped layers on what the teacher's layers see; the student ends with its best held-out state."""
    seen = [_inputs(teacher, [t for t, _ in pairs], batch, run) for batch in batches]
    old = [teacher.get_submodule(t) for t, _ in pairs]
    new = nn.ModuleList(student.get_submodule(s) for _, s in pairs).train(teacher.training)
    with torch.no_grad():
        read = _map if objective == "map" else nn.Module.__call__
        lessons = [
            [(call, read(o, *call[0], **call[1])) for o, call in zip(old, calls, strict=True)]
            for calls in seen
        ]

    def loss(lesson: list[tuple[Call, Tensor]]) -> Tensor:
        parts = zip(new, lesson, strict=True)
        return sum(_distance(n, call, wanted, objective) for n, (call, wanted) in parts) / len(new)

    _train(new, lessons, loss, epochs, lr, patience, losses)


def tune(
    model: nn.Module,
    batches: list[Any],
    loss: Callable[[Any], Tensor],
    epochs: int,
    lr: float,
    patience: int,
    losses: list[float],
) -> None:
    """Train the whole model on the batches; it ends with its best held-out state."""
    training = model.training
    model.train()
    _train(model, batches, loss, epochs, lr, patience, losses)
    model.train(training)


def _train(
    module: nn.Module,
    batches: list[Any],
    loss: Callable[[Any], Tensor],
    epochs: int,
    lr: float,
    patience: int,
    losses: list[float],
) -> None:
    """Minimise `loss` over the later batches with a falling rate; `module` ends with its best state on the first ones."""
    if len(batches) < 2:
        raise ConfigError(f"calibration needs at least 2 batches, one of them held out; got {len(batches)}")
    held = max(1, round(HELD_OUT * len(batches)))
    optimizer = torch.optim.AdamW(module.parameters(), lr=lr, weight_decay=0.0)
    steps, step = epochs * (len(batches) - held), 0

    def held_out() -> float:
        training = module.training
        module.eval()
        with torch.no_grad():
            value = float(sum(loss(batch) for batch in batches[:held])) / held
        module.train(training)
        return value

    losses.append(held_out())
    best, waited = copy.deepcopy(module.state_dict()), 0
    for _ in range(epochs):
        for batch in batches[held:]:
            for group in optimizer.param_groups:
                group["lr"] = lr * (1 - step / steps)
            optimizer.zero_grad(set_to_none=True)
            loss(batch).backward()
            optimizer.step()
            step += 1
        losses.append(held_out())
        if losses[-1] <= min(losses):
            best, waited = copy.deepcopy(module.state_dict()), 0
        else:
            waited += 1
            if waited >= patience:
                break
    module.load_state_dict(best)


@torch.no_grad()
def _inputs(
    model: nn.Module, names: list[str], batch: Any, run: Callable[[nn.Module, Any], Any]
) -> list[Call]:
    """What each named module is called with when the model, in evaluation mode, reads `batch`."""
    kept: dict[str, Call] = {}

    def keep(name: str) -> Callable[..., None]:
        # timm's blocks name masks that its vision transformers leave empty.
        return lambda module, args, kwargs: kept.update(
            {name: (args, {k: v for k, v in kwargs.items() if k not in ("attn_mask", "is_causal")})}
        )

    handles = [
        model.get_submodule(name).register_forward_pre_hook(keep(name), with_kwargs=True) for name in names
    ]
    training = model.training
    try:
        run(model.eval(), batch)
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    return [kept[name] for name in names]


def call_model(model: nn.Module, batch: Inputs) -> Any:
    """The model on one batch of its input."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple) else model(batch)


def _distance(new: Attention, call: Call, wanted: Tensor, objective: str) -> Tensor:
    """How far the new layer is from what the old one gave for the same call."""
    args, kwargs = call
    if objective == "output":
        # Relative, so that layers of different scale count alike.
        return F.mse_loss(new(*args, **kwargs), wanted) / wanted.var().clamp(min=1e-8)
    found = new.attention_map(*args, **kwargs).clamp(min=1e-8)
    return -(wanted * found.log()).sum(-1).mean()


def _map(old: nn.Module, x: Tensor, **kwargs: Any) -> Tensor:
    """Mixing matrix [B, H, N, N] of one of our modules or of timm's softmax attention."""
    if isinstance(old, Attention):
        return old.attention_map(x, **kwargs)
    q, k, _ = old.qkv(x).unflatten(-1, (3, old.num_heads, -1)).permute(2, 0, 3, 1, 4)
    return (old.q_norm(q) * old.scale @ old.k_norm(k).mT).softmax(-1)
