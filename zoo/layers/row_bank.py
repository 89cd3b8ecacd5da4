"""Training rows that a tabular model looks at while predicting; they are buffers and travel with its weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from zoo.errors import ConfigError


class RowBank(nn.Module):
    """At most `size` encoded rows, and their targets where the model looks at those too.

    Whoever has the weights has the rows: this is part of the models that use it, not an accident.

    Args:
        size: Most rows.
        num_numerical, num_categorical: Columns of a row.
        num_targets: Targets of a row that are kept.
    """

    def __init__(self, size: int, num_numerical: int, num_categorical: int, *, num_targets: int = 0) -> None:
        super().__init__()
        self.register_buffer("numerical", torch.zeros(size, num_numerical))
        self.register_buffer("categorical", torch.zeros(size, num_categorical, dtype=torch.int64))
        self.register_buffer("missing", torch.zeros(size, num_numerical, dtype=torch.bool))
        self.register_buffer("targets", torch.zeros(size, num_targets), persistent=num_targets > 0)
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def fill(
        self,
        numerical: Tensor,
        categorical: Tensor,
        missing: Tensor | None = None,
        targets: Tensor | None = None,
    ) -> None:
        """Keep the first rows: numbers [M, Fn], codes [M, Fc], missing bool [M, Fn], targets [M, T]."""
        rows = min(len(numerical), len(self.numerical))
        self.numerical[:rows] = numerical[:rows]
        self.categorical[:rows] = categorical[:rows]
        self.missing[:rows] = False if missing is None else missing[:rows]
        if self.targets.shape[1]:
            self.targets[:rows] = targets[:rows]
        self.count.fill_(rows)

    def forward(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Numbers, codes, missing and targets of the rows that are there.

        Raises:
            ConfigError: None are.
        """
        rows = int(self.count)
        if not rows:
            raise ConfigError("the bank of training rows is empty; call set_bank before predicting")
        return self.numerical[:rows], self.categorical[:rows], self.missing[:rows], self.targets[:rows]
