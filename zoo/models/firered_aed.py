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
        conv_kernel: Taps of the Conformer's convolution.
        conv_expansion: Width of that convolution over the model's.
        position: Of the encoder; "auto" is relative where the variant takes a full bias.
        common: As in `SpeechModel`.
    """

    def __init__(
        self,
        attention: Mapping[str, AttentionFactory],
        *,
        stem: str = "conv2d",
        conv_kernel: int = 33,
        conv_expansion: int = 2,
        position: str = "auto",
        **common: Any,
    ) -> None:
        super().__init__(
            attention,
            stem=stem,
            conv_kernel=conv_kernel,
            conv_expansion=conv_expansion,
            position=position,
            **common,
        )
