"""Beam search over the decoder, with CTC prefix scores fused in.

Scores as in FireRedASR, arXiv:2501.14350 (temperature, GNMT length penalty) and Watanabe et al. 2017 (joint CTC).
"""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.attention.base import reorder_state
from zoo.decoding.ctc import CtcPrefix
from zoo.decoding.greedy import Hypotheses, forbid, token_limit
from zoo.errors import ConfigError
from zoo.models._speech import BOS, EOS, SpeechModel

NEVER = float("-inf")


@torch.no_grad()
def beam_search(
    model: SpeechModel,
    memory: Tensor,
    lengths: Tensor,
    *,
    beam: int = 4,
    ctc_weight: float = 0.0,
    length_penalty: float = 0.0,
    temperature: float = 1.0,
    limit: Tensor | None = None,
    candidates: int | None = None,
) -> Hypotheses:
    """Best sentence of a beam, all utterances at once; none is influenced by its neighbours.

    Args:
        model: In evaluation mode.
        memory: [B, M, C].
        lengths: Valid places, int [B].
        beam: Hypotheses kept; 1 without CTC equals greedy decoding.
        ctc_weight: Share of the CTC prefix score in [0, 1]; the decoder has the rest.
        length_penalty: Exponent of GNMT's ((5 + length) / 6) that final scores are divided by; 0 for none.
        temperature: Divides the decoder's logits.
        limit: Most tokens of each sentence; `token_limit` when left out.
        candidates: Tokens that each hypothesis is extended by, those that the decoder likes best (and the end); twice the beam
            when left out. CTC scores cost in proportion.
    """
    if beam < 1 or not 0 <= ctc_weight <= 1 or temperature <= 0:
        raise ConfigError(f"beam={beam} must be >= 1, ctc_weight={ctc_weight} in [0, 1], temperature > 0")
    limit = token_limit(model, memory, lengths) if limit is None else limit
    if not memory.shape[1] or not len(memory):
        return Hypotheses([[] for _ in memory], memory.new_zeros(len(memory)), limit < 0)
    search = _Search(model, memory, lengths, limit, beam, ctc_weight, length_penalty, temperature)
    count = min(candidates or 2 * beam, model.vocab_size)
    while search.going():
        search.advance(count)
    return search.result()


class _Search:
    """K hypotheses of each utterance on their way; a score of minus infinity marks one that has ended."""

    def __init__(
        self,
        model: SpeechModel,
        memory: Tensor,
        lengths: Tensor,
        limit: Tensor,
        beam: int,
        ctc_weight: float,
        length_penalty: float,
        temperature: float,
    ) -> None:
        b, device = len(memory), memory.device
        self.model, self.limit, self.beam = model, limit, beam
        self.ctc_weight, self.length_penalty, self.temperature = ctc_weight, length_penalty, temperature
        rows = torch.arange(b, device=device).repeat_interleave(beam)
        self.state = reorder_state(model.init_state(memory, lengths), rows)
        self.decoder_score = memory.new_full((b, beam), NEVER)
        self.decoder_score[:, 0] = 0.0  # one empty prefix
        self.prefixes = torch.full((b, beam, 1), BOS, device=device)
        self.ctc, self.ctc_state = None, None
        if ctc_weight:
            frames = lengths * model.ctc_per_place
            self.ctc = CtcPrefix(model.ctc_logits(memory).log_softmax(-1), frames, EOS)
            self.ctc_state = self.ctc.start()[:, None].expand(-1, beam, -1, -1)
        self.best = memory.new_full((b,), NEVER)
        self.sentences: list[list[int]] = [[] for _ in range(b)]

    def going(self) -> bool:
        return bool((self.decoder_score > NEVER).any())

    def advance(self, candidates: int) -> None:
        """Extend every hypothesis by one token and keep the best of each utterance."""
        b, length = len(self.best), self.prefixes.shape[2] - 1
        last = self.prefixes[..., -1]
        logits, self.state = self.model.step(last.flatten(), self.state)
        log_probs = (forbid(logits) / self.temperature).log_softmax(-1).unflatten(0, (b, -1))
        likely = log_probs.index_fill(-1, torch.tensor(EOS, device=log_probs.device), float("inf"))
        tokens = likely.topk(candidates).indices  # [B, K, candidates], the end always among them
        attention = self.decoder_score[..., None] + log_probs.gather(-1, tokens)
        total = attention
        if self.ctc:
            ctc_score, extended = self.ctc.extend(self.ctc_state, last.masked_fill(last == BOS, -1), tokens)
            total = (1 - self.ctc_weight) * attention + self.ctc_weight * ctc_score.to(attention)
            total = total.masked_fill(attention == NEVER, NEVER)
        # At its limit an utterance may only end.
        total = total.masked_fill((tokens != EOS) & (length >= self.limit)[:, None, None], NEVER)
        values, flat = total.flatten(1).topk(self.beam)
        self._end(values, flat, tokens, length)
        parents, token = flat // candidates, tokens.flatten(1).gather(1, flat)
        gone = (token == EOS) | self._hopeless(values.masked_fill(token == EOS, NEVER), length)[:, None]
        self.decoder_score = attention.flatten(1).gather(1, flat).masked_fill(gone | (values == NEVER), NEVER)
        utterances = torch.arange(b, device=flat.device)[:, None]
        self.prefixes = torch.cat((self.prefixes[utterances, parents], token[..., None]), -1)
        if self.ctc:
            self.ctc_state = extended.flatten(1, 2)[utterances, flat]
        self.state = reorder_state(self.state, (utterances * self.beam + parents).flatten())

    def _end(self, values: Tensor, flat: Tensor, tokens: Tensor, length: int) -> None:
        """Note sentences that end here and are better than those that ended before."""
        ends = tokens.flatten(1).gather(1, flat) == EOS
        score, place = self._normal(values.masked_fill(~ends, NEVER), length + 1).max(1)
        for i in (score > self.best).nonzero()[:, 0].tolist():
            self.best[i] = score[i]
            self.sentences[i] = self.prefixes[i, flat[i, place[i]] // tokens.shape[2], 1:].tolist()

    def _hopeless(self, values: Tensor, length: int) -> Tensor:
        """Utterances of which no longer sentence can score better than the best that ended, bool [B]."""
        longest = self.limit + 1 if self.length_penalty > 0 else length + 1
        return self._normal(values.max(1).values, longest) <= self.best

    def _normal(self, score: Tensor, length: int | Tensor) -> Tensor:
        return score / ((5 + length) / 6) ** self.length_penalty if self.length_penalty else score

    def result(self) -> Hypotheses:
        cut = torch.tensor([len(s) for s in self.sentences], device=self.limit.device) >= self.limit
        return Hypotheses(self.sentences, self.best, cut)
