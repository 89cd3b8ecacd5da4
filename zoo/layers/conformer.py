"""Conformer block and relative positions, with any self-attention inside.

Paper: Gulati et al., "Conformer", arXiv:2005.08100, in the form of FireRedASR-AED, arXiv:2501.14350: layer norm in the
convolution module (batch norm over padded batches would make an utterance depend on its neighbours).
Differs from it in: one layer norm before the attention instead of one each for queries, keys and values.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.attention.base import Attention
from zoo.attention.slots import AttentionFactory
from zoo.errors import ConfigError
from zoo.layers.drop import dropout_or_none
from zoo.layers.mlp import Mlp
from zoo.layers.position import sine_positions


class RelativeBias(nn.Module):
    """Transformer-XL's position scores as an additive bias for any variant that takes a full one.

    With queries q and keys k of the attention it serves, bias = (u . k + (q + v) . p(i - j)) / sqrt(D), where p is a
    linear map of sine positions and u, v are learned per head; softmax attention plus this bias is Transformer-XL's.

    Args:
        attention: The module that the bias is for; its projections are used, not copied.
    """

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        self.__dict__["attention"] = attention  # no submodule: its parameters belong to the block
        heads, d = attention.num_heads, attention.head_dim
        self.position = nn.Linear(attention.dim, heads * d, bias=False)
        self.content_bias = nn.Parameter(torch.empty(heads, d))
        self.position_bias = nn.Parameter(torch.empty(heads, d))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.xavier_uniform_(self.position.weight)
        nn.init.xavier_uniform_(self.content_bias)
        nn.init.xavier_uniform_(self.position_bias)

    def __deepcopy__(self, memo: dict[int, Any]) -> RelativeBias:
        """A copy that serves the copy of its attention, which `memo` knows when the block is copied as a whole."""
        import copy

        new = RelativeBias(copy.deepcopy(self.attention, memo))
        memo[id(self)] = new
        new.load_state_dict(self.state_dict())
        return new.to(self.position.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Input of the attention [B, N, C] -> bias [B, H, N, N]."""
        q, k = self.attention.content(x, x, x)
        n, (heads, d) = x.shape[1], self.content_bias.shape
        if k.shape[1] != heads:
            k = k.repeat_interleave(heads // k.shape[1], dim=1)
        offsets = torch.arange(n - 1, -n, -1, device=x.device)
        table = sine_positions(offsets, self.position.in_features).to(x.dtype)
        p = self.position(table).unflatten(-1, (heads, d)).transpose(0, 1)  # [H, 2N-1, D]
        by_position = relative_shift((q + self.position_bias[:, None]) @ p.transpose(-2, -1))
        by_content = self.content_bias[:, None] @ k.transpose(-2, -1)  # [B, H, 1, N]
        return (by_position + by_content) * d**-0.5


def relative_shift(x: Tensor) -> Tensor:
    """[B, H, N, 2N-1] with offsets N-1 ... -(N-1) -> [B, H, N, N], entry (i, j) holding offset i - j."""
    b, h, n, width = x.shape
    x = F.pad(x, (1, 0)).view(b, h, width + 1, n)[:, :, 1:]
    return x.reshape(b, h, n, width)[..., :n]


class ConvModule(nn.Module):
    """Point-wise, gate, depth-wise convolution over time, norm, swish, point-wise back.

    Args:
        dim: Width.
        kernel: Taps of the depth-wise convolution, odd.
        expansion: Width of the convolution over `dim`; 1 in the Conformer's paper, 2 in FireRedASR.
        dropout: At the end.
    """

    def __init__(self, dim: int, kernel: int, *, expansion: int = 1, dropout: float = 0.0) -> None:
        super().__init__()
        if kernel < 1 or kernel % 2 == 0:
            raise ConfigError(f"conv_kernel={kernel} must be an odd whole number of at least 1")
        if expansion < 1:
            raise ConfigError(f"conv_expansion={expansion} must be at least 1")
        width = expansion * dim
        self.norm = nn.LayerNorm(dim)
        self.into = nn.Linear(dim, 2 * width)
        self.depthwise = nn.Conv1d(width, width, kernel, padding=kernel // 2, groups=width, bias=False)
        self.conv_norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, dim)
        self.drop = dropout_or_none(dropout)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """[B, N, C] and valid tokens, bool [B, N] -> [B, N, C]."""
        x = F.glu(self.into(self.norm(x)), dim=-1)
        if mask is not None:
            x = x * mask[..., None]
        x = self.depthwise(x.transpose(1, 2)).transpose(1, 2)
        return self.drop(self.out(F.silu(self.conv_norm(x))))


class ConformerBlock(nn.Module):
    """Half an MLP, self-attention, convolution, half an MLP, norm.

    Args:
        attention: Factory of a self slot.
        dim: Width C.
        num_heads: Attention heads.
        mlp_ratio: Hidden width of each MLP over `dim`.
        conv_kernel: Taps of the convolution, odd.
        conv_expansion: Width of the convolution over `dim`.
        dropout: After the attention's projection, in the MLPs and after the convolution.
        relative: Add `RelativeBias` to the scores.
        geometry: Passed on to the attention's constructor.
    """

    def __init__(
        self,
        attention: AttentionFactory,
        dim: int,
        num_heads: int,
        *,
        mlp_ratio: float = 4.0,
        conv_kernel: int = 15,
        conv_expansion: int = 1,
        dropout: float = 0.0,
        relative: bool = False,
        **geometry: Any,
    ) -> None:
        super().__init__()
        hidden = int(dim * mlp_ratio)
        self.norm_mlp1 = nn.LayerNorm(dim)
        self.mlp1 = Mlp(dim, hidden, activation="silu", dropout=dropout)
        self.norm1 = nn.LayerNorm(dim)
        self.attn = attention(dim, num_heads, dropout=dropout, **geometry)
        self.relative = RelativeBias(self.attn) if relative else None
        self.conv = ConvModule(dim, conv_kernel, expansion=conv_expansion, dropout=dropout)
        self.norm_mlp2 = nn.LayerNorm(dim)
        self.mlp2 = Mlp(dim, hidden, activation="silu", dropout=dropout)
        self.norm2 = nn.LayerNorm(dim)

    def forward(self, x: Tensor, *, key_mask: Tensor | None = None) -> Tensor:
        """[B, N, C] and valid tokens, bool [B, N] -> [B, N, C]."""
        x = x + 0.5 * self.mlp1(self.norm_mlp1(x))
        y = self.norm1(x)
        bias = {} if self.relative is None else {"bias": self.relative(y)}
        x = x + self.attn(y, key_mask=key_mask, **bias)
        x = x + self.conv(x, key_mask)
        x = x + 0.5 * self.mlp2(self.norm_mlp2(x))
        return self.norm2(x)
