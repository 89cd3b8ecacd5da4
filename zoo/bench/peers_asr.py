"""The encoder-decoder's training step beside transformers' Whisper, at equal configuration.

Width 96, 3 + 3 transformer blocks, 4 heads, MLPs twice as wide, 80 mels at 100 frames a second shortened to 50, 4 s of sound,
24 tokens of 64, batch 16, no dropout, cross-entropy of the decoder alone. Features are given: neither front end is timed.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.attention.slots import resolve_slots
from zoo.bench.tasks import Contestants, training_step
from zoo.models._speech import BOS, SpeechModel
from zoo.models.registry import build_model, get_model

VOCABULARY, MELS, FRAMES, LABELS, BATCH, DIM, DEPTH, HEADS = 64, 80, 400, 24, 16, 96, 3, 4


def contestants(attention: str) -> Contestants:
    """Ours with `attention` in all slots that take it, then Whisper."""
    model, peer = build(attention), whisper()
    draw = torch.Generator().manual_seed(0)
    features = torch.randn(BATCH, FRAMES, MELS, generator=draw)
    labels = torch.randint(3, VOCABULARY, (BATCH, LABELS), generator=draw)
    frames, inputs = torch.full((BATCH,), FRAMES), F.pad(labels, (1, 0), value=BOS)[:, :-1]

    def loss() -> Tensor:
        memory, lengths = model.encode_features(features, frames)
        return F.cross_entropy(model.decode(inputs, memory, lengths).flatten(0, 1), labels.flatten())

    mels = features.transpose(1, 2).contiguous()
    return {
        f"zoo aed ({attention})": training_step(model, loss),
        "transformers Whisper": training_step(peer, lambda: peer(input_features=mels, labels=labels).loss),
    }


def build(attention: str) -> SpeechModel:
    """Our model at the configuration above, in training mode."""
    options = {
        "vocab_size": VOCABULARY,
        "n_mels": MELS,
        "subsampling": 2,
        "encoder": "transformer",
        "encoder_layers": DEPTH,
        "decoder_layers": DEPTH,
        "dim": DIM,
        "num_heads": HEADS,
        "label_positions": False,  # Whisper has no CTC head to take them from
        "dropout": 0.0,
        "freq_masks": 0,
        "time_masks": 0,
    }
    torch.manual_seed(0)
    slots = resolve_slots(get_model("aed").slots(**options), {"name": attention})
    return build_model("aed", slots, **options).train()


def whisper() -> Any:
    """transformers' Whisper at the same configuration, in training mode."""
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    config = WhisperConfig(
        vocab_size=VOCABULARY,
        num_mel_bins=MELS,
        d_model=DIM,
        encoder_layers=DEPTH,
        decoder_layers=DEPTH,
        encoder_attention_heads=HEADS,
        decoder_attention_heads=HEADS,
        encoder_ffn_dim=2 * DIM,
        decoder_ffn_dim=2 * DIM,
        max_source_positions=FRAMES // 2,
        max_target_positions=448,
        dropout=0.0,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    torch.manual_seed(0)
    return WhisperForConditionalGeneration(config).train()
