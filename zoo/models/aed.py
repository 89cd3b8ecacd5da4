"""Attention encoder-decoder for speech: Conformer encoder and transformer decoder, as Canary has, arXiv:2406.19674.

`model.encoder=transformer` makes it Whisper's, arXiv:2212.04356.
"""

from zoo.models._speech import SpeechModel
from zoo.models.registry import register_model


@register_model
class Aed(SpeechModel):
    """Three Conformer and two decoder blocks of width 128 by default: 1.3 million parameters, see `SpeechModel`."""
