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
) -> Hypotheses:
    """Best sentence of a beam, each utterance by itself.

    Args:
        model: In evaluation mode.
        memory: [B, M, C].
        lengths: Valid places, int [B].
        beam: Hypotheses kept; 1 without CTC equals greedy decoding.
        ctc_weight: Share of the CTC prefix score in [0, 1]; the decoder has the rest.
        length_penalty: Exponent of GNMT's ((5 + length) / 6) that final scores are divided by; 0 for none.
        temperature: Divides the decoder's logits.
        limit: Most tokens of each sentence; `token_limit` when left out.
    """
    if beam < 1 or not 0 <= ctc_weight <= 1 or temperature <= 0:
        raise ConfigError(f"beam={beam} must be >= 1, ctc_weight={ctc_weight} in [0, 1], temperature > 0")
    limit = token_limit(lengths) if limit is None else limit
    found = []
    for i in range(len(memory)):
        n = int(lengths[i])
        found.append(
            _search(
                model, memory[i : i + 1, :n], int(limit[i]), beam, ctc_weight, length_penalty, temperature
            )
        )
    return Hypotheses(
        [tokens for tokens, _, _ in found],
        memory.new_tensor([score for _, score, _ in found]),
        torch.tensor([cut for _, _, cut in found], dtype=torch.bool, device=memory.device),
    )


def _search(
    model: SpeechModel,
    memory: Tensor,
    limit: int,
    beam: int,
    ctc_weight: float,
    length_penalty: float,
    temperature: float,
) -> tuple[list[int], float, bool]:
    if memory.shape[1] == 0:
        return [], 0.0, False
    device = memory.device
    state = model.init_state(memory, torch.tensor([memory.shape[1]], device=device))
    token = torch.tensor([BOS], device=device)
    decoder_score = memory.new_zeros(1)
    prefixes: list[list[int]] = [[]]
    ctc = CtcPrefix(model.ctc_logits(memory)[0].log_softmax(-1), EOS) if ctc_weight else None
    ctc_states = ctc.start()[None] if ctc else None
    ended: list[tuple[float, list[int]]] = []
    for length in range(limit + 1):
        logits, state = model.step(token, state)
        attention = decoder_score[:, None] + (forbid(logits) / temperature).log_softmax(-1)
        total = attention
        if ctc:
            last = torch.tensor([p[-1] if p else -1 for p in prefixes], device=device)
            ctc_score, extended = ctc.extend(ctc_states, last)
            total = (1 - ctc_weight) * attention + ctc_weight * ctc_score.to(attention)
            total = total.masked_fill(attention == float("-inf"), float("-inf"))
        vocabulary = total.shape[1]
        if length == limit:  # no more room: every hypothesis ends here
            values = total[:, EOS].tolist()
            ended += [
                (_normal(v, length + 1, length_penalty), p) for v, p in zip(values, prefixes, strict=True)
            ]
            break
        values, flat = total.flatten().topk(min(beam, total.numel()))
        rows, tokens = flat // vocabulary, flat % vocabulary
        going = []
        for j, (value, row, t) in enumerate(
            zip(values.tolist(), rows.tolist(), tokens.tolist(), strict=True)
        ):
            if value == float("-inf"):
                continue
            if t == EOS:
                ended.append((_normal(value, length + 1, length_penalty), prefixes[row]))
            else:
                going.append(j)
        if not going:
            break
        best_end = max((s for s, _ in ended), default=float("-inf"))
        bound = _normal(
            float(values[going[0]]), limit + 1 if length_penalty > 0 else length + 1, length_penalty
        )
        if ended and bound <= best_end:  # no continuation can score better
            break
        index = torch.tensor(going, device=device)
        rows, token = rows[index], tokens[index]
        prefixes = [[*prefixes[r], t] for r, t in zip(rows.tolist(), token.tolist(), strict=True)]
        decoder_score = attention[rows, token]
        if ctc:
            ctc_states = extended[rows, token]
        state = reorder_state(state, rows)
    score, tokens = max(ended, key=lambda e: e[0], default=(float("-inf"), prefixes[0]))
    return tokens, score, len(tokens) >= limit


def _normal(score: float, length: int, penalty: float) -> float:
    return score / ((5 + length) / 6) ** penalty if penalty else score
