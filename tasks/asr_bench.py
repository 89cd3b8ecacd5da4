"""Speed of speech models: `python -m tasks.asr_bench` prints cached against recomputed decoding, and transformers' Whisper.

Whisper's rows appear where `transformers` is installed. Equal configuration: width 96, 3 + 3 blocks, 4 heads, MLPs twice as wide,
80 mels at 100 frames a second shortened to 50, 4 s of sound, no dropout; features are given, so neither front end is timed.
"""

from __future__ import annotations

import argparse
import importlib.util
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.attention.slots import resolve_slots
from zoo.models._speech import BOS, SpeechModel
from zoo.models.registry import build_model, get_model

VOCABULARY, MELS, FRAMES, LABELS = 64, 80, 400, 24


def build(attention: str = "softmax", **options: Any) -> SpeechModel:
    """Our model at the configuration above."""
    options = {
        "vocab_size": VOCABULARY,
        "n_mels": MELS,
        "subsampling": 2,
        "encoder": "transformer",
        "encoder_layers": 3,
        "decoder_layers": 3,
        "dim": 96,
        "dropout": 0.0,
        "freq_masks": 0,
        "time_masks": 0,
        **options,
    }
    torch.manual_seed(0)
    slots = resolve_slots(get_model("aed").slots(**options), {"name": attention})
    return build_model("aed", slots, **options)


def median_s(run: Callable[[], Any], repeats: int) -> float:
    """Median time of a call after one call for warming up."""
    run()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return sorted(times)[len(times) // 2]


@torch.inference_mode()
def decode_s(model: SpeechModel, memory: Tensor, count: int, *, cached: bool, repeats: int = 3) -> float:
    """Seconds for `count` greedy tokens of each row of `memory` [B, M, C], the end token ignored."""
    lengths = torch.full((len(memory),), memory.shape[1])

    def stepwise() -> None:
        state, token = model.init_state(memory, lengths), torch.full((len(memory),), BOS)
        for _ in range(count):
            logits, state = model.step(token, state)
            token = logits.argmax(-1)

    def whole() -> None:
        prefix = torch.full((len(memory), 1), BOS)
        for _ in range(count):
            token = model.decode(prefix, memory, lengths)[:, -1].argmax(-1)
            prefix = torch.cat((prefix, token[:, None]), 1)

    model.eval()
    return median_s(stepwise if cached else whole, repeats)


def train_step(model: torch.nn.Module, loss: Callable[[], Tensor]) -> Callable[[], None]:
    """One step of AdamW on a fixed batch."""
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=True)

    def run() -> None:
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    return run


def our_loss(model: SpeechModel, features: Tensor, labels: Tensor) -> Callable[[], Tensor]:
    frames = torch.full((len(features),), features.shape[1])
    inputs = F.pad(labels, (1, 0), value=BOS)[:, :-1]

    def loss() -> Tensor:
        memory, lengths = model.encode_features(features, frames)
        return F.cross_entropy(model.decode(inputs, memory, lengths).flatten(0, 1), labels.flatten())

    return loss


def whisper() -> Any:
    """transformers' Whisper at the same configuration."""
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    config = WhisperConfig(
        vocab_size=VOCABULARY,
        num_mel_bins=MELS,
        d_model=96,
        encoder_layers=3,
        decoder_layers=3,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=192,
        decoder_ffn_dim=192,
        max_source_positions=FRAMES // 2,
        max_target_positions=448,
        dropout=0.0,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    torch.manual_seed(0)
    return WhisperForConditionalGeneration(config)


@torch.inference_mode()
def whisper_decode_s(model: Any, memory: Tensor, count: int, repeats: int = 3) -> float:
    """Seconds for `count` greedy tokens with its key-value cache, the decoder called directly."""
    from transformers import DynamicCache, EncoderDecoderCache

    def run() -> None:
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        token = torch.full((len(memory), 1), BOS)
        for _ in range(count):
            out = model.model.decoder(
                input_ids=token, encoder_hidden_states=memory, past_key_values=cache, use_cache=True
            )
            token = model.proj_out(out.last_hidden_state[:, -1:]).argmax(-1)
            cache = out.past_key_values

    model.eval()
    return median_s(run, repeats)


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    """Print and return rows: what, tokens or samples per second, milliseconds."""
    parser = argparse.ArgumentParser(prog="python -m tasks.asr_bench", description=__doc__.splitlines()[0])
    parser.add_argument("--attention", default="softmax", help="variant of all slots")
    parser.add_argument("--tokens", type=int, default=200, help="tokens per sentence")
    parser.add_argument("--batch", type=int, default=1, help="sentences decoded together")
    parser.add_argument("--steps", type=int, default=10, help="training steps timed")
    args = parser.parse_args(arguments)
    model = build(args.attention)
    memory = torch.randn(args.batch, FRAMES // 2, 96)
    features, labels = torch.randn(16, FRAMES, MELS), torch.randint(3, VOCABULARY, (16, LABELS))
    total = args.tokens * args.batch
    rows = []

    def row(what: str, seconds: float, per: int, unit: str) -> None:
        rows.append({"what": what, "per_s": per / seconds, "unit": unit, "ms": 1000 * seconds})
        print(f"{what:44} {per / seconds:10.0f} {unit}/s {1000 * seconds:10.1f} ms")

    row("decode, cached", decode_s(model, memory, args.tokens, cached=True), total, "tokens")
    row("decode, recomputed", decode_s(model, memory, args.tokens, cached=False), total, "tokens")
    model.train()
    row(
        "training step",
        median_s(train_step(model, our_loss(model, features, labels)), args.steps),
        16,
        "samples",
    )
    if importlib.util.find_spec("transformers"):
        other = whisper()
        row(
            "transformers Whisper: decode, cached",
            whisper_decode_s(other, memory, args.tokens),
            total,
            "tokens",
        )
        other.train()
        mels = features.transpose(1, 2).contiguous()
        step = train_step(other, lambda: other(input_features=mels, labels=labels).loss)
        row("transformers Whisper: training step", median_s(step, args.steps), 16, "samples")
    return rows


if __name__ == "__main__":
    main()
