"""MultiTab-Net: one token per task, attention over columns and over rows.

Paper: "MultiTab: multitask learning on tabular data", arXiv:2511.09970, AAAI 2026. Official code: Armanfard-Lab/MultiTab
(no licence file seen).
Differs from it in: attention over rows works (the released one with rotary positions attends over a sequence of length
1); while predicting, rows look at a fixed bank of training rows instead of at their batch mates, so that a prediction
does not depend on its batch; task tokens are plain parameters; the first block's attention has no norm, as in
FT-Transformer: a norm would hide how large the inputs are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from zoo.attention.base import Pattern
from zoo.attention.slots import AttentionFactory, Slot
from zoo.errors import ConfigError, unknown
from zoo.layers.blocks import TransformerBlock
from zoo.layers.mlp import Mlp
from zoo.layers.numerical_embedding import FeatureTokens
from zoo.layers.row_bank import RowBank
from zoo.models.registry import register_model

_NOT_PASSED_ON = ("self", "__class__", "attention", "outputs", "separate")
MASKS = ("none", "TxT", "FxT", "FxT_TxT")


def task_mask(tasks: int, columns: int, kind: str) -> Tensor:
    """Who may look at whom, bool [T + F, T + F], rows = queries, task tokens first; True = may look.

    Args:
        tasks, columns: T and F.
        kind: "none"; "TxT", task tokens do not see other task tokens; "FxT", columns do not see task tokens;
            "FxT_TxT", both.
    """
    allowed = torch.ones(tasks + columns, tasks + columns, dtype=torch.bool)
    if "TxT" in kind.split("_"):
        allowed[:tasks, :tasks] = torch.eye(tasks, dtype=torch.bool)
    if "FxT" in kind.split("_"):
        allowed[tasks:, :tasks] = False
    return allowed


class SampleAttention(nn.Module):
    """Attention over rows: each row, flattened, looks at the rows of a context; then an MLP.

    Args:
        attention: Factory of a cross slot.
        dim: Width of a flattened row.
        num_heads: Heads.
        head_dim: Width of a head.
        hidden: Hidden width of the MLP.
        dropout: After the projection and inside the MLP.
    """

    def __init__(
        self,
        attention: AttentionFactory,
        dim: int,
        num_heads: int,
        *,
        head_dim: int,
        hidden: int,
        dropout: float,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = attention(dim, num_heads, head_dim=head_dim, dropout=dropout)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, hidden, dropout=dropout)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """Rows [B, W] look at rows [M, W] -> [B, W]."""
        x = x + self.attn(self.norm1(x)[None], self.norm1(context)[None])[0]
        return x + self.mlp(self.norm2(x))


@register_model
class MultiTab(nn.Module):
    """Task tokens and column tokens, blocks of masked attention over them and attention over rows, a head per task.

    Args:
        attention: Factories for slots "encoder" (tokens of a row) and "samples" (rows).
        num_numerical, cardinalities, bins, outputs: Set by the table, see `zoo.models.ft_transformer`.
        dim: Width of a token.
        depth: Number of blocks.
        num_heads: Heads; must divide `dim`.
        mlp_hidden: Hidden width of the MLPs.
        head_hidden: Hidden width of each task's head.
        task_mask: none, TxT, FxT or FxT_TxT, see `task_mask`. With attention over rows, tasks meet there all the same.
        inter_sample: Attention over rows.
        inference: "bank": rows look at a fixed set of training rows; "batch": at the rows given together, as in
            training, so that a prediction depends on its batch.
        bank_size: Rows in the bank.
        sample_head_dim: Width of a head of the attention over rows.
        num_embedding: linear, piecewise or periodic.
        frequencies, frequency_std: Of the periodic embedding.
        unknown_rate: Share of categories hidden while training.
        dropout: After projections and inside MLPs.
        separate: A network of its own for each target, trained side by side: the single-task control, with as many times
            the parameters and the time as there are targets.
    """

    name: ClassVar[str]

    def __init__(
        self,
        attention: Mapping[str, AttentionFactory],
        *,
        num_numerical: int = 8,
        cardinalities: Sequence[int] = (),
        bins: Sequence[Sequence[float]] | None = None,
        outputs: Sequence[int] = (1,),
        dim: int = 32,
        depth: int = 2,
        num_heads: int = 4,
        mlp_hidden: int = 128,
        head_hidden: int = 64,
        task_mask: str = "TxT",
        inter_sample: bool = True,
        inference: str = "bank",
        bank_size: int = 256,
        sample_head_dim: int = 16,
        num_embedding: str = "piecewise",
        frequencies: int = 24,
        frequency_std: float = 0.1,
        unknown_rate: float = 0.01,
        dropout: float = 0.1,
        separate: bool = False,
    ) -> None:
        options = {k: v for k, v in locals().items() if k not in _NOT_PASSED_ON}
        super().__init__()
        _check_mask(task_mask)
        if inference not in ("bank", "batch"):
            raise ConfigError(f"model.inference={inference!r}: choose bank or batch")
        if bank_size < 1 or depth < 1:
            raise ConfigError(f"model.bank_size={bank_size} and model.depth={depth} must be at least 1")
        self.networks = nn.ModuleList(
            MultiTab(attention, outputs=[o], **options) for o in (outputs if separate else ())
        )
        self.bank_size = bank_size
        if separate:
            return
        self.tokens = FeatureTokens(
            num_numerical,
            cardinalities,
            dim,
            unknown_rate=unknown_rate,
            kind=num_embedding,
            bins=bins,
            frequencies=frequencies,
            frequency_std=frequency_std,
        )
        self.outputs, self.inference, self.inter_sample = tuple(outputs), inference, inter_sample
        tasks, columns = len(self.outputs), self.tokens.columns
        self.task_tokens = nn.Parameter(torch.empty(1, tasks, dim))
        self.no_weight_decay = ("task_tokens",)
        allowed = _mask(tasks, columns, task_mask)
        bias = None if allowed.all() else torch.zeros(1, 1, *allowed.shape).masked_fill(~allowed, -torch.inf)
        self.register_buffer("bias", bias, persistent=False)
        self.blocks = nn.ModuleList(
            TransformerBlock(
                attention["encoder"],
                dim,
                num_heads,
                mlp_ratio=mlp_hidden / dim,
                norm_eps=1e-5,
                dropout=dropout,
                length=tasks + columns,
            )
            for _ in range(depth)
        )
        self.blocks[0].norm1 = nn.Identity()  # the embeddings' scale is information, as in FT-Transformer
        self.samples = nn.ModuleList(
            SampleAttention(
                attention["samples"],
                (tasks + columns) * dim,
                num_heads,
                head_dim=sample_head_dim,
                hidden=mlp_hidden,
                dropout=dropout,
            )
            for _ in range(depth if inter_sample else 0)
        )
        self.heads = nn.ModuleList(
            nn.Sequential(nn.Linear(dim, head_hidden), nn.ReLU(), nn.Linear(head_hidden, o))
            for o in self.outputs
        )
        if inter_sample:
            self.bank = RowBank(bank_size, num_numerical, len(cardinalities))
        self.reset_parameters()

    @classmethod
    def slots(
        cls, *, task_mask: str = "TxT", inter_sample: bool = True, **options: object
    ) -> dict[str, Slot]:
        """The tokens of a row, a set (the task mask is a bias of whole blocks), and the rows, a set too."""
        _check_mask(task_mask)
        bias = None if task_mask == "none" else "full"
        slots = {"encoder": Slot(Pattern.SELF, ordered=False, bias=bias, length_known=True)}
        if inter_sample:
            slots["samples"] = Slot(Pattern.CROSS, ordered=False)
        return slots

    def reset_parameters(self) -> None:
        nn.init.normal_(self.task_tokens, std=self.task_tokens.shape[-1] ** -0.5)

    def set_bank(
        self,
        numerical: Tensor,
        categorical: Tensor,
        missing: Tensor | None = None,
        targets: Tensor | None = None,
    ) -> None:
        """Fix the training rows that predictions look at; no more than `bank_size` are kept, and their targets not at all."""
        for network in self.networks:
            network.set_bank(numerical, categorical, missing)
        if self.networks or not self.inter_sample:
            return
        self.bank.fill(numerical, categorical, missing)

    def _embed(self, numerical: Tensor, categorical: Tensor, missing: Tensor | None) -> Tensor:
        x = self.tokens(numerical, categorical, missing)
        return torch.cat((self.task_tokens.expand(x.shape[0], -1, -1), x), 1)

    def banked(self) -> Tensor:
        """Tokens of the rows looked at."""
        return self._embed(*self.bank()[:3])

    def forward(self, numerical: Tensor, categorical: Tensor, missing: Tensor | None = None) -> Tensor:
        """Numbers [B, Fn], codes [B, Fc], missing bool [B, Fn] -> [B, sum(outputs)]."""
        if self.networks:
            return torch.cat([network(numerical, categorical, missing) for network in self.networks], 1)
        x = self._embed(numerical, categorical, missing)
        fixed = self.inter_sample and not self.training and self.inference == "bank"
        bank = self.banked() if fixed else None
        for i, block in enumerate(self.blocks):
            x = block(x, bias=self.bias)
            if bank is not None:
                bank = block(bank, bias=self.bias)
            if self.inter_sample:
                rows = x.flatten(1)
                context = rows if bank is None else bank.flatten(1)
                x = self.samples[i](rows, context).view_as(x)
                if bank is not None:
                    bank = self.samples[i](context, context).view_as(bank)
        return torch.cat([head(x[:, t]) for t, head in enumerate(self.heads)], 1)


_mask = task_mask


def _check_mask(kind: str) -> None:
    if kind not in MASKS:
        raise unknown("task mask", str(kind), MASKS)
