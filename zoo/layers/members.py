"""Parts of ensembles that share most of their weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class MemberHeads(nn.Module):
    """A linear layer of its own for each of k members.

    Args:
        members: k.
        in_dim, out_dim: Widths.
    """

    def __init__(self, members: int, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(members, in_dim, out_dim))
        self.bias = nn.Parameter(torch.empty(members, out_dim))
        self.no_weight_decay = ("bias",)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        bound = self.weight.shape[1] ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """[B, k, in_dim] -> [B, k, out_dim]."""
        return torch.einsum("bki,kio->bko", x, self.weight) + self.bias

    def forward_flops(self, inputs: tuple, output: Tensor) -> float:
        """Of the products with `weight`."""
        return 2.0 * output.numel() * self.weight.shape[1]
