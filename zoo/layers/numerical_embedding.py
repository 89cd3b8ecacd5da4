"""Numbers and categories of a table as tokens.

Paper: Gorishniy et al., "On embeddings for numerical features in tabular deep learning", arXiv:2203.05556; the plain
linear form is that of FT-Transformer, arXiv:2106.11959.
Differs from the papers in: a learned token stands for a missing number; code 0 of each categorical column means "never
seen" and is trained by putting it in place of known codes at random.

Letters: B batch, F columns, T bins, C width of a token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from zoo.errors import ConfigError, unknown

KINDS = ("linear", "piecewise", "periodic")


class PiecewiseLinearEncoding(nn.Module):
    """How far a value has come through each bin of its column: 1 below it, a share inside, 0 above.

    The first bin has no lower and the last no upper end, so that values outside the training range keep a slope.

    Args:
        bins: Ascending edges of each column; columns may differ in number.
    """

    def __init__(self, bins: Sequence[Sequence[float]]) -> None:
        super().__init__()
        for i, edges in enumerate(bins):
            if len(edges) < 2 or any(b <= a for a, b in zip(edges, edges[1:], strict=False)):
                raise ConfigError(
                    f"bins of column {i} must be at least two ascending edges, got {list(edges)[:8]}"
                )
        self.num_bins = max((len(e) - 1 for e in bins), default=0)
        shape = (len(bins), self.num_bins)
        left, scale = torch.zeros(shape), torch.zeros(shape)
        low, high = torch.zeros(shape), torch.zeros(shape)
        for i, edges in enumerate(bins):
            e, t = torch.tensor(edges, dtype=torch.float64), len(edges) - 1
            left[i, :t] = e[:-1].float()
            scale[i, :t] = (1 / (e[1:] - e[:-1])).float()
            high[i, :t] = 1.0
            low[i, 0], high[i, t - 1] = -math.inf, math.inf
        for name, value in (("left", left), ("scale", scale), ("low", low), ("high", high)):
            self.register_buffer(name, value)

    def forward(self, x: Tensor) -> Tensor:
        """[B, F] -> [B, F, T]; columns with fewer bins end in zeros."""
        t = (x[..., None] - self.left) * self.scale
        return torch.minimum(torch.maximum(t, self.low), self.high)


class NumericalEmbedding(nn.Module):
    """One token per numerical column.

    Args:
        columns: Number of columns F.
        dim: Width C.
        kind: "linear" (a weight and a bias), "piecewise" (linear in the bins' shares) or "periodic" (sines of
            learned frequencies, then linear and ReLU). Every kind has weights of its own for every column.
        bins: Edges of each column; piecewise only.
        frequencies: Frequencies per column; periodic only.
        frequency_std: Spread of the frequencies at the start, the decisive setting of the periodic kind.
        activation: ReLU after the piecewise map.
    """

    def __init__(
        self,
        columns: int,
        dim: int,
        *,
        kind: str = "piecewise",
        bins: Sequence[Sequence[float]] | None = None,
        frequencies: int = 24,
        frequency_std: float = 0.1,
        activation: bool = False,
    ) -> None:
        super().__init__()
        if kind not in KINDS:
            raise unknown("kind of numerical embedding", kind, KINDS)
        self.kind, self.columns, self.dim, self.activation = kind, columns, dim, activation
        self.frequency_std = frequency_std
        if kind == "piecewise":
            if bins is None or len(bins) != columns:
                raise ConfigError(
                    f"num_embedding=piecewise needs the bins of all {columns} numerical columns, got "
                    f"{None if bins is None else len(bins)}; or choose linear or periodic"
                )
            self.encoding = PiecewiseLinearEncoding(bins)
            inner = self.encoding.num_bins
        elif kind == "periodic":
            if frequencies < 1 or frequency_std <= 0:
                raise ConfigError(
                    f"frequencies={frequencies} and frequency_std={frequency_std} must be positive"
                )
            self.frequency = nn.Parameter(torch.empty(columns, frequencies))
            inner = 2 * frequencies
        else:
            inner = 1
        self.weight = nn.Parameter(torch.empty(columns, inner, dim))
        self.bias = nn.Parameter(torch.empty(columns, dim))
        self.missing = nn.Parameter(torch.empty(columns, dim))
        self.no_weight_decay = ("weight", "bias", "missing", "frequency")
        self.reset_parameters()

    def reset_parameters(self) -> None:
        bound = 1 / math.sqrt(self.dim if self.kind != "periodic" else self.weight.shape[1])
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)
        nn.init.uniform_(self.missing, -bound, bound)
        if self.kind == "periodic":
            nn.init.trunc_normal_(
                self.frequency, std=self.frequency_std, a=-3 * self.frequency_std, b=3 * self.frequency_std
            )

    def forward(self, x: Tensor, missing: Tensor | None = None) -> Tensor:
        """Embed.

        Args:
            x: Values, [B, F].
            missing: Values that are missing, bool [B, F]; those columns get their own token.

        Returns:
            [B, F, C].
        """
        if self.kind == "linear":
            out = torch.addcmul(self.bias, x[..., None], self.weight[:, 0])
        else:
            if self.kind == "piecewise":
                inner = self.encoding(x)
            else:
                phase = 2 * math.pi * x[..., None] * self.frequency
                inner = torch.cat((phase.sin(), phase.cos()), -1)
            # One matrix product per column: [F, B, T] @ [F, T, C].
            out = torch.baddbmm(self.bias[:, None], inner.transpose(0, 1), self.weight).transpose(0, 1)
            if self.activation or self.kind == "periodic":
                out = out.relu()
        if missing is not None:
            out = torch.where(missing[..., None], self.missing, out)
        return out

    def forward_flops(self, inputs: tuple, output: Tensor) -> float:
        """Of the products with `weight`."""
        return 2.0 * output.numel() * self.weight.shape[1]

    def extra_repr(self) -> str:
        return f"columns={self.columns}, dim={self.dim}, kind={self.kind}"


class CategoricalEmbedding(nn.Module):
    """One token per categorical column.

    Args:
        cardinalities: Codes of each column, code 0 (never seen) included.
        dim: Width C.
        unknown_rate: Share of codes replaced by 0 while training, [0, 1).
    """

    def __init__(self, cardinalities: Sequence[int], dim: int, *, unknown_rate: float = 0.01) -> None:
        super().__init__()
        if not 0 <= unknown_rate < 1:
            raise ConfigError(f"unknown_rate={unknown_rate} is outside [0, 1)")
        if any(c < 1 for c in cardinalities):
            raise ConfigError(f"cardinalities must be at least 1, got {list(cardinalities)}")
        self.dim, self.unknown_rate = dim, unknown_rate
        sizes = torch.tensor(list(cardinalities), dtype=torch.int64)
        self.register_buffer("sizes", sizes, persistent=False)
        self.register_buffer("offset", sizes.cumsum(0) - sizes, persistent=False)
        self.table = nn.Embedding(int(sizes.sum()), dim)
        self.bias = nn.Parameter(torch.empty(len(cardinalities), dim))
        self.no_weight_decay = ("bias",)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        bound = 1 / math.sqrt(self.dim)
        nn.init.uniform_(self.table.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, codes: Tensor) -> Tensor:
        """Codes int64 [B, F] -> [B, F, C]; codes beyond a column's range count as never seen."""
        codes = torch.where((codes < 0) | (codes >= self.sizes), 0, codes)
        if self.training and self.unknown_rate:
            codes = codes.masked_fill(torch.rand(codes.shape, device=codes.device) < self.unknown_rate, 0)
        return self.table(codes + self.offset) + self.bias


class FeatureTokens(nn.Module):
    """All columns of a table as tokens [B, F, C]: numerical ones first.

    Args:
        num_numerical: Number of numerical columns.
        cardinalities: Codes of each categorical column, 0 included.
        dim: Width C.
        unknown_rate: See `CategoricalEmbedding`.
        numerical: Arguments of `NumericalEmbedding`.
    """

    def __init__(
        self,
        num_numerical: int,
        cardinalities: Sequence[int],
        dim: int,
        *,
        unknown_rate: float = 0.01,
        **numerical: object,
    ) -> None:
        super().__init__()
        if num_numerical + len(cardinalities) < 1:
            raise ConfigError("a table needs at least one input column")
        self.columns = num_numerical + len(cardinalities)
        self.numerical = NumericalEmbedding(num_numerical, dim, **numerical) if num_numerical else None
        self.categorical = (
            CategoricalEmbedding(cardinalities, dim, unknown_rate=unknown_rate)
            if len(cardinalities)
            else None
        )

    def forward(self, numerical: Tensor, categorical: Tensor, missing: Tensor | None = None) -> Tensor:
        """Numbers [B, Fn], codes int64 [B, Fc], missing bool [B, Fn] -> [B, Fn + Fc, C]."""
        parts = []
        if self.numerical is not None:
            parts.append(self.numerical(numerical, missing))
        if self.categorical is not None:
            parts.append(self.categorical(categorical))
        return torch.cat(parts, 1) if len(parts) > 1 else parts[0]
