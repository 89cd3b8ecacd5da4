"""Parts that models share: blocks, MLPs, stems, positions, pooling, dropping."""

from zoo.layers.blocks import DecoderBlock, LayerScale, TransformerBlock
from zoo.layers.drop import DropPath, depth_rates
from zoo.layers.mlp import ACTIVATIONS, Mlp
from zoo.layers.patch import ConvStem, PatchEmbed
from zoo.layers.pool import AttentionPool, mean_pool
from zoo.layers.position import resample_positions, sine_positions, sine_positions_2d

__all__ = [
    "ACTIVATIONS",
    "AttentionPool",
    "ConvStem",
    "DecoderBlock",
    "DropPath",
    "LayerScale",
    "Mlp",
    "PatchEmbed",
    "TransformerBlock",
    "depth_rates",
    "mean_pool",
    "resample_positions",
    "sine_positions",
    "sine_positions_2d",
]
