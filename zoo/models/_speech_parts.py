"""What the speech model is put together from: tokens with a meaning, its output, blocks by name, checks, initial weights."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from zoo.attention.registry import get_attention
from zoo.attention.slots import AttentionFactory
from zoo.errors import ConfigError
from zoo.layers.blocks import TransformerBlock
from zoo.layers.conformer import ConformerBlock

PAD, BOS, EOS = 0, 1, 2
ENCODER_BLOCKS = {"transformer": TransformerBlock, "conformer": ConformerBlock}


class SpeechOutput(NamedTuple):
    """What one forward pass gives.

    Attributes:
        logits: Of the decoder, [B, L, vocabulary]; None without a decoder or without tokens.
        ctc_logits: Of the CTC head, [B, M * ctc_per_place, vocabulary].
        lengths: Encoder tokens of each utterance, int [B].
    """

    logits: Tensor | None
    ctc_logits: Tensor
    lengths: Tensor


def takes_relative(position: str, encoder: str, factory: AttentionFactory) -> bool:
    """Whether the encoder's blocks add Transformer-XL scores.

    Raises:
        ConfigError: Unknown choices, or relative positions in blocks that have none.
    """
    if encoder not in ENCODER_BLOCKS:
        raise ConfigError(f"encoder={encoder!r}: choose transformer or conformer")
    if position not in ("sine", "rel", "auto", "none"):
        raise ConfigError(f"position={position!r}: choose sine, rel, auto or none")
    if position == "rel" and encoder != "conformer":
        raise ConfigError("position=rel is defined for encoder=conformer; use position=sine")
    takes = get_attention(factory.name).capabilities.bias == "full"
    return position == "rel" or (position == "auto" and encoder == "conformer" and takes)


def check_shape(dim: int, num_heads: int, encoder_layers: int, decoder_layers: int, vocab_size: int) -> None:
    """Refuse sizes that no model can have."""
    if num_heads < 1 or dim % num_heads or dim % 2:
        raise ConfigError(f"num_heads={num_heads} must divide dim={dim}, and dim must be even")
    if encoder_layers < 1 or decoder_layers < 0:
        raise ConfigError(
            f"encoder_layers={encoder_layers} must be >= 1, decoder_layers={decoder_layers} >= 0"
        )
    if vocab_size < 4:
        raise ConfigError(f"vocab_size={vocab_size}: three special tokens and at least one other")


def check_decoding(wait: int, wait_stride: int, ctc_per_place: int, position_shift: int) -> None:
    """Refuse counts below their least."""
    for name, value, least in (
        ("wait", wait, 0),
        ("wait_stride", wait_stride, 1),
        ("ctc_per_place", ctc_per_place, 1),
        ("position_shift", position_shift, 0),
    ):
        if value < least:
            raise ConfigError(f"{name}={value} must be at least {least}")


def xavier(*layers: nn.Linear) -> None:
    """Xavier weights and zero biases."""
    for layer in layers:
        nn.init.xavier_uniform_(layer.weight)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
