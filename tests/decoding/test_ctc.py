"""CTC scores against brute force; alignment against exact truth."""

import itertools

import numpy as np
import pytest
import torch

from zoo.decoding.align import dtw_starts, pearson, word_spans
from zoo.decoding.ctc import CtcPrefix, ctc_greedy, forced_alignment
from zoo.errors import ConfigError

END = 2


def collapse(path):
    out = [t for i, t in enumerate(path) if i == 0 or t != path[i - 1]]
    return tuple(t for t in out if t != 0)


def brute(log_probs):
    """Log-probability of every sentence, by summing all paths."""
    frames, vocabulary = log_probs.shape
    total = {}
    for path in itertools.product(range(vocabulary), repeat=frames):
        p = float(sum(log_probs[t, v] for t, v in enumerate(path)))
        key = collapse(path)
        total[key] = np.logaddexp(total.get(key, -np.inf), p)
    return total


def prefix_score(total, prefix):
    scores = [p for key, p in total.items() if key[: len(prefix)] == prefix]
    return np.logaddexp.reduce(scores) if scores else -np.inf


def test_loss_equals_brute_force():
    torch.manual_seed(0)
    log_probs = torch.randn(5, 4).double().log_softmax(-1)
    total = brute(log_probs)
    for target in ((1,), (1, 1), (3, 1, 3), (2, 3)):
        loss = torch.nn.functional.ctc_loss(
            log_probs[:, None],
            torch.tensor([target]),
            torch.tensor([5]),
            torch.tensor([len(target)]),
            reduction="sum",
        )
        assert float(-loss) == pytest.approx(total[target], abs=1e-9)


@pytest.mark.parametrize("prefix", [(), (3,), (3, 3), (1, 3), (3, 1, 3)])
def test_prefix_scores_equal_brute_force(prefix):
    """Extending a prefix scores each next token by the sum over all sentences that start so."""
    torch.manual_seed(1)
    log_probs = torch.randn(5, 4).double().log_softmax(-1)
    total = brute(log_probs)
    padded = torch.nn.functional.pad(log_probs, (0, 0, 0, 3))  # what stands behind the end does not count
    scorer = CtcPrefix(torch.stack((padded, padded.roll(1, 1))), torch.tensor([5, 8]), END)
    states, last = scorer.start()[:, None], torch.full((2, 1), -1)
    for token in prefix:
        _, new = scorer.extend(states, last, torch.full((2, 1, 1), token))
        states, last = new[:, :, 0], torch.full((2, 1), token)
    scores, _ = scorer.extend(states, last, torch.arange(4).expand(2, 1, 4))
    scores = scores[0]
    for token in (1, 3):
        assert float(scores[0, token]) == pytest.approx(prefix_score(total, (*prefix, token)), abs=1e-9)
    assert float(scores[0, END]) == pytest.approx(total[prefix], abs=1e-9)


def test_greedy_collapses_and_respects_lengths():
    best = torch.tensor([[3, 3, 0, 3, 4, 4], [4, 0, 0, 3, 3, 3]])
    logits = torch.nn.functional.one_hot(best, 5).float()
    logits[0, 2, 2] = 9.0  # the end token has no place here
    assert ctc_greedy(logits, torch.tensor([6, 3])) == [[3, 3, 4], [4]]


def test_forced_alignment_finds_the_places():
    path = [0, 3, 3, 0, 3, 1, 0, 0]
    log_probs = (torch.nn.functional.one_hot(torch.tensor(path), 4) * 8.0).log_softmax(-1)
    assert forced_alignment(log_probs, [3, 3, 1]) == [(1, 2), (4, 4), (5, 5)]
    assert forced_alignment(log_probs, []) == []
    with pytest.raises(ConfigError, match="cannot be aligned"):
        forced_alignment(log_probs[:3], [3, 3, 1])


def test_dtw_recovers_monotone_attention():
    """One-hot attention that moves on at known places gives these places back."""
    starts = [0, 4, 9, 11]
    weights = np.zeros((2, 4, 15))
    for token, (begin, end) in enumerate(zip(starts, [*starts[1:], 15], strict=True)):
        weights[:, token, begin:end] = 1.0
    assert dtw_starts(weights, median=1).tolist() == starts
    noisy = weights + np.random.default_rng(0).normal(0, 0.1, weights.shape)
    assert np.abs(dtw_starts(noisy, median=3) - starts).max() <= 1


def test_words_from_pieces():
    spans = [(0, 1), (2, 2), (3, 3), (5, 8), (9, 9)]
    assert word_spans(["h", "i", " ", "y", "o"], spans) == [("hi", 0, 2), ("yo", 5, 9)]
    assert word_spans([" he", "llo", " you"], spans[:3]) == [("hello", 0, 2), ("you", 3, 3)]


def test_correlation():
    a = torch.rand(4, 5)
    assert pearson(a, a) == pytest.approx(1.0)
    assert pearson(a, -a) == pytest.approx(-1.0)
    assert pearson(a, torch.ones(4, 5)) == 0.0
