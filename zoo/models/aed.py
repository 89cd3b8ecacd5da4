"""Attention encoder-decoder for speech with as many decoder as encoder blocks, as Whisper and Canary-1B have."""

from zoo.models._speech import SpeechModel
from zoo.models.registry import register_model


@register_model
class Aed(SpeechModel):
    """Balanced encoder-decoder, see `SpeechModel`: 1.3 million parameters by default."""
