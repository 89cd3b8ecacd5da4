"""Swapping the attention inside a trained model, and teaching the new parts what the old ones did.

Attention transfer after The Hedgehog & the Porcupine, arXiv:2402.04347: every swapped layer learns, on the inputs that the
old model gives it, to reproduce the old layer; per-head cross-entropy between the rows of both mixing matrices
(``objective="map"``, both must have non-negative ones), or mean squared error of the layers' outputs (``"output"``).
Differs from the paper in: all parameters of a swapped layer learn, not feature maps alone.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.attention.base import Attention, Grid, Pattern
from zoo.attention.registry import create_attention, get_attention
from zoo.errors import CapabilityError, ConfigError
from zoo.transfer import Inputs, call_model, transfer, tune


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
    fine_tune: Iterable[tuple[Any, Any]] | None = None,
    fine_tune_epochs: int = 5,
    fine_tune_lr: float = 3e-4,
    loss: Callable[[Any, Any], Tensor] = F.cross_entropy,
    call: Callable[[nn.Module, Any], Any] = call_model,
) -> tuple[nn.Module, ConvertReport]:
    """A copy of `model` with other attention in some of its layers.

    Args:
        model: One of our models, or a timm VisionTransformer.
        attention: Variant to put in.
        layers: Numbers of the self-attention layers to swap, counted from 0; all when left out. Causal ones count only in a
            model that has no others.
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
        call: How a model reads a batch, where that is not by calling it with the batch.

    Raises:
        ConfigError: Layers that do not exist, or a model without self-attention that can be swapped.
        CapabilityError: The variant does not define the pattern, or has no map for objective "map".
    """
    if objective not in ("output", "map"):
        raise ConfigError(f"objective={objective!r}: choose output or map")
    can = get_attention(attention).capabilities_with(**options or {})
    if objective == "map" and (not can.has_map or can.signed_map):
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
        new = swap(converted, name, attention, options)
        _copy_parameters(old, new, name, report)
        report.layers.append(name)
        pairs.append((name, name if isinstance(old, Attention) else f"{name}.inner"))
    converted.train(model.training)
    if calibrate is not None:
        transfer(
            model, converted, pairs, list(calibrate), objective, epochs, lr, patience, report.losses, call
        )
    if fine_tune is not None:
        tune(
            converted,
            list(fine_tune),
            lambda batch: loss(call(converted, batch[0]), batch[1]),
            fine_tune_epochs,
            fine_tune_lr,
            patience,
            report.tuning_losses,
        )
    return converted, report


def swap(model: nn.Module, name: str, attention: str, options: dict[str, Any] | None = None) -> Attention:
    """Put untaught attention in the place of the module `name`; returns it."""
    old = model.get_submodule(name)
    new = _build(attention, old, model, options or {})
    model.set_submodule(name, new if isinstance(old, Attention) else TimmAttention(new))
    return new


def _places(model: nn.Module) -> list[str]:
    """Names of the self-attention modules, in order; of the causal ones where there are no others."""
    for pattern in (Pattern.SELF, Pattern.CAUSAL_SELF):
        ours = [n for n, m in model.named_modules() if isinstance(m, Attention) and m.pattern is pattern]
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
    dropout = getattr(getattr(old, "proj_drop", None), "p", 0.0)
    if isinstance(old, Attention):
        inputs = [getattr(old, key) for key in ("qkv", "kv", "k") if hasattr(old, key)]
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
            qkv_bias=all(module.bias is not None for module in inputs),
            dropout=dropout,
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
        dropout=dropout,
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
