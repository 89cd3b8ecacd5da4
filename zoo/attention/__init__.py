"""Attention variants: one file each. See `base` for the contract and `registry` for names."""

from zoo.attention.base import Attention, BiasFactors, Cost, Grid, Pattern, reorder_state
from zoo.attention.registry import create_attention, get_attention, list_attention
from zoo.attention.slots import AttentionFactory, Slot, resolve_slots, slot_table

__all__ = [
    "Attention",
    "AttentionFactory",
    "BiasFactors",
    "Cost",
    "Grid",
    "Pattern",
    "Slot",
    "create_attention",
    "get_attention",
    "list_attention",
    "reorder_state",
    "resolve_slots",
    "slot_table",
]
