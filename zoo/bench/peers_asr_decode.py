"""200 greedy tokens of an utterance: states against recomputation, and transformers' Whisper with its cache.

Configuration of `zoo.bench.peers_asr`; the encoder's output is given and the end token ignored.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from zoo.bench.peers_asr import DIM, FRAMES, build, whisper
from zoo.bench.tasks import Contestants
from zoo.models._speech import BOS, SpeechModel

TOKENS = 200
MODE = f"decoding of {TOKENS} tokens"


def contestants(attention: str, batch: int = 1) -> Contestants:
    """Ours step by step, ours recomputing the prefix for each token, Whisper, on `batch` utterances at once."""
    model, peer = build(attention).eval(), whisper().eval()
    memory = torch.randn(batch, FRAMES // 2, DIM, generator=torch.Generator().manual_seed(0))
    return {
        f"zoo aed ({attention}), states": stepwise(model, memory),
        f"zoo aed ({attention}), recomputed": recomputed(model, memory),
        "transformers Whisper, cache": whisper_cached(peer, memory),
    }


def stepwise(model: SpeechModel, memory: Tensor, count: int = TOKENS) -> Callable[[], Tensor]:
    """Decodes `count` tokens [B, count] with the variants' caches or recurrent states; memory [B, M, C]."""
    lengths = torch.full((len(memory),), memory.shape[1])

    @torch.inference_mode()
    def run() -> Tensor:
        state, token, found = model.init_state(memory, lengths), torch.full((len(memory),), BOS), []
        for _ in range(count):
            logits, state = model.step(token, state)
            token = logits.argmax(-1)
            found.append(token)
        return torch.stack(found, 1)

    return run


def recomputed(model: SpeechModel, memory: Tensor, count: int = TOKENS) -> Callable[[], Tensor]:
    """The same tokens, the whole prefix decoded again for each."""
    lengths = torch.full((len(memory),), memory.shape[1])

    @torch.inference_mode()
    def run() -> Tensor:
        prefix = torch.full((len(memory), 1), BOS)
        for _ in range(count):
            token = model.decode(prefix, memory, lengths)[:, -1].argmax(-1)
            prefix = torch.cat((prefix, token[:, None]), 1)
        return prefix[:, 1:]

    return run


def whisper_cached(model: Any, memory: Tensor, count: int = TOKENS) -> Callable[[], Tensor]:
    """Whisper's decoder called directly, which is faster than its `generate`."""
    from transformers import DynamicCache, EncoderDecoderCache

    @torch.inference_mode()
    def run() -> Tensor:
        cache, found = EncoderDecoderCache(DynamicCache(), DynamicCache()), []
        token = torch.full((len(memory), 1), BOS)
        for _ in range(count):
            out = model.model.decoder(
                input_ids=token, encoder_hidden_states=memory, past_key_values=cache, use_cache=True
            )
            token = model.proj_out(out.last_hidden_state[:, -1:]).argmax(-1)[:, -1]
            found.append(token)
            token, cache = token[:, None], out.past_key_values
        return torch.stack(found, 1)

    return run
