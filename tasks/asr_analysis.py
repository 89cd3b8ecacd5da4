"""What cross-attention and CTC say about where words are, against the truth and against occlusion."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from data.speech_batches import Utterance
from zoo.decoding.align import (
    align_attention,
    align_ctc,
    cross_attention_maps,
    has_maps,
    occlusion_saliency,
    pearson,
    word_spans,
)
from zoo.errors import ConfigError, DataError
from zoo.models._speech import BOS

if TYPE_CHECKING:
    from tasks.asr import SpeechToText


@dataclass
class Picture:
    """One utterance for the alignment figure; times in seconds."""

    text: str
    features: np.ndarray  # [T, n_mels]
    posteriors: np.ndarray  # [CTC frames, vocabulary]
    attention: np.ndarray | None  # [L, M]
    seconds: float
    truth_s: list[float] = field(default_factory=list)
    ctc_s: list[float] = field(default_factory=list)
    dtw_s: list[float] = field(default_factory=list)


def readable(data: Any, split: str, count: int) -> Iterator[tuple[Utterance, np.ndarray]]:
    """Those of a split's first `count` utterances whose recordings can be read, with their samples; others are named."""
    for utterance in data.split(split)[:count]:
        try:
            samples = data.samples(utterance)
        except DataError as error:
            data.skip(utterance.id, str(error))
        else:
            yield utterance, samples


@torch.no_grad()
def analyse(task: SpeechToText, count: int) -> tuple[dict[str, float], Picture | None]:
    """Timestamps and explanations on the first test utterances, the reference given to the decoder.

    Args:
        task: Model in evaluation mode.
        count: Number of utterances.

    Returns:
        Means: `timestamp_ctc_ms` and `timestamp_dtw_ms` (absolute error of word starts), the share within 100 ms, and the
        correlation of cross-attention averaged over heads and blocks with occlusion of the encoder's output
        (`xattn_memory_r`) and of its input (`xattn_input_r`). And the first utterance for a figure.
    """
    model, data = task.model, task.data
    place_s = model.front.hop * model.stem.factor / data.sample_rate
    values: dict[str, list[float]] = {}
    picture = None
    for utterance, samples in readable(data, "test", count):
        tokens = data.tokeniser.encode(utterance.text)
        wave = torch.from_numpy(samples)[None].to(task.device)
        features, frames = model.front(wave, torch.tensor([wave.shape[1]], device=task.device))
        memory, lengths = model.encode_features(features, frames)
        pieces = [data.tokeniser.pieces[t] for t in tokens]
        starts: dict[str, list[float]] = {}
        for name, align in (("ctc", align_ctc), ("dtw", align_attention)):
            if name == "dtw" and not has_maps(model):
                continue
            try:
                spans = align(model, memory, tokens)
            except ConfigError:
                continue
            starts[name] = [first * place_s for _, first, _ in word_spans(pieces, spans)]
            if len(utterance.word_starts_s) == len(starts[name]):
                errors = np.abs(np.array(starts[name]) - utterance.word_starts_s)
                values.setdefault(f"timestamp_{name}_ms", []).extend(1000 * errors)
                values.setdefault(f"timestamp_{name}_within_100ms", []).extend(errors <= 0.1)
        attention = _explain(model, tokens, features, memory, lengths, values)
        if picture is None:
            picture = Picture(
                utterance.text,
                features[0].cpu().numpy(),
                model.ctc_logits(memory)[0].softmax(-1).cpu().numpy(),
                attention,
                memory.shape[1] * place_s,
                list(utterance.word_starts_s),
                starts.get("ctc", []),
                starts.get("dtw", []),
            )
    return {k: float(np.mean(v)) for k, v in values.items()}, picture


def _explain(
    model: Any,
    tokens: list[int],
    features: Tensor,
    memory: Tensor,
    lengths: Tensor,
    values: dict[str, list[float]],
) -> np.ndarray | None:
    """Cross-attention [L, M] of one utterance; its correlations with occlusion go into `values`."""
    if not has_maps(model):
        return None
    prefix = torch.tensor([[BOS, *tokens[:-1]]], device=memory.device)
    attention = cross_attention_maps(model, prefix, memory, lengths).mean((0, 2))[0]
    for name, source in (("memory", {"memory": memory}), ("input", {"features": features})):
        saliency = occlusion_saliency(model, tokens, **source)
        values.setdefault(f"xattn_{name}_r", []).append(pearson(attention, saliency))
    return attention.cpu().numpy()
