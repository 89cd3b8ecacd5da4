"""Head sizes that the Triton kernels take: one table, by which calls are refused and from which the compile gate takes its cases."""

import torch

# What the gate compiles, as far as the table says.
SIZES = (16, 32, 64, 128, 256)
# Largest size in half precision and in float32, by what limits it; None where tiles cut any size.
LARGEST: dict[str, tuple[int, int] | None] = {
    "softmax": (256, 128),  # head size of keys or values: both stay in registers, float32 ones as two halves
    "block_sparse": (256, 128),  # alike
    "selected": (256, 128),  # alike
    "linear": (256, 256),  # features: the gradient of queries keeps whole rows of them
    "taylor2": (32, 16),  # channels before the expansion
    "decay": None,
    "delta": (256, 128),  # key channels: a tile of the state has all of them
    "memory": (128, 64),  # key channels: both states of a tile, weights and momentum, have all of them
    "prefix": None,
}


def largest(op: str, dtype: str) -> int | None:
    """By name of the type: "float16", "bfloat16" or "float32"."""
    limits = LARGEST[op]
    return None if limits is None else limits[dtype == "float32"]


def width_gap(op: str, what: str, width: int, dtype: torch.dtype) -> str | None:
    """What to tell `choose` where the kernels of ``op`` do not reach: None if they do."""
    name = str(dtype).removeprefix("torch.")
    limit = largest(op, name)
    return None if limit is None or width <= limit else f"{what} {width} in {name}, only up to {limit}"


def sizes(op: str, dtype: str) -> tuple[int, ...]:
    """Head sizes that the compile gate takes."""
    limit = largest(op, dtype)
    return tuple(size for size in SIZES if limit is None or size <= limit)
