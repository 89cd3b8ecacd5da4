"""Which token was heard when, and what cross-attention says about it.

Timestamps from cross-attention by dynamic time warping, in the manner of openai/whisper's `timing.py`. Cross-attention as an
explanation, compared with occlusion: "Cross-attention is half explanation in speech-to-text models", arXiv:2509.18010.
Differs from it in: saliency from occluded stretches of time instead of thousands of random spectrogram segments (SPES).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.decoding.ctc import forced_alignment
from zoo.errors import ConfigError
from zoo.models._speech import BOS, SpeechModel


def has_maps(model: SpeechModel) -> bool:
    """Whether the cross-attention of every decoder block has an explicit mixing matrix."""
    return model.has_decoder and all(b.cross.capabilities.has_map for b in model.decoder)


@torch.no_grad()
def cross_attention_maps(model: SpeechModel, tokens: Tensor, memory: Tensor, lengths: Tensor) -> Tensor:
    """Mixing matrices of all decoder blocks, signed where the variant's are.

    Args:
        model: In evaluation mode.
        tokens: From the start token on, int [B, L].
        memory: [B, M, C].
        lengths: Valid places, int [B].

    Returns:
        [blocks, B, H, L, M]; row i belongs to the prediction of token i + 1.
    """
    maps: list[Tensor] = []

    def keep(module: Any, args: tuple, keywords: dict) -> None:
        maps.append(module.attention_map(*args, **keywords))

    handles = [block.cross.register_forward_pre_hook(keep, with_kwargs=True) for block in model.decoder]
    try:
        model.decode(tokens, memory, lengths)
    finally:
        for handle in handles:
            handle.remove()
    return torch.stack(maps)


def dtw_starts(weights: np.ndarray, *, median: int = 5) -> np.ndarray:
    """First place of each token on the best monotone path through attention weights.

    Args:
        weights: Maps of one utterance over its valid places, [maps, tokens, places].
        median: Width of the median filter along time, odd.

    Returns:
        int64 [tokens], not decreasing.
    """
    if weights.shape[1] == 0:
        return np.zeros(0, dtype=np.int64)
    spread = weights.std(axis=1, keepdims=True)
    scaled = (weights - weights.mean(axis=1, keepdims=True)) / np.maximum(spread, 1e-6)
    half = median // 2
    if half and weights.shape[2] > half:
        padded = np.pad(scaled, ((0, 0), (0, 0), (half, half)), mode="reflect")
        scaled = np.median(np.lib.stride_tricks.sliding_window_view(padded, median, axis=2), axis=-1)
    return _monotone_starts(-scaled.mean(axis=0))


def _monotone_starts(cost: np.ndarray) -> np.ndarray:
    tokens, places = cost.shape
    total = np.full((tokens + 1, places + 1), np.inf)
    move = np.zeros((tokens + 1, places + 1), dtype=np.int8)
    total[0, 0] = 0
    for i in range(1, tokens + 1):
        for j in range(1, places + 1):
            steps = (total[i - 1, j - 1], total[i - 1, j], total[i, j - 1])
            best = int(np.argmin(steps))
            total[i, j], move[i, j] = cost[i - 1, j - 1] + steps[best], best
    i, j = tokens, places
    starts = np.zeros(tokens, dtype=np.int64)
    while i > 0 and j > 0:
        starts[i - 1] = j - 1
        step = move[i, j]
        i, j = i - (step != 2), j - (step != 1)
    return starts


def word_spans(pieces: list[str], spans: list[tuple[float, float]]) -> list[tuple[str, float, float]]:
    """Words with first and last place, from tokens' pieces and their places; spaces separate words."""
    words: list[tuple[str, float, float]] = []
    fresh = True
    for piece, (first, last) in zip(pieces, spans, strict=True):
        if piece.startswith(" "):
            fresh = True
        text = piece.strip()
        if not text:
            continue
        if fresh or not words:
            words.append((text, first, last))
        else:
            words[-1] = (words[-1][0] + text, words[-1][1], last)
        fresh = piece.endswith(" ")
    return words


def align_ctc(model: SpeechModel, memory: Tensor, tokens: list[int]) -> list[tuple[float, float]]:
    """First and last place of each token, in fractions where CTC is finer than the places; memory [1, M, C]."""
    spans = forced_alignment(model.ctc_logits(memory)[0].log_softmax(-1), tokens)
    frames = model.ctc_per_place
    return [(first / frames, (last + 1) / frames - 1) for first, last in spans]


def align_attention(model: SpeechModel, memory: Tensor, tokens: list[int]) -> list[tuple[float, float]]:
    """First and last place of each token from the cross-attention of all heads and blocks; memory [1, M, C].

    Raises:
        ConfigError: The cross-attention has no mixing matrix.
    """
    if not has_maps(model):
        raise ConfigError(
            "timestamps from cross-attention need a variant with an attention map; use those of CTC"
        )
    if not tokens:
        return []
    places = memory.shape[1]
    prefix = torch.tensor([[BOS, *tokens[:-1]]], device=memory.device)
    maps = cross_attention_maps(model, prefix, memory, torch.tensor([places], device=memory.device))
    starts = dtw_starts(maps[:, 0].flatten(0, 1).double().cpu().numpy())
    ends = np.append(np.maximum(starts[1:] - 1, starts[:-1]), places - 1)
    return list(zip(starts.tolist(), ends.tolist(), strict=True))


@torch.no_grad()
def occlusion_saliency(
    model: SpeechModel,
    tokens: list[int],
    *,
    features: Tensor | None = None,
    memory: Tensor | None = None,
    width: int = 2,
) -> Tensor:
    """How much hiding each stretch changes the prediction of each token: KL divergence of the decoder's outputs.

    Args:
        model: In evaluation mode.
        tokens: The sentence.
        features: Normalised features of one utterance, [1, T, n_mels]: stretches of the input are set to zero.
        memory: Or its memory, [1, M, C]: stretches of the encoder's output are set to zero.
        width: Length of a stretch in encoder places.

    Returns:
        [tokens, M]; the places of one stretch share a value.
    """
    on_input = features is not None
    if on_input == (memory is not None):
        raise ConfigError("give features or memory, one of the two")
    if on_input:
        frames = torch.tensor([features.shape[1]], device=features.device)
        memory, count = model.encode_features(features, frames)
        source, factor = features, model.stem.factor
    else:
        count = torch.tensor([memory.shape[1]], device=memory.device)
        source, factor = memory, 1
    places = int(count)
    stretches = -(-places // width)
    prefix = torch.tensor([[BOS, *tokens[:-1]]], device=source.device)
    # Hiding a place must not move the label positions of those behind it.
    heard = model.labels_heard(memory[:, :places])
    plain = model.decode(prefix, memory[:, :places], count, heard=heard).log_softmax(-1)
    at = torch.arange(source.shape[1], device=source.device) // (factor * width)
    hidden = at == torch.arange(stretches, device=source.device)[:, None]
    occluded = source.masked_fill(hidden[..., None], 0.0)
    counts = count.expand(stretches)
    if on_input:
        occluded, counts = model.encode_features(occluded, frames.expand(stretches))
    changed = model.decode(
        prefix.expand(stretches, -1), occluded[:, :places], counts, heard=heard.expand(stretches, -1)
    ).log_softmax(-1)
    kl = F.kl_div(changed, plain.expand_as(changed), reduction="none", log_target=True).sum(-1)  # [S, L]
    return kl.T.repeat_interleave(width, dim=1)[:, :places]


def pearson(a: Tensor, b: Tensor) -> float:
    """Correlation of all entries of two equally shaped tensors; 0 where one is constant."""
    a, b = a.double().flatten() - a.double().mean(), b.double().flatten() - b.double().mean()
    norm = a.norm() * b.norm()
    return float((a * b).sum() / norm) if norm > 0 else 0.0
