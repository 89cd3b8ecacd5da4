"""Greedy attention decoding, a batch at a time, with the variants' caches or recurrent states."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from zoo.models._speech import BOS, EOS, PAD, SpeechModel


class Hypotheses(NamedTuple):
    """Decoded sentences.

    Attributes:
        tokens: Token numbers without start and end, one list a sentence.
        scores: Sum of log-probabilities, the end token included, [B].
        truncated: Sentences that hit the length limit, bool [B].
    """

    tokens: list[list[int]]
    scores: Tensor
    truncated: Tensor


def token_limit(model: SpeechModel, memory: Tensor, lengths: Tensor) -> Tensor:
    """Most tokens that an utterance may have, int [B]: one a place and some to spare.

    Where the decoder counts labels with CTC, a quarter more than CTC has heard and some to spare: a decoder that lost its place
    beyond the last label repeats itself.
    """
    limit = lengths + 16
    if model.label_positions and memory.shape[1]:
        heard = model.labels_heard(memory).gather(1, (lengths - 1).clamp_min(0)[:, None])[:, 0]
        limit = torch.minimum(limit, (1.25 * heard).ceil().long() + 8)
    return limit


@torch.no_grad()
def greedy(
    model: SpeechModel, memory: Tensor, lengths: Tensor, *, limit: Tensor | None = None, cached: bool = True
) -> Hypotheses:
    """Take the most probable token until the end token.

    A sentence is never influenced by its neighbours in the batch, and a finished one stays as it is.

    Args:
        model: In evaluation mode.
        memory: [B, M, C].
        lengths: Valid places of `memory`, int [B].
        limit: Most tokens of each sentence, int [B]; `token_limit` when left out.
        cached: Step by step with states; False recomputes the whole prefix for each token, for comparison.
    """
    limit = token_limit(model, memory, lengths) if limit is None else limit
    batch = len(memory)
    if batch == 0:
        return Hypotheses([], memory.new_zeros(0), memory.new_zeros(0, dtype=torch.bool))
    token = lengths.new_full((batch,), BOS)
    prefix = [token]
    score = memory.new_zeros(batch)
    done = torch.zeros(batch, dtype=torch.bool, device=memory.device)
    count = torch.zeros_like(lengths)
    state = model.init_state(memory, lengths) if cached else None
    for _ in range(int(limit.max()) + 1):
        if cached:
            logits, state = model.step(token, state)
        else:
            logits = model.decode(torch.stack(prefix, 1), memory, lengths)[:, -1]
        log_probs = forbid(logits).log_softmax(-1)
        best, token = log_probs.max(-1)
        best = torch.where(done, 0.0, best)
        score = score + best
        token = torch.where(done, PAD, token)
        full = ~done & (count >= limit) & (token != EOS)
        token = torch.where(full, EOS, token)
        prefix.append(token)
        done = done | (token == EOS)
        count = count + (~done).long()
        if bool(done.all()):
            break
    rows = torch.stack(prefix[1:], 1).tolist()
    tokens = [row[:n] for row, n in zip(rows, count.tolist(), strict=True)]
    return Hypotheses(tokens, score, count >= limit)


def forbid(logits: Tensor) -> Tensor:
    """Logits with padding and start token made impossible, [..., vocabulary]."""
    banned = torch.zeros(logits.shape[-1], dtype=torch.bool, device=logits.device)
    banned[[PAD, BOS]] = True
    return logits.masked_fill(banned, float("-inf"))
