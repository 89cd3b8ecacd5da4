"""What the contract refuses, at construction and at each call, and in which words."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from zoo.attention.types import BiasFactors, Capabilities, Grid, Pattern
from zoo.errors import CapabilityError, ConfigError


class ContractChecks(nn.Module):
    """The checking half of :class:`zoo.attention.base.Attention`."""

    name: ClassVar[str] = "?"
    capabilities: Capabilities  # of the class; `create_attention` gives a module those of its options

    def _refuse(self, what: str, capability: str) -> CapabilityError:
        from zoo.attention.registry import list_attention

        able = ", ".join(list_attention(**{capability: True})) or "none yet"
        return CapabilityError(f"attention {self.name!r} has no {what}; variants that do: {able}")

    def _check_streaming(self) -> None:
        if not self.capabilities.streaming:
            raise self._refuse("step-by-step form", "streaming")
        if self.pattern not in (Pattern.CAUSAL_SELF, Pattern.CROSS):
            raise CapabilityError(
                f"attention {self.name!r} was built for pattern {self.pattern.value!r}; step-by-step decoding is "
                "defined for 'causal_self' and 'cross'"
            )

    def _check_construction(self, context_dim: int | None, dropout: float) -> None:
        from zoo.attention.registry import list_attention

        can = self.capabilities
        sizes = {"dim": self.dim, "head_dim": self.head_dim, "value_head_dim": self.value_head_dim}
        for key, size in (sizes | {"context_dim": context_dim, "length": self.length}).items():
            if size is not None and size < 1:
                raise ConfigError(f"attention {self.name!r}: {key}={size} must be at least 1")
        _check_grid(self.name, self.grid)
        if self.pattern not in can.patterns:
            able = ", ".join(list_attention(pattern=self.pattern))
            raise CapabilityError(
                f"attention {self.name!r} does not define pattern {self.pattern.value!r} "
                f"(it defines {', '.join(sorted(can.patterns))}); variants that do: {able}"
            )
        if not self.ordered and can.needs_order(self.pattern):
            able = ", ".join(list_attention(pattern=self.pattern, order_sensitive=False))
            raise CapabilityError(
                f"attention {self.name!r} depends on the order of its tokens, which this slot's tokens do not have; "
                f"variants for sets: {able}; or set attention.allow_order=true to use the order given"
            )
        if self.higher_order and not can.double_backward:
            able = ", ".join(list_attention(pattern=self.pattern, double_backward=True))
            raise CapabilityError(
                f"attention {self.name!r} has no second derivative; variants that do: {able}"
            )
        if can.fixed_length and self.length is None:
            raise ConfigError(f"attention {self.name!r} needs a fixed length; give length=<number of keys>")
        if can.needs_grid and self.grid is None:
            raise CapabilityError(
                f"attention {self.name!r} needs the tokens' grid (axes: {', '.join(map(str, can.grid_dims))}), which "
                "this slot does not have; give grid=Grid((rows, columns)) or choose a variant without one"
            )
        if self.grid is not None and can.needs_grid and len(self.grid.shape) not in can.grid_dims:
            raise CapabilityError(
                f"attention {self.name!r} takes grids of {', '.join(map(str, can.grid_dims))} axes, not "
                f"{len(self.grid.shape)}"
            )
        if context_dim is not None and not self.pattern.cross:
            raise ConfigError(
                f"context_dim={context_dim} has no meaning for pattern {self.pattern.value!r}; use pattern='cross'"
            )
        if not 0.0 <= dropout < 1.0:
            raise ConfigError(f"dropout={dropout} is outside [0, 1)")

    def _check_call(
        self,
        x: Tensor,
        context: Tensor | None,
        value: Tensor | None,
        *,
        key_mask: Tensor | None = None,
        bias: Tensor | BiasFactors | None = None,
        grid: Grid | None = None,
        positions: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, dict[str, Any]]:
        can, label = self.capabilities, f"attention {self.name!r}"
        if self.pattern.cross == (context is None):
            rule = "needs context [B, M, Cc]" if self.pattern.cross else "takes no context"
            raise ConfigError(f"{label}, pattern {self.pattern.value!r}: {rule}")
        keys = x if context is None else context
        for name, tokens in (
            ("x [B, N, C]", x),
            ("context [B, M, Cc]", context),
            ("value [B, M, Cv]", value),
        ):
            if tokens is not None and tokens.dim() != 3:
                raise ConfigError(f"{label}: {name} has {tokens.dim()} axes, shape {list(tokens.shape)}")
        if x.shape[-1] != self.dim:
            raise ConfigError(f"{label} was built for width dim={self.dim}, x has {x.shape[-1]}")
        if self.separate_value == (value is None):
            rule = "was built with value_dim and needs value" if self.separate_value else "has no value_dim"
            raise ConfigError(f"{label} {rule}")
        values = keys if value is None else value
        n, m = x.shape[1], keys.shape[1]
        if values.shape[1] != m:
            raise ConfigError(f"{label}: value has {values.shape[1]} tokens, the keys have {m}")
        if key_mask is not None:
            if not can.key_mask:
                raise self._refuse("key mask", "key_mask")
            if key_mask.dtype != torch.bool or tuple(key_mask.shape) != (x.shape[0], m):
                raise ConfigError(
                    f"{label}: key_mask must be bool [B, M] = [{x.shape[0]}, {m}], True = attend; got "
                    f"{key_mask.dtype} {list(key_mask.shape)}"
                )
        if bias is not None:
            self._check_bias(bias)
        if positions is not None and not self.causal:
            raise ConfigError(f"{label}: positions have no meaning for pattern {self.pattern.value!r}")
        if can.fixed_length and m != self.length:
            raise ConfigError(f"{label} was built for {self.length} keys, got {m}")
        _check_grid(self.name, grid)
        grid = grid or self.grid
        if grid is not None and not self.pattern.cross and grid.tokens != n:
            raise ConfigError(f"{label}: grid {grid} has {grid.tokens} tokens, the input has {n}")
        return keys, values, dict(key_mask=key_mask, bias=bias, grid=grid, positions=positions)

    def _check_bias(self, bias: Tensor | BiasFactors) -> None:
        from zoo.attention.registry import get_attention, list_attention

        if isinstance(bias, Tensor) and bias.dim() != 4:
            raise ConfigError(
                f"attention {self.name!r}: bias must have 4 axes, broadcastable to [B, H, N, M]; got {list(bias.shape)}"
            )
        kind = "factors" if isinstance(bias, BiasFactors) else "key" if bias.shape[-2] == 1 else "full"
        if not self.capabilities.takes_bias(kind):
            names = list_attention(pattern=self.pattern)
            able = [n for n in names if get_attention(n).capabilities.takes_bias(kind)]
            note = f" ({self.capabilities.note})" if type(self).capabilities.takes_bias(kind) else ""
            raise CapabilityError(
                f"attention {self.name!r} takes no {kind} bias{note}; variants that do: {', '.join(able)}"
            )


def _check_grid(name: str, grid: object) -> None:
    if grid is not None and not isinstance(grid, Grid):
        raise ConfigError(
            f"attention {name!r}: grid={grid!r} is no Grid; write Grid((rows, columns), prefix)"
        )
