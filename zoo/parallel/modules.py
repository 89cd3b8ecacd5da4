"""Attention modules, alone or inside a model, whose tokens are split among processes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from kernels import decay, delta
from zoo.attention.base import Attention, Pattern
from zoo.errors import CapabilityError
from zoo.parallel import sequence

_SCANS = {decay.decay_scan: sequence.decay_scan, delta.delta_scan: sequence.delta_scan}
_SELF = (Pattern.SELF, Pattern.CAUSAL_SELF)


def split_sequence(model: nn.Module, group: dist.ProcessGroup | None = None) -> nn.Module:
    """Make every attention module of `model` attend over the tokens of all processes; changes `model` and returns it.

    Each process then calls the model with its own contiguous part of the tokens, in rank order. What works token by token
    (norms, MLPs, embeddings) needs nothing; position tables have to be given the part's positions. Parameters are held by
    every process: sum their gradients over the processes after the backward pass (the loss being a sum over tokens).

    Args:
        model: A model or one attention module.
        group: Process group; the default one when left out.

    Raises:
        CapabilityError: A module whose mixing needs neighbours across the border (convolutions, rotary tables, biases) or that
            has no distributed form.
    """
    for name, module in model.named_modules():
        if isinstance(module, Attention):
            found = _methods(module, group)
            if found is None:
                raise CapabilityError(
                    f"attention {module.name!r} ({name or 'the model'}) cannot be split over processes as it is built: "
                    "use softmax, linear (self, causal_self), mala with rope=none lepe=none, or a causal gla, deltanet, "
                    "gdn, kda with conv=0"
                )
            module.__class__ = type(f"Split{type(module).__name__}", (type(module),), found)
    return model


def _methods(module: Attention, group: dist.ProcessGroup | None) -> dict[str, Any] | None:
    """What replaces the module's own methods; None where splitting would change the result."""
    if module.pattern not in _SELF or getattr(module, "sink", "none") != "none":
        return None
    common = {"causal": module.causal, "group": group}
    if module.name == "softmax":
        options = {"softcap": module.softcap, "higher_order": module.higher_order}
        return {"attend": _attend(partial(sequence.softmax_attention, **common, **options))}
    if module.name == "linear" and module.feature != "softmax":
        call = partial(
            sequence.linear_attention,
            feature=module.feature,
            normalize=module._division,
            eps=module.eps,
            **common,
        )
        return {"attend": _attend(call, module._normalize)}
    if module.name == "mala" and not module.rope and module.lepe is None:
        options = {"feature": module.feature, "key_norm": module.key_norm, "eps": module.eps}
        return {"attend": _attend(partial(sequence.mala, **common, **options))}
    scan = _SCANS.get(getattr(type(module), "scan", None))
    plain = getattr(module, "conv_k", module) is None and getattr(module, "normalizer", None) in (
        None,
        "denom",
    )
    if scan is None or not module.causal or not plain:
        return None

    def split_scan(*args: Any, positions: None = None, **named: Any) -> Tensor:
        return scan(*args, group=group, **named)

    return {"scan": staticmethod(split_scan)}


def _attend(call: Callable[..., Tensor], finish: Callable[[Tensor], Tensor] | None = None) -> Callable:
    def attend(
        self: Attention,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        key_mask: Tensor | None = None,
        bias: Any = None,
        grid: Any = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        if bias is not None or positions is not None:
            raise CapabilityError(
                "a split sequence takes no bias and no positions; encode places in the tokens"
            )
        heads = call(q, k, v, key_mask=key_mask)
        return heads if finish is None else finish(heads)

    return attend
