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
    """Probability of the frames starting with a prefix, extended by all tokens at once.

    State of a hypothesis: log-probabilities of the frames 0 .. t emitting exactly the prefix, ending in its last
    token (column 0) or in a blank (column 1), [M, 2].

    Args:
        log_probs: Of one utterance, [M, vocabulary].
        end: Token that ends a sentence.
    """

    def __init__(self, log_probs: Tensor, end: int) -> None:
        # Differences of sums over all frames: float32 would lose three digits.
        self.log_probs, self.end = log_probs.double(), end
        self._summed = self.log_probs.cumsum(0).T  # [V, M]
        self._shifted = F.pad(self._summed, (1, 0))[:, :-1]

    def start(self) -> Tensor:
        """State of the empty prefix, [M, 2]."""
        blank = self._summed[BLANK]
        return torch.stack((torch.full_like(blank, float("-inf")), blank), -1)

    def extend(self, states: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
        """Scores and states of every hypothesis extended by every token.

        Args:
            states: [K, M, 2].
            last: Last token of each hypothesis, -1 for the empty one, int [K].

        Returns:
            Log-probability of "starts with prefix + token" [K, vocabulary]; for the end token, of the prefix being all.
            States of the extended hypotheses, [K, vocabulary, M, 2].
        """
        emit, blank = states[..., 0], states[..., 1]  # [K, M]
        either = torch.logaddexp(emit, blank)
        # A repeated token needs a blank between: only the paths that end in blank go on.
        same = torch.arange(self.log_probs.shape[1], device=last.device) == last[:, None]  # [K, V]
        before = torch.where(same[..., None], blank[:, None], either[:, None])[..., :-1]
        first = torch.where(last == -1, 0.0, float("-inf")).to(before)[:, None, None].expand(*same.shape, 1)
        arrive = torch.cat((first, before), -1)  # [K, V, M]: just before the new token's first frame
        # Staying on a token is a running product, so the recursion over frames is one cumulative sum.
        new_emit = self._summed + torch.logcumsumexp(arrive - self._shifted, -1)
        blanks = self._summed[BLANK]
        new_blank = torch.full_like(new_emit, float("-inf"))
        new_blank[..., 1:] = blanks[1:] + torch.logcumsumexp(new_emit[..., :-1] - blanks[:-1], -1)
        total = torch.logsumexp(arrive + self.log_probs.T, -1)
        total[:, self.end] = either[:, -1]
        total[:, BLANK] = float("-inf")
        return total, torch.stack((new_emit, new_blank), -1)


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
