"""Conformer encoder with a transformer decoder, as FireRedASR-AED has, arXiv:2501.14350."""

from collections.abc import Mapping
from typing import Any

from zoo.attention.slots import AttentionFactory
from zoo.models._speech import SpeechModel
from zoo.models.registry import register_model


@register_model
class FireRedAed(SpeechModel):
    """Conformer blocks with relative positions behind a 2-D convolutional stem.

    Args:
        attention: Factories for slots "encoder", "decoder" and "cross".
        stem: Kind of the strided convolutions.
        encoder: Kind of the encoder's blocks.
        encoder_layers: Blocks of the encoder.
        decoder_layers: Blocks of the decoder.
        position: Of the encoder; "auto" is relative where the variant takes a full bias.
        common: As in `SpeechModel`.
    """

    def __init__(
        self,
        attention: Mapping[str, AttentionFactory],
        *,
        stem: str = "conv2d",
        encoder: str = "conformer",
        encoder_layers: int = 3,
        decoder_layers: int = 2,
        position: str = "auto",
        **common: Any,
    ) -> None:
        super().__init__(
            attention,
            stem=stem,
            encoder=encoder,
            encoder_layers=encoder_layers,
            decoder_layers=decoder_layers,
            position=position,
            **common,
        )
