"""Transformer blocks around any attention variant.

Names follow timm's VisionTransformer (norm1, attn, ls1, norm2, mlp, ls2), so that its weights load as they are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from zoo.attention.base import BiasFactors, Grid, State
from zoo.attention.slots import AttentionFactory
from zoo.errors import ConfigError, unknown
from zoo.layers.drop import DropPath, drop_path_or_none
from zoo.layers.mlp import Mlp

Bias = Tensor | BiasFactors | None


class LayerScale(nn.Module):
    """A learned factor per channel, small at first.

    Source: Touvron et al., "Going deeper with image transformers", arXiv:2103.17239.
    """

    def __init__(self, dim: int, init: float) -> None:
        super().__init__()
        self.init = init
        self.gamma = nn.Parameter(torch.empty(dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.gamma, self.init)

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] -> [..., C]."""
        return x * self.gamma


def _layer_scale(dim: int, init: float | None) -> LayerScale | None:
    return None if init is None else LayerScale(dim, init)


def _join(x: Tensor, branch: Tensor, scale: LayerScale | None, drop: DropPath | None) -> Tensor:
    """`x + drop(scale(branch))`; what is None is not called, for calls are most of the time of decoding a token."""
    branch = branch if scale is None else scale(branch)
    return x + (branch if drop is None else drop(branch))


def _check(dim: int, num_heads: int, norm: str) -> None:
    if norm not in ("pre", "post"):
        raise unknown("norm placement", norm, ("pre", "post"))
    if num_heads < 1 or dim % num_heads:
        raise ConfigError(f"num_heads={num_heads} must divide dim={dim}; change one of them")


class TransformerBlock(nn.Module):
    """Self-attention and an MLP, each with a residual.

    Args:
        attention: Factory of a self or causal-self slot.
        dim: Width C.
        num_heads: Attention heads; must divide `dim`.
        mlp_ratio: Hidden width of the MLP over `dim`.
        activation: Of the MLP, see `zoo.layers.mlp.ACTIVATIONS`.
        norm: "pre": x + f(norm(x)); "post": norm(x + f(x)).
        norm_eps: Epsilon of the layer norms.
        dropout: Dropout after the attention's projection and inside the MLP.
        drop_path: Probability of dropping a branch for a sample.
        layer_scale: First value of the branches' channel factors; None for no factors.
        geometry: Passed on to the attention's constructor: `length`, `grid`, `qkv_bias`, `head_dim` ...
    """

    def __init__(
        self,
        attention: AttentionFactory,
        dim: int,
        num_heads: int,
        *,
        mlp_ratio: float = 4.0,
        activation: str = "gelu",
        norm: str = "pre",
        norm_eps: float = 1e-6,
        dropout: float = 0.0,
        drop_path: float = 0.0,
        layer_scale: float | None = None,
        **geometry: Any,
    ) -> None:
        super().__init__()
        _check(dim, num_heads, norm)
        self.pre = norm == "pre"
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.attn = attention(dim, num_heads, dropout=dropout, **geometry)
        self.ls1 = _layer_scale(dim, layer_scale)
        self.drop_path1 = drop_path_or_none(drop_path)
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), activation=activation, dropout=dropout)
        self.ls2 = _layer_scale(dim, layer_scale)
        self.drop_path2 = drop_path_or_none(drop_path)

    def forward(
        self,
        x: Tensor,
        *,
        key_mask: Tensor | None = None,
        bias: Bias = None,
        grid: Grid | None = None,
        positions: Tensor | None = None,
        keep: int | None = None,
    ) -> Tensor:
        """[B, N, C] -> [B, N, C], or [B, keep, C]: only the first tokens, the others are not computed to the end.

        The other keyword arguments are those of `Attention.forward`.
        """
        call = {
            "key_mask": key_mask,
            "bias": bias,
            "grid": grid,
            "positions": positions,
        }
        if self.pre:
            x = _join(x, self.attn(self.norm1(x), **call), self.ls1, self.drop_path1)
            x = x if keep is None else x[:, :keep]
            return _join(x, self.mlp(self.norm2(x)), self.ls2, self.drop_path2)
        x = _join(x, self.attn(x, **call), self.ls1, self.drop_path1)
        x = self.norm1(x if keep is None else x[:, :keep])
        return self.norm2(_join(x, self.mlp(x), self.ls2, self.drop_path2))

    def init_state(self, batch_size: int) -> State:
        """State before the first token; causal slots of streaming variants only."""
        return self.attn.init_state(batch_size)

    def step(self, x_t: Tensor, state: State) -> tuple[Tensor, State]:
        """One token [B, 1, C] in, one out; equals `forward` on the whole sequence."""
        out, state = self.attn.step(self.norm1(x_t) if self.pre else x_t, state)
        x = _join(x_t, out, self.ls1, self.drop_path1)
        if self.pre:
            return _join(x, self.mlp(self.norm2(x)), self.ls2, self.drop_path2), state
        x = self.norm1(x)
        return self.norm2(_join(x, self.mlp(x), self.ls2, self.drop_path2)), state


class DecoderBlock(nn.Module):
    """Self-attention, cross-attention and an MLP, each with a residual.

    Args:
        self_attention: Factory of a self or causal-self slot.
        cross_attention: Factory of a cross or causal-cross slot.
        dim: Width C.
        num_heads: Attention heads; must divide `dim`.
        context_dim: Width Cc of the context; `dim` when left out.
        value_dim: Width of a separate value input of the cross attention.
        mlp_ratio, activation, norm, norm_eps, dropout, drop_path, layer_scale: As in `TransformerBlock`.
        geometry: Passed on to the self-attention's constructor.
        cross_geometry: Passed on to the cross-attention's constructor.
    """

    def __init__(
        self,
        self_attention: AttentionFactory,
        cross_attention: AttentionFactory,
        dim: int,
        num_heads: int,
        *,
        context_dim: int | None = None,
        value_dim: int | None = None,
        mlp_ratio: float = 4.0,
        activation: str = "gelu",
        norm: str = "pre",
        norm_eps: float = 1e-6,
        dropout: float = 0.0,
        drop_path: float = 0.0,
        layer_scale: float | None = None,
        geometry: dict[str, Any] | None = None,
        cross_geometry: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        _check(dim, num_heads, norm)
        self.pre = norm == "pre"
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.attn = self_attention(dim, num_heads, dropout=dropout, **(geometry or {}))
        self.ls1 = _layer_scale(dim, layer_scale)
        self.norm_cross = nn.LayerNorm(dim, eps=norm_eps)
        self.cross = cross_attention(
            dim,
            num_heads,
            context_dim=context_dim,
            value_dim=value_dim,
            dropout=dropout,
            **(cross_geometry or {}),
        )
        self.ls_cross = _layer_scale(dim, layer_scale)
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), activation=activation, dropout=dropout)
        self.ls2 = _layer_scale(dim, layer_scale)
        self.drop_path = drop_path_or_none(drop_path)

    def _add(self, x: Tensor, branch: Tensor, scale: LayerScale | None, norm: nn.Module) -> Tensor:
        x = _join(x, branch, scale, self.drop_path)
        return x if self.pre else norm(x)

    def _in(self, x: Tensor, norm: nn.Module) -> Tensor:
        return norm(x) if self.pre else x

    def forward(
        self,
        x: Tensor,
        context: Tensor,
        value: Tensor | None = None,
        *,
        key_mask: Tensor | None = None,
        bias: Bias = None,
        grid: Grid | None = None,
        positions: Tensor | None = None,
        context_key_mask: Tensor | None = None,
        context_bias: Bias = None,
        context_positions: Tensor | None = None,
    ) -> Tensor:
        """Decode.

        Args:
            x: Queries, [B, N, C].
            context: Keys of the cross attention, [B, M, Cc], already normalised.
            value: Values of the cross attention, [B, M, Cv], when built with `value_dim`.
            key_mask: Queries that are no padding, bool [B, N].
            bias: Of the self-attention, broadcastable to [B, H, N, N].
            grid: Layout of the queries.
            positions: Last query that each query may see; causal self-attention only.
            context_key_mask: Context tokens that are no padding, bool [B, M].
            context_bias: Of the cross attention, broadcastable to [B, H, N, M].
            context_positions: Last context token that each query may see; causal cross attention only.

        Returns:
            [B, N, C].
        """
        out = self.attn(
            self._in(x, self.norm1),
            key_mask=key_mask,
            bias=bias,
            grid=grid,
            positions=positions,
        )
        x = self._add(x, out, self.ls1, self.norm1)
        out = self.cross(
            self._in(x, self.norm_cross),
            context,
            value,
            key_mask=context_key_mask,
            bias=context_bias,
            positions=context_positions,
        )
        x = self._add(x, out, self.ls_cross, self.norm_cross)
        return self._add(x, self.mlp(self._in(x, self.norm2)), self.ls2, self.norm2)

    def init_state(
        self,
        batch_size: int,
        context: Tensor,
        value: Tensor | None = None,
        *,
        context_key_mask: Tensor | None = None,
    ) -> State:
        """State before the first token, having read the whole context once; causal cross-attention reads it at each step."""
        if self.cross.causal:
            cross: State = {"context": context, "value": value, "key_mask": context_key_mask}
        else:
            cross = self.cross.init_state(batch_size, context=context, value=value, key_mask=context_key_mask)
        return {"self": self.attn.init_state(batch_size), "cross": cross}

    def step(
        self, x_t: Tensor, state: State, *, context_positions: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """One token [B, 1, C] in, one out; equals `forward` on the whole sequence.

        Args:
            x_t: The token.
            state: From `init_state` or the step before.
            context_positions: Last context token that it may see, int [1] or [B, 1]; causal cross-attention only.
        """
        out, state_self = self.attn.step(self._in(x_t, self.norm1), state["self"])
        x = self._add(x_t, out, self.ls1, self.norm1)
        if self.cross.causal:
            state_cross = state["cross"]
            out = self.cross(self._in(x, self.norm_cross), **state_cross, positions=context_positions)
        else:
            out, state_cross = self.cross.step(self._in(x, self.norm_cross), state["cross"])
        x = self._add(x, out, self.ls_cross, self.norm_cross)
        x = self._add(x, self.mlp(self._in(x, self.norm2)), self.ls2, self.norm2)
        return x, {"self": state_self, "cross": state_cross}
