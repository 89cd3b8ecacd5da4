"""Vision transformer for classification, with any attention inside.

Paper: "An image is worth 16x16 words", arXiv:2010.11929; sizes and recipe of DeiT, arXiv:2012.12877. Parameter names
and numerics are those of timm's VisionTransformer, so weights go back and forth unchanged.
Differs from it in: the `micro` size with a convolutional stem and an initialisation for small data sets.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from zoo.attention.base import Attention, Grid, Pattern
from zoo.attention.slots import AttentionFactory, Slot
from zoo.errors import ConfigError, WeightsError, unknown
from zoo.layers.blocks import TransformerBlock
from zoo.layers.drop import depth_rates, dropout_or_none
from zoo.layers.patch import ConvStem, PatchEmbed, as_pair
from zoo.layers.pool import EfficientProbe
from zoo.layers.position import resample_positions
from zoo.models.registry import register_model

log = logging.getLogger(__name__)

_LARGE = {
    "image_size": 224,
    "patch_size": 16,
    "in_channels": 3,
    "num_classes": 1000,
    "depth": 12,
    "mlp_ratio": 4.0,
    "stem": "patch",
    "class_token": True,
    "pool": "token",
    "init": "timm",
    "position_std": 0.02,
}


@register_model
class VisionTransformer(nn.Module):
    """Patches to tokens, pre-norm blocks, one pooled token, a linear classifier.

    Arguments left out take the value of `size`.

    Args:
        attention: Factory for slot "encoder".
        size: "micro" (28x28 grey images, 157k parameters), or "tiny", "small", "base" as in timm.
        image_size: Side in pixels, or (height, width), that the position table is made for.
        patch_size: Pixels per token along each axis.
        in_channels: Channels of the image.
        num_classes: Number of logits; 0 leaves the classifier out.
        dim: Width C.
        depth: Number of blocks.
        num_heads: Heads; must divide `dim`.
        mlp_ratio: Hidden width of the MLP over `dim`.
        activation: Of the MLP: gelu, relu, silu, tanh, swiglu, geglu, reglu.
        stem: "patch", one linear map per patch, or "conv", stride-2 convolutions.
        class_token: Prepend a class token.
        num_registers: Register tokens after the class token.
        pool: "token" (the class token), "mean" (over the patches) or "ep" (efficient probing: learned queries read the patches).
        pool_queries: Queries of "ep"; must divide `dim`.
        no_embed_class: Class and register tokens get no position embedding.
        pre_norm: A norm between embedding and blocks, as CLIP has; the patch map then has no bias.
        qkv_bias: Bias of the query, key and value projections.
        init: "timm" (normal, std 0.02) or "xavier"; the first fails on small data sets (0.43 against 0.93 accuracy
            on 8x8 digits after 20 epochs, position_std included).
        position_std: Standard deviation of the position table at the start; 0.02 is common, 0.5 suits small data.
        drop_path: Rate of the last block; rises linearly from 0.
        layer_scale: First value of the branches' channel factors; None for no factors.
        dropout: Dropout after projections, inside MLPs and before the classifier.
    """

    name: ClassVar[str]
    sizes: ClassVar[dict[str, dict[str, Any]]] = {
        "micro": {
            "image_size": 28,
            "patch_size": 4,
            "in_channels": 1,
            "num_classes": 10,
            "dim": 64,
            "depth": 4,
            "num_heads": 4,
            "mlp_ratio": 2.0,
            "stem": "conv",
            "class_token": False,
            "pool": "mean",
            "init": "xavier",
            "position_std": 0.5,
        },
        "tiny": dict(_LARGE, dim=192, num_heads=3),
        "small": dict(_LARGE, dim=384, num_heads=6),
        "base": dict(_LARGE, dim=768, num_heads=12),
    }

    def __init__(
        self,
        attention: Mapping[str, AttentionFactory],
        *,
        size: str = "micro",
        image_size: int | tuple[int, int] | None = None,
        patch_size: int | None = None,
        in_channels: int | None = None,
        num_classes: int | None = None,
        dim: int | None = None,
        depth: int | None = None,
        num_heads: int | None = None,
        mlp_ratio: float | None = None,
        activation: str = "gelu",
        stem: str | None = None,
        class_token: bool | None = None,
        num_registers: int = 0,
        pool: str | None = None,
        pool_queries: int = 16,
        no_embed_class: bool = False,
        pre_norm: bool = False,
        qkv_bias: bool = True,
        init: str | None = None,
        position_std: float | None = None,
        drop_path: float = 0.0,
        layer_scale: float | None = None,
        dropout: float = 0.0,
    ) -> None:
        given = {key: value for key, value in locals().items() if key in self.sizes["micro"]}
        super().__init__()
        o = self._complete(size, given)
        dim, depth, num_heads = o["dim"], o["depth"], o["num_heads"]
        _check(o, num_registers)
        self.dim, self.num_classes, self.pool = dim, o["num_classes"], o["pool"]
        self.init, self.position_std = o["init"], o["position_std"]
        self.in_channels, self.image_size = o["in_channels"], as_pair(o["image_size"])
        self.num_prefix = int(o["class_token"]) + num_registers
        self.no_embed_class = no_embed_class

        if o["stem"] == "conv":
            self.patch_embed: PatchEmbed | ConvStem = ConvStem(self.in_channels, dim, o["patch_size"])
        else:
            self.patch_embed = PatchEmbed(self.in_channels, dim, o["patch_size"], bias=not pre_norm)
        self.grid = Grid(self.patch_embed.grid_of(*self.image_size), self.num_prefix)
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim)) if o["class_token"] else None
        self.reg_token = nn.Parameter(torch.empty(1, num_registers, dim)) if num_registers else None
        rows = self.grid.tokens - (self.num_prefix if no_embed_class else 0)
        self.pos_embed = nn.Parameter(torch.empty(1, rows, dim))
        self.norm_pre = nn.LayerNorm(dim, eps=1e-6) if pre_norm else nn.Identity()
        self.blocks = nn.ModuleList(
            TransformerBlock(
                attention["encoder"],
                dim,
                num_heads,
                mlp_ratio=o["mlp_ratio"],
                activation=activation,
                dropout=dropout,
                drop_path=rate,
                layer_scale=layer_scale,
                length=self.grid.tokens,
                grid=self.grid,
                qkv_bias=qkv_bias,
            )
            for rate in depth_rates(drop_path, depth)
        )
        mean = self.pool == "mean"
        self.norm = nn.Identity() if mean else nn.LayerNorm(dim, eps=1e-6)
        self.probe = EfficientProbe(dim, queries=pool_queries) if self.pool == "ep" else None
        self.fc_norm = nn.LayerNorm(dim, eps=1e-6) if mean else nn.Identity()
        self.head_drop = dropout_or_none(dropout)
        self.head = nn.Linear(dim, self.num_classes) if self.num_classes else nn.Identity()
        self.reset_parameters()

    @classmethod
    def _complete(cls, size: str, given: Mapping[str, Any]) -> dict[str, Any]:
        if size not in cls.sizes:
            raise unknown("size of model 'vit':", str(size), cls.sizes)
        return {**cls.sizes[size], **{k: v for k, v in given.items() if v is not None}}

    @classmethod
    def slots(cls, **options: Any) -> dict[str, Slot]:
        """One slot: the attention of every block, over the grid of patches."""
        return {"encoder": Slot(Pattern.SELF, grid_dims=2, length_known=True)}

    def reset_parameters(self) -> None:
        """Initialise stem, projections and tables; a variant's own parameters keep what it gave them."""
        variants = [m for m in self.modules() if isinstance(m, Attention)]
        foreign = {id(layer) for variant in variants for layer in variant.modules()}
        for variant in variants:
            for name in ("qkv", "q", "k", "v", "proj"):
                if isinstance(layer := getattr(variant, name, None), nn.Linear):
                    self._init_linear(layer)
        for layer in self.modules():
            if isinstance(layer, nn.Linear) and id(layer) not in foreign:
                self._init_linear(layer)
        nn.init.trunc_normal_(self.pos_embed, std=self.position_std)
        for token in (self.cls_token, self.reg_token):
            if token is not None:
                nn.init.normal_(token, std=1e-6)

    def _init_linear(self, layer: nn.Linear) -> None:
        if self.init == "xavier":
            nn.init.xavier_uniform_(layer.weight)
        else:
            nn.init.trunc_normal_(layer.weight, std=0.02)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)

    def _embed(self, images: Tensor) -> tuple[Tensor, Grid]:
        if images.dim() != 4 or images.shape[1] != self.in_channels:
            raise ConfigError(
                f"images must be [B, {self.in_channels}, height, width], got {list(images.shape)}; in_channels sets "
                "the channels"
            )
        x = self.patch_embed(images)
        grid = Grid(self.patch_embed.grid_of(*images.shape[-2:]), self.num_prefix)
        table = self.pos_embed
        if grid.shape != self.grid.shape:
            own = 0 if self.no_embed_class else self.num_prefix
            table = resample_positions(table, self.grid.shape, grid.shape, prefix=own)
        if self.no_embed_class:
            x = x + table
        prefix = [t.expand(x.shape[0], -1, -1) for t in (self.cls_token, self.reg_token) if t is not None]
        if prefix:
            x = torch.cat((*prefix, x), dim=1)
        if not self.no_embed_class:
            x = x + table
        return self.norm_pre(x), grid

    def forward_features(self, images: Tensor) -> Tensor:
        """Images [B, channels, height, width] to tokens [B, prefix + rows * columns, C], class token first."""
        x, grid = self._embed(images)
        for block in self.blocks:
            x = block(x, grid=grid)
        return self.norm(x)

    def forward_head(self, x: Tensor) -> Tensor:
        """Tokens of `forward_features` to logits [B, num_classes], or to [B, C] without a classifier."""
        if self.pool == "token":
            x = x[:, 0]
        else:
            x = x[:, self.num_prefix :] if self.num_prefix else x
            x = x.mean(dim=1) if self.probe is None else self.probe(x)
        return self.head(self.head_drop(self.fc_norm(x)))

    def forward(self, images: Tensor) -> Tensor:
        """Classify.

        Args:
            images: [B, channels, height, width]; other sizes than `image_size` must divide into patches and get
                a resampled position table.

        Returns:
            Logits, [B, num_classes].
        """
        return self.forward_head(self.forward_features(images))

    @property
    def no_weight_decay(self) -> set[str]:
        """Names of parameters that take no weight decay besides norms, biases and LayerScale."""
        return {"pos_embed", "cls_token", "reg_token"}

    def adapt_state_dict(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Fit another grid's position table to this model's; `load_state_dict` does it too.

        Args:
            weights: A state dict of this architecture, ours or timm's.

        Returns:
            The state dict with `pos_embed` resampled where its grid differs. Where this model has no rows for class
            and register tokens, these rows are added to the tokens themselves, which is the same function.

        Raises:
            WeightsError: The table's grid, which must be square, cannot be told from its length.
        """
        weights = dict(weights)
        table = weights.get("pos_embed")
        if table is None or table.shape == self.pos_embed.shape or table.shape[-1] != self.dim:
            return weights
        named = [k for k in ("cls_token", "reg_token") if k in weights]
        prefix = sum(weights[k].shape[1] for k in named)
        wanted = 0 if self.no_embed_class else self.num_prefix
        for rows in dict.fromkeys((prefix, 0)):
            side = math.isqrt(max(0, table.shape[1] - rows))
            if side * side + rows != table.shape[1] or wanted not in (0, rows):
                continue
            log.info("position table resampled from %dx%d to %dx%d", side, side, *self.grid.shape)
            table = resample_positions(table, (side, side), self.grid.shape, prefix=rows)
            if rows and not wanted:
                parts = table[:, :rows].split([weights[k].shape[1] for k in named], dim=1)
                weights |= {k: weights[k] + part for k, part in zip(named, parts, strict=True)}
                table = table[:, rows:]
            return weights | {"pos_embed": table}
        raise WeightsError(
            f"pos_embed has {table.shape[1]} rows for {prefix} prefix tokens and a square grid; this model needs "
            f"{self.pos_embed.shape[1]}; build it with the image_size and tokens that the weights were made for"
        )

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *rest: Any) -> None:
        names = ("pos_embed", "cls_token", "reg_token")
        own = {k: state_dict[prefix + k] for k in names if prefix + k in state_dict}
        state_dict.update({prefix + k: v for k, v in self.adapt_state_dict(own).items()})
        super()._load_from_state_dict(state_dict, prefix, *rest)


def _check(o: Mapping[str, Any], num_registers: int) -> None:
    for key, low in (
        ("dim", 1),
        ("depth", 1),
        ("num_heads", 1),
        ("in_channels", 1),
        ("num_classes", 0),
        ("patch_size", 1),
    ):
        if not isinstance(o[key], int) or o[key] < low:
            raise ConfigError(f"{key}={o[key]!r} must be a whole number of at least {low}")
    if o["dim"] % o["num_heads"]:
        raise ConfigError(f"num_heads={o['num_heads']} must divide dim={o['dim']}; change one of them")
    if num_registers < 0:
        raise ConfigError(f"num_registers={num_registers} must not be negative")
    for key, choices in (
        ("stem", ("patch", "conv")),
        ("pool", ("token", "mean", "ep")),
        ("init", ("timm", "xavier")),
    ):
        if o[key] not in choices:
            raise unknown(key, str(o[key]), choices)
    if o["pool"] == "token" and not o["class_token"]:
        raise ConfigError(
            "pool='token' reads the class token; set class_token=true, pool='mean' or pool='ep'"
        )
