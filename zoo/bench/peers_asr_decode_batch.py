"""`zoo.bench.peers_asr_decode` for 16 utterances at once, as evaluation decodes them; one alone mostly times Python's calls."""

from __future__ import annotations

from zoo.bench import peers_asr_decode
from zoo.bench.tasks import Contestants

BATCH = 16
MODE = f"decoding of {peers_asr_decode.TOKENS} tokens of {BATCH} utterances"


def contestants(attention: str) -> Contestants:
    """Ours step by step, ours recomputing the prefixes for each token, Whisper."""
    return peers_asr_decode.contestants(attention, BATCH)
