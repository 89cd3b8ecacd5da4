"""Encoder with a CTC head alone: no decoder, one pass per utterance. Graves et al., ICML 2006."""

from collections.abc import Mapping
from typing import Any

from zoo.attention.slots import AttentionFactory
from zoo.models._speech import SpeechModel
from zoo.models.registry import register_model


@register_model
class Ctc(SpeechModel):
    """The encoder of `aed_shallow`, one block deeper, without a decoder.

    Args:
        attention: Factory for slot "encoder".
        encoder_layers: Blocks of the encoder.
        decoder_layers: Must be 0.
        common: As in `SpeechModel`.
    """

    def __init__(
        self,
        attention: Mapping[str, AttentionFactory],
        *,
        encoder_layers: int = 5,
        decoder_layers: int = 0,
        **common: Any,
    ) -> None:
        super().__init__(attention, encoder_layers=encoder_layers, decoder_layers=decoder_layers, **common)
