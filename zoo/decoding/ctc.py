"""CTC: best path, prefix scores for joint decoding, forced alignment.

Source of the prefix scores: Watanabe et al., "Hybrid CTC/attention architecture for end-to-end speech recognition", 2017.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.errors import ConfigError

BLANK = 0
FIRST_TEXT = 3  # after padding, start and end
_NEVER = -1e4  # log-probability; infinity would spoil differences of sums


def ctc_greedy(logits: Tensor, lengths: Tensor) -> list[list[int]]:
    """Best path: the most probable token of each place, repeats and blanks removed.

    Args:
        logits: [B, M, vocabulary].
        lengths: Valid places, int [B].
    """
    best = logits.clone()
    best[..., 1:FIRST_TEXT] = float("-inf")  # start and end: never trained here
    best = best.argmax(-1)
    sentences = []
    for row, n in zip(best.tolist(), lengths.tolist(), strict=True):
        path = row[:n]
        sentences.append([t for i, t in enumerate(path) if t != BLANK and (i == 0 or t != path[i - 1])])
    return sentences


class CtcPrefix:
    """Probability of the frames starting with a prefix, extended by several tokens at once.

    State of a hypothesis: log-probabilities of the frames 0 .. t emitting exactly the prefix, ending in its last
    token (row 0) or in a blank (row 1), [2, M].

    Args:
        log_probs: [B, M, vocabulary].
        lengths: Valid frames of each utterance, int [B].
        end: Token that ends a sentence.
    """

    def __init__(self, log_probs: Tensor, lengths: Tensor, end: int) -> None:
        # Differences of sums over all frames: float32 would lose three digits.
        log_probs = log_probs.double()
        # Behind the end all frames are blank: that changes no sentence's probability.
        behind = torch.arange(log_probs.shape[1], device=lengths.device) >= lengths[:, None]
        silence = log_probs.new_full((log_probs.shape[2],), _NEVER)
        silence[BLANK] = 0.0
        log_probs = torch.where(behind[..., None], silence, log_probs)
        self.log_probs, self.end = log_probs.transpose(1, 2).contiguous(), end  # [B, V, M]
        self._summed = self.log_probs.cumsum(-1)

    def start(self) -> Tensor:
        """State of the empty prefix, [B, 2, M]."""
        blank = self._summed[:, BLANK]
        return torch.stack((torch.full_like(blank, float("-inf")), blank), 1)

    def extend(self, states: Tensor, last: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Scores and states of hypotheses extended by tokens.

        Args:
            states: [B, K, 2, M].
            last: Last token of each hypothesis, -1 for the empty one, int [B, K].
            tokens: What each one is extended by, int [B, K, V].

        Returns:
            Log-probability of "starts with prefix + token" [B, K, V]; for the end token, of the prefix being all.
            States of the extended hypotheses, [B, K, V, 2, M].
        """
        utterance = torch.arange(len(tokens), device=tokens.device)[:, None, None]
        summed, log_probs = self._summed[utterance, tokens], self.log_probs[utterance, tokens]  # [B, K, V, M]
        emit, blank = states.unbind(2)  # [B, K, M]
        either = torch.logaddexp(emit, blank)
        # A repeated token needs a blank between: only the paths that end in blank go on.
        same = (tokens == last[..., None])[..., None]
        before = torch.where(same, blank[:, :, None], either[:, :, None])[..., :-1]
        first = torch.where(last == -1, 0.0, float("-inf")).to(before)[..., None, None]
        # Just before the new token's first frame.
        arrive = torch.cat((first.expand(*tokens.shape, 1), before), -1)
        # Staying on a token is a running product, so the recursion over frames is one cumulative sum.
        new_emit = summed + torch.logcumsumexp(arrive - F.pad(summed, (1, 0))[..., :-1], -1)
        blanks = self._summed[:, None, None, BLANK]
        new_blank = blanks[..., 1:] + torch.logcumsumexp(new_emit[..., :-1] - blanks[..., :-1], -1)
        total = torch.logsumexp(arrive + log_probs, -1)
        total = torch.where(tokens == self.end, either[..., -1:], total)
        total = total.masked_fill(tokens == BLANK, float("-inf"))
        return total, torch.stack((new_emit, F.pad(new_blank, (1, 0), value=float("-inf"))), -2)


def forced_alignment(log_probs: Tensor, tokens: list[int]) -> list[tuple[int, int]]:
    """Most probable place of each token.

    Args:
        log_probs: Of one utterance, [M, vocabulary].
        tokens: The sentence, without blanks.

    Returns:
        First and last encoder place of each token.

    Raises:
        ConfigError: More tokens (and blanks between repeats) than places.
    """
    import torchaudio.functional as AF

    if not tokens:
        return []
    repeats = sum(a == b for a, b in zip(tokens, tokens[1:], strict=False))
    if len(tokens) + repeats > len(log_probs):
        raise ConfigError(
            f"{len(tokens)} tokens with {repeats} repeats cannot be aligned to {len(log_probs)} places"
        )
    path, scores = AF.forced_align(
        log_probs[None].float(),
        torch.tensor([tokens], dtype=torch.int32, device=log_probs.device),
        blank=BLANK,
    )
    return [(span.start, span.end - 1) for span in AF.merge_tokens(path[0], scores[0], blank=BLANK)]
