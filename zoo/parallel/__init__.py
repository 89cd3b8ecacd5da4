"""Attention over a sequence that is split among processes: LASP-2 for states, LASP-2H for softmax."""

from zoo.parallel.collectives import Traffic, all_gather, count_traffic
from zoo.parallel.modules import split_sequence
from zoo.parallel.sequence import decay_scan, delta_scan, linear_attention, mala, softmax_attention

__all__ = [
    "Traffic",
    "all_gather",
    "count_traffic",
    "decay_scan",
    "delta_scan",
    "linear_attention",
    "mala",
    "softmax_attention",
    "split_sequence",
]
