"""A timm vision transformer as one of ours: the same function, with places for other attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from zoo.errors import WeightsError
from zoo.models import create_model

_ACTIVATIONS = {nn.GELU: "gelu", nn.ReLU: "relu", nn.SiLU: "silu", nn.Tanh: "tanh"}
_GATED = {nn.SiLU: "swiglu", nn.GELU: "geglu", nn.ReLU: "reglu"}
_EPS = 1e-6


def from_timm(model: nn.Module, attention: str = "softmax") -> nn.Module:
    """Build our ViT with the weights of a timm VisionTransformer.

    Args:
        model: As `timm.create_model` returns it; it is left alone.
        attention: "softmax" gives the same logits. Other variants keep what maps; use `zoo.convert` to teach the rest.

    Returns:
        Our model in the mode of the given one; `load_report` says what was kept.

    Raises:
        WeightsError: A part that ours does not have; the message names it.
    """
    options, qk_norm = timm_options(model)
    plain = attention == "softmax"
    chosen = {"name": attention, "qk_norm": qk_norm} if plain and qk_norm else attention
    ours = create_model("vit", attention=chosen, **options)
    tensors, own = model.state_dict(), ours.state_dict()
    lost = sorted(k for k, v in tensors.items() if k not in own or own[k].shape != v.shape)
    fresh = sorted(own.keys() - tensors.keys())
    if plain and (lost or fresh):
        raise WeightsError(
            f"this {type(model).__name__} has parts that our ViT lacks: {', '.join((lost or fresh)[:4])}"
        )
    ours.load_state_dict({k: v for k, v in tensors.items() if k not in lost}, strict=False)
    ours.load_report = {"kept": len(tensors) - len(lost), "dropped": lost, "new": fresh}
    return ours.train(model.training)


def timm_options(model: nn.Module) -> tuple[dict[str, Any], bool]:
    """Options of our ViT that give a timm model's architecture, and whether its queries and keys are normalised."""
    try:
        block, embed = model.blocks[0], model.patch_embed
        mlp, gated = block.mlp, type(block.mlp).__name__ == "GluMlp"
        activation = _GATED.get(type(mlp.act)) if gated else _ACTIVATIONS.get(type(mlp.act))
        width = mlp.fc1.out_features // (2 if gated else 1)
        options = {
            "size": "base",
            "image_size": tuple(embed.img_size),
            "patch_size": int(embed.patch_size[0]),
            "in_channels": embed.proj.in_channels,
            "num_classes": model.num_classes,
            "dim": model.embed_dim,
            "depth": len(model.blocks),
            "num_heads": block.attn.num_heads,
            "mlp_ratio": width / model.embed_dim,
            "activation": activation,
            "stem": "patch",
            "class_token": model.cls_token is not None,
            "num_registers": 0 if model.reg_token is None else model.reg_token.shape[1],
            "pool": {"token": "token", "avg": "mean"}.get(model.global_pool),
            "no_embed_class": model.no_embed_class,
            "pre_norm": not isinstance(model.norm_pre, nn.Identity),
            "qkv_bias": block.attn.qkv.bias is not None,
            "layer_scale": None if isinstance(block.ls1, nn.Identity) else 1.0,
        }
    except (AttributeError, IndexError, TypeError) as error:
        raise WeightsError(f"{type(model).__name__} is no plain timm VisionTransformer: {error}") from None
    norms = [m for m in model.modules() if isinstance(m, nn.LayerNorm)]
    for wrong, what in (
        (activation is None, f"MLP {type(mlp).__name__} with {type(mlp.act).__name__}"),
        (options["pool"] is None, f"pooling {model.global_pool!r}"),
        (any(abs(m.eps - _EPS) > 1e-9 for m in norms), "layer norms with another eps than 1e-6"),
        (not hasattr(block, "ls1") or hasattr(block, "attns"), f"blocks of kind {type(block).__name__}"),
        (getattr(model, "rope", None) is not None, "rotary positions"),
        (getattr(model, "pos_embed", None) is None, "no position table"),
        (getattr(model, "attn_pool", None) is not None, "attention pooling"),
    ):
        if wrong:
            raise WeightsError(f"this {type(model).__name__} has {what}, which our ViT does not have")
    return options, not isinstance(getattr(block.attn, "q_norm", nn.Identity()), nn.Identity)


@torch.no_grad()
def to_timm(ours: nn.Module, model: nn.Module) -> None:
    """Copy our weights into a timm model of the same architecture.

    Raises:
        WeightsError: Another architecture, or attention that timm does not have.
    """
    own, theirs = ours.state_dict(), model.state_dict()
    odd = sorted(own.keys() ^ theirs.keys()) + [
        k for k in own.keys() & theirs.keys() if own[k].shape != theirs[k].shape
    ]
    if odd:
        names = sorted({m.name for m in ours.modules() if hasattr(m, "capabilities")})
        raise WeightsError(
            f"the timm model does not have our parameters {', '.join(odd[:4])}; our attention here is {', '.join(names)}, "
            "timm's is softmax"
        )
    model.load_state_dict(own)


__all__ = ["from_timm", "timm_options", "to_timm"]
