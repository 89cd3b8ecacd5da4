"""Swapping the attention inside a trained model, and teaching the new parts what the old ones did.

Attention transfer after The Hedgehog & the Porcupine, arXiv:2402.04347: every swapped layer learns, on the inputs that the
old model gives it, to reproduce the old layer; per-head cross-entropy between the rows of both mixing matrices
(``objective="map"``, both must have non-negative ones), or mean squared error of the layers' outputs (``"output"``).
Differs from the paper in: all parameters of a swapped layer learn, not feature maps alone.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.attention.base import Attention, Grid, Pattern
from zoo.attention.registry import create_attention, get_attention
from zoo.errors import CapabilityError, ConfigError

Inputs = Tensor | tuple[Any, ...] | Mapping[str, Any]
Call = tuple[tuple[Any, ...], dict[str, Any]]
HELD_OUT = 0.2  # share of the calibration batches that decides when to stop


@dataclass
class ConvertReport:
    """What a conversion kept and learned.

    Attributes:
        layers: Names of the swapped modules.
        kept: Parameters copied from the old layers.
        new: Parameters that the new layers start afresh.
        dropped: Parameters of the old layers without a place in the new ones.
        losses: Held-out transfer loss before the first and after every epoch; empty without calibration.
        tuning_losses: The same of the fine-tuning.
    """

    layers: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    new: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    tuning_losses: list[float] = field(default_factory=list)

    def __str__(self) -> str:
        text = f"{len(self.layers)} layers swapped; {len(self.kept)} parameters kept, {len(self.new)} new, {len(self.dropped)} dropped"
        for name, losses in (("transfer", self.losses), ("fine-tuning", self.tuning_losses)):
            if losses:
                text += f"; {name} loss {losses[0]:.4g} -> {min(losses):.4g} in {len(losses) - 1} epochs"
        return text


class TimmAttention(nn.Module):
    """One of our attention modules under the call that timm's blocks make."""

    def __init__(self, inner: Attention) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        if attn_mask is not None or is_causal:
            raise CapabilityError(
                f"converted attention {self.inner.name!r} takes neither attn_mask nor is_causal"
            )
        return self.inner(x)


def convert(
    model: nn.Module,
    attention: str,
    *,
    layers: Sequence[int] | None = None,
    options: dict[str, Any] | None = None,
    calibrate: Iterable[Inputs] | None = None,
    objective: str = "output",
    epochs: int = 60,
    lr: float = 4e-3,
    patience: int = 5,
    fine_tune: Iterable[tuple[Inputs, Tensor]] | None = None,
    fine_tune_epochs: int = 5,
    fine_tune_lr: float = 3e-4,
    loss: Callable[[Any, Tensor], Tensor] = F.cross_entropy,
) -> tuple[nn.Module, ConvertReport]:
    """A copy of `model` with other attention in some of its layers.

    Args:
        model: One of our models, or a timm VisionTransformer.
        attention: Variant to put in.
        layers: Numbers of the self-attention layers to swap, counted from 0; all when left out.
        options: The variant's own options.
        calibrate: Batches of model input (a tensor, a tuple of positional or a mapping of named arguments) for attention
            transfer; without them the new parts stay untrained. Four fifths train, the rest decide when to stop.
        objective: "output" or "map".
        epochs: Most passes over the batches.
        lr: Learning rate of the transfer.
        patience: Epochs without improvement on the held-out batches before it stops.
        fine_tune: Batches of (model input, target): afterwards the whole model trains on them, with the same split.
        fine_tune_epochs: Most passes over them.
        fine_tune_lr: Learning rate of that training.
        loss: Of (model output, target), for fine-tuning.

    Raises:
        ConfigError: Layers that do not exist, or a model without self-attention that can be swapped.
        CapabilityError: The variant does not define the pattern, or has no map for objective "map".
    """
    if objective not in ("output", "map"):
        raise ConfigError(f"objective={objective!r}: choose output or map")
    cls = get_attention(attention)
    if objective == "map" and (not cls.capabilities.has_map or cls.capabilities.signed_map):
        raise CapabilityError(f"attention {attention!r} has no non-negative map; use objective='output'")
    places = _places(model)
    chosen = range(len(places)) if layers is None else layers
    for number in chosen:
        if not 0 <= number < len(places):
            raise ConfigError(f"layer {number} does not exist; the model has layers 0 ... {len(places) - 1}")
    converted = copy.deepcopy(model)
    report = ConvertReport()
    pairs: list[tuple[str, str]] = []
    for number in chosen:
        name = places[number]
        old = converted.get_submodule(name)
        new = _build(attention, old, model, options or {})
        _copy_parameters(old, new, name, report)
        converted.set_submodule(name, new if isinstance(old, Attention) else TimmAttention(new))
        report.layers.append(name)
        pairs.append((name, name if isinstance(old, Attention) else f"{name}.inner"))
    converted.train(model.training)
    if calibrate is not None:
        _transfer(model, converted, pairs, list(calibrate), objective, epochs, lr, patience, report)
    if fine_tune is not None:
        _fine_tune(converted, list(fine_tune), loss, fine_tune_epochs, fine_tune_lr, patience, report)
    return converted, report


def _places(model: nn.Module) -> list[str]:
    """Names of the self-attention modules, in order."""
    ours = [n for n, m in model.named_modules() if isinstance(m, Attention) and m.pattern is Pattern.SELF]
    if ours:
        return ours
    timms = [
        n
        for n, m in model.named_modules()
        if n.endswith(".attn")
        and hasattr(m, "qkv")
        and hasattr(m, "num_heads")
        and hasattr(model, "patch_embed")
    ]
    if not timms:
        raise ConfigError(
            f"{type(model).__name__} has no self-attention that can be swapped; give one of our models or a timm "
            "VisionTransformer"
        )
    return timms


def _build(name: str, old: nn.Module, model: nn.Module, options: dict[str, Any]) -> Attention:
    if isinstance(old, Attention):
        return create_attention(
            name,
            old.dim,
            old.num_heads,
            pattern=old.pattern,
            head_dim=old.head_dim,
            value_head_dim=old.value_head_dim,
            length=old.length,
            grid=old.grid,
            ordered=old.ordered,
            higher_order=old.higher_order,
            **options,
        )
    grid = Grid(tuple(model.patch_embed.grid_size), model.num_prefix_tokens)
    return create_attention(
        name,
        old.qkv.in_features,
        old.num_heads,
        pattern=Pattern.SELF,
        length=grid.tokens,
        grid=grid,
        qkv_bias=old.qkv.bias is not None,
        **options,
    )


def _copy_parameters(old: nn.Module, new: Attention, name: str, report: ConvertReport) -> None:
    source, target = dict(old.named_parameters()), dict(new.named_parameters())
    with torch.no_grad():
        for key, parameter in target.items():
            if key in source and source[key].shape == parameter.shape:
                parameter.copy_(source[key])
                report.kept.append(f"{name}.{key}")
            else:
                report.new.append(f"{name}.{key}")
    report.dropped += [f"{name}.{k}" for k in source if f"{name}.{k}" not in report.kept]


def _transfer(
    teacher: nn.Module,
    student: nn.Module,
    pairs: list[tuple[str, str]],
    batches: list[Inputs],
    objective: str,
    epochs: int,
    lr: float,
    patience: int,
    report: ConvertReport,
) -> None:
    """Train the swapped layers on what the teacher's layers see; the student ends with its best held-out state."""
    seen = [_inputs(teacher, [t for t, _ in pairs], batch) for batch in batches]
    old = [teacher.get_submodule(t) for t, _ in pairs]
    new = nn.ModuleList(student.get_submodule(s) for _, s in pairs)
    with torch.no_grad():
        read = _map if objective == "map" else nn.Module.__call__
        lessons = [
            [(call, read(o, *call[0], **call[1])) for o, call in zip(old, calls, strict=True)]
            for calls in seen
        ]

    def loss(lesson: list[tuple[Call, Tensor]]) -> Tensor:
        parts = zip(new, lesson, strict=True)
        return sum(_distance(n, call, wanted, objective) for n, (call, wanted) in parts) / len(new)

    _train(new, lessons, loss, epochs, lr, patience, report.losses)


def _fine_tune(
    model: nn.Module,
    batches: list[tuple[Inputs, Tensor]],
    loss: Callable[[Any, Tensor], Tensor],
    epochs: int,
    lr: float,
    patience: int,
    report: ConvertReport,
) -> None:
    training = model.training
    model.train()
    _train(
        model, batches, lambda b: loss(_call(model, b[0]), b[1]), epochs, lr, patience, report.tuning_losses
    )
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
def _inputs(model: nn.Module, names: list[str], batch: Inputs) -> list[Call]:
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
        _call(model.eval(), batch)
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    return [kept[name] for name in names]


def _call(model: nn.Module, batch: Inputs) -> Any:
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
