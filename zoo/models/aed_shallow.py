"""Encoder-decoder whose parameters moved from the decoder to the encoder, for fast decoding.

Paper: "Training and inference efficiency of encoder-decoder speech models", arXiv:2503.05931 (Canary-1B-Flash).
"""

from collections.abc import Mapping
from typing import Any

from zoo.attention.slots import AttentionFactory
from zoo.models._speech import SpeechModel
from zoo.models.registry import register_model


@register_model
class AedShallow(SpeechModel):
    """As `aed`, with one decoder block (12 C^2 weights) traded for one encoder block (15 C^2).

    Args:
        attention: Factories for slots "encoder", "decoder" and "cross".
        encoder_layers: Blocks of the encoder.
        decoder_layers: Blocks of the decoder.
        common: As in `SpeechModel`.
    """

    def __init__(
        self,
        attention: Mapping[str, AttentionFactory],
        *,
        encoder_layers: int = 4,
        decoder_layers: int = 1,
        **common: Any,
    ) -> None:
        super().__init__(attention, encoder_layers=encoder_layers, decoder_layers=decoder_layers, **common)
