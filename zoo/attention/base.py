"""The contract that every attention mechanism fulfils.

Letters: B batch, H heads, N queries, M keys, D query/key head width, E value head width, C model width.
Tensors are [B, N, C] outside and [B, H, N, D] inside attention.

A variant is one file in this folder with one class derived from `Attention` and decorated with
`zoo.attention.registry.register_attention`. Most variants override `attend` alone. What the decorator declares
is what `tests/attention/test_contract.py` proves.
"""

from __future__ import annotations

import inspect
from typing import Any, ClassVar

from torch import Tensor, nn

from zoo.attention._checks import ContractChecks
from zoo.attention._mixing import (
    append,
    dense_bias,
    masked_softmax,
    merge_heads,
    reorder_state,
    scaled_scores,
    split_heads,
    visible_keys,
    visible_pairs,
)
from zoo.attention.types import BiasFactors, Capabilities, Cost, Grid, Pattern, State
from zoo.dropout import FastDropout
from zoo.errors import ConfigError


class Attention(ContractChecks):
    """Multi-head attention with replaceable mixing.

    Args:
        dim: Width C of the queries' input and of the output.
        num_heads: Number of heads H.
        pattern: Which of the four patterns this module serves.
        context_dim: Width of `context`; `dim` when left out. Cross patterns only.
        value_dim: Width of a separate `value` input; values come from the keys' input when left out.
        head_dim: Query/key width D of a head; dim // num_heads when left out.
        value_head_dim: Value width E of a head; `head_dim` when left out.
        length: Largest number of keys, for variants that need it fixed.
        grid: Layout of the tokens when every call has the same one; a call may give another.
        ordered: False when the tokens form a set: position parts switch off, order-dependent variants refuse.
        qkv_bias: Whether the input projections have a bias.
        dropout: Dropout probability on the output, alike for every variant.
        higher_order: Choose paths that are differentiable twice (PINNs, forces).
        kv_heads: Number of key/value heads; for subclasses that group queries, not a user option.
    """

    key_side: ClassVar[tuple[str, ...]] = ("k", "v")  # submodules that see the keys' input

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        pattern: Pattern | str,
        context_dim: int | None = None,
        value_dim: int | None = None,
        head_dim: int | None = None,
        value_head_dim: int | None = None,
        length: int | None = None,
        grid: Grid | None = None,
        ordered: bool = True,
        qkv_bias: bool = True,
        dropout: float = 0.0,
        higher_order: bool = False,
        kv_heads: int | None = None,
    ) -> None:
        super().__init__()
        self.pattern = Pattern(pattern)
        self.causal = self.pattern.causal
        self.dim, self.num_heads = dim, num_heads
        self.kv_heads = kv_heads or num_heads
        if head_dim is None and dim % num_heads:
            raise ConfigError(
                f"dim {dim} is not divisible by num_heads {num_heads}; change one or give head_dim for attention "
                f"{self.name!r}"
            )
        self.head_dim = head_dim or dim // num_heads
        self.value_head_dim = value_head_dim or self.head_dim
        self.length, self.grid, self.ordered, self.higher_order = length, grid, ordered, higher_order
        self._check_construction(context_dim, dropout)
        self.separate_value = value_dim is not None
        context_dim = context_dim or dim
        heads, d, e = num_heads, self.head_dim, self.value_head_dim
        if self.pattern.cross or self.separate_value:
            key_dim = context_dim if self.pattern.cross else dim
            self.q = nn.Linear(dim, heads * d, bias=qkv_bias)
            self.k = nn.Linear(key_dim, self.kv_heads * d, bias=qkv_bias)
            self.v = nn.Linear(value_dim or key_dim, self.kv_heads * e, bias=qkv_bias)
        else:
            # One matrix for q, k, v, under the name that timm gives it, so that ViT weights load as they are.
            self.qkv = nn.Linear(dim, heads * d + self.kv_heads * (d + e), bias=qkv_bias)
        self.proj = nn.Linear(heads * e, dim)
        self.proj_drop = FastDropout(dropout)

    # ---------------------------------------------------------------- what variants override

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        key_mask: Tensor | None = None,
        bias: Tensor | BiasFactors | None = None,
        grid: Grid | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """Mix values.

        Args:
            q: Queries, [B, H, N, D].
            k: Keys, [B, Hk, M, D].
            v: Values, [B, Hk, M, E].
            key_mask: Keys to keep, bool [B, M].
            bias: Added to the scores, broadcastable to [B, H, N, M], or low-rank factors.
            grid: Layout of the tokens.
            positions: Last key that each query may see, int [N] or [B, N]; causal patterns only. Left out, queries
                are aligned with the end of the keys: i + M - N.

        Returns:
            [B, H, N, E].
        """
        raise NotImplementedError

    def mix(self, x: Tensor, context: Tensor, value: Tensor, **call: Any) -> Tensor:
        """From inputs [B, N, C], [B, M, Cc], [B, M, Cv] to mixed heads [B, H, N, E]; variants with gates override it."""
        q, k, v = self.project(x, context, value)
        return self.attend(q, k, v, **call)

    def output(self, heads: Tensor, x: Tensor) -> Tensor:
        """From mixed heads [B, H, N, E] to the module's output [B, N, C]."""
        return self.proj_drop(self.proj(merge_heads(heads)))

    def weights(self, q: Tensor, k: Tensor, **call: Any) -> Tensor:
        """The mixing matrix [B, H, N, M] for projected queries and keys; variants with `has_map` define it."""
        raise self._refuse("an attention map", "has_map")

    def raw_scores(self, q: Tensor, k: Tensor, bias: Tensor | BiasFactors | None) -> Tensor:
        """Scores [B, H, N, M] before mask and normalisation; variants with `has_scores` define it."""
        raise self._refuse("scores", "has_scores")

    def attend_cost(self, n: int, m: int) -> tuple[float, float]:
        """FLOPs and bytes of the mixing of one sample with n queries and m keys; `nn.Linear` layers are counted elsewhere."""
        raise NotImplementedError

    def state_size(self, m: int) -> int:
        """Numbers kept per sample for decoding after m tokens; by default the keys and values."""
        return m * self.kv_heads * (self.head_dim + self.value_head_dim)

    def auxiliary_loss(self) -> Tensor:
        """Extra loss of the last forward pass (routing balance ...); zero unless the variant has one."""
        return self.proj.weight.new_zeros(())

    # ---------------------------------------------------------------- the public call

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        value: Tensor | None = None,
        *,
        key_mask: Tensor | None = None,
        bias: Tensor | BiasFactors | None = None,
        grid: Grid | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            x: Queries' input, [B, N, C].
            context: Keys' input, [B, M, Cc]; cross patterns only.
            value: Values' input, [B, M, Cv], when built with `value_dim`; otherwise the keys' input serves.
            key_mask: Keys to keep, bool [B, M]; a query with no key left gets zeros from the mixing.
            bias: Added to the scores, broadcastable to [B, H, N, M], or `BiasFactors`.
            grid: Layout of the tokens; overrides the one given at construction.
            positions: Last visible key of each query, int [N] or [B, N]; causal patterns only.

        Returns:
            [B, N, C].

        Raises:
            CapabilityError: An argument that the variant does not define.
            ConfigError: Shapes that contradict each other.
        """
        context, value, call = self._check_call(
            x, context, value, key_mask=key_mask, bias=bias, grid=grid, positions=positions
        )
        return self.output(self.mix(x, context, value, **call), x)

    def project(self, x: Tensor, context: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B, H, N, D], keys [B, Hk, M, D], values [B, Hk, M, E]."""
        if hasattr(self, "qkv"):
            h, hk, d, e = self.num_heads, self.kv_heads, self.head_dim, self.value_head_dim
            q, k, v = self.qkv(x).split((h * d, hk * d, hk * e), dim=-1)
        else:
            q, k, v = self.q(x), self.k(context), self.v(value)
        return (
            split_heads(q, self.num_heads),
            split_heads(k, self.kv_heads),
            split_heads(v, self.kv_heads),
        )

    def content(self, x: Tensor, context: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Plain queries [B, H, N, D] and keys [B, Hk, M, D], which scores of position are made of; not scaled yet."""
        return self.project(x, context, value)[:2]

    def attention_map(
        self, x: Tensor, context: Tensor | None = None, value: Tensor | None = None, **call: Any
    ) -> Tensor:
        """The implied mixing matrix [B, H, N, M]; takes the arguments of `forward`.

        Raises:
            CapabilityError: The variant has no such matrix.
        """
        if not self.capabilities.has_map:
            raise self._refuse("an attention map", "has_map")
        context, value, call = self._check_call(x, context, value, **call)
        q, k, _ = self.project(x, context, value)
        return self.weights(q, k, **call)

    def scores(
        self, x: Tensor, context: Tensor | None = None, value: Tensor | None = None, **call: Any
    ) -> Tensor:
        """Scores before normalisation, [B, H, N, M]; takes the arguments of `forward`.

        Raises:
            CapabilityError: The variant has no scores.
        """
        if not self.capabilities.has_scores:
            raise self._refuse("scores", "has_scores")
        context, value, call = self._check_call(x, context, value, **call)
        q, k, _ = self.project(x, context, value)
        return self.raw_scores(q, k, call["bias"])

    def linear_rows(self, child: str, n: int, m: int) -> int:
        """How many vectors the linear layers of a submodule see for n queries and m keys."""
        return m if child in self.key_side else n

    def cost(self, n: int, m: int | None = None) -> Cost:
        """Analytic cost of n queries against m keys (n when left out)."""
        m = n if m is None else m
        flops, bytes_ = self.attend_cost(n, m)
        for path, layer in self.named_modules():
            if isinstance(layer, nn.Linear):
                flops += 2 * self.linear_rows(path.split(".")[0], n, m) * layer.weight.numel()
        return Cost(flops, bytes_, sum(p.numel() for p in self.parameters()), self.state_size(m))

    # ---------------------------------------------------------------- decoding

    def init_state(
        self,
        batch_size: int,
        *,
        context: Tensor | None = None,
        value: Tensor | None = None,
        key_mask: Tensor | None = None,
    ) -> State:
        """State before the first token (causal_self), or after reading the whole `context` (cross)."""
        self._check_streaming()
        if self.pattern is Pattern.CROSS:
            if context is None:
                raise ConfigError(
                    f"attention {self.name!r}, pattern 'cross': init_state needs context [B, M, Cc]"
                )
            empty = context.new_zeros(batch_size, 0, self.dim)
            _, k, v = self.project(empty, context, context if value is None else value)
            # Read again at each step: keys of a head side by side make a step of a large batch 1.2 to 4 times faster.
            return {"k": k.contiguous(), "v": v.contiguous(), "key_mask": key_mask}
        weight = self.proj.weight
        shape = (batch_size, self.kv_heads, 0)
        return {
            "k": weight.new_zeros(*shape, self.head_dim),
            "v": weight.new_zeros(*shape, self.value_head_dim),
            "length": 0,
        }

    def step(self, x_t: Tensor, state: State) -> tuple[Tensor, State]:
        """One token [B, 1, C] in, its output [B, 1, C] and the next state out. Equals the parallel form."""
        self._check_streaming()
        if self.pattern is Pattern.CROSS:
            # Through `project`, which variants override (query norms, activations); no key is projected again.
            keys = x_t.new_zeros(x_t.shape[0], 0, self.k.in_features)
            values = x_t.new_zeros(x_t.shape[0], 0, self.v.in_features)
            q, _, _ = self.project(x_t, keys, values)
            heads = self.attend(q, state["k"], state["v"], key_mask=state["key_mask"])
            return self.output(heads, x_t), state
        q, k_t, v_t = self.project(x_t, x_t, x_t)
        length = state["length"] + 1
        k = append(state["k"], k_t, length)
        v = append(state["v"], v_t, length)
        heads = self.attend(q, k[:, :, :length], v[:, :, :length])
        return self.output(heads, x_t), {"k": k, "v": v, "length": length}

    @classmethod
    def capabilities_with(cls, **options: Any) -> Capabilities:
        """What the variant defines with these options of its own; overridden where one of them takes something away."""
        return cls.capabilities

    @classmethod
    def options(cls) -> dict[str, Any]:
        """The variant's own keyword-only arguments and their defaults: the schema of its yaml."""
        common = set(inspect.signature(Attention.__init__).parameters)
        parameters = inspect.signature(cls.__init__).parameters
        return {n: p.default for n, p in parameters.items() if p.kind is p.KEYWORD_ONLY and n not in common}


__all__ = [
    "Attention",
    "BiasFactors",
    "Capabilities",
    "Cost",
    "Grid",
    "Pattern",
    "State",
    "append",
    "dense_bias",
    "masked_softmax",
    "merge_heads",
    "reorder_state",
    "scaled_scores",
    "split_heads",
    "visible_keys",
    "visible_pairs",
]
