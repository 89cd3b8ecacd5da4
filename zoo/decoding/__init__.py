"""Turning a speech model's outputs into token sequences: greedy, beam search with CTC fusion, CTC, alignment."""

from zoo.decoding.beam import beam_search
from zoo.decoding.ctc import ctc_greedy
from zoo.decoding.greedy import Hypotheses, greedy

__all__ = ["Hypotheses", "beam_search", "ctc_greedy", "greedy"]
