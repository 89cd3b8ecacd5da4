"""Counted operations against torch's own counter, which sees products but no fused attention."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from zoo.attention import Grid, Pattern, create_attention, get_attention, list_attention
from zoo.layers.flops import count_flops
from zoo.layers.graph_time import SegmentGat
from zoo.layers.members import MemberHeads
from zoo.layers.numerical_embedding import NumericalEmbedding
from zoo.layers.pool import EfficientProbe
from zoo.layers.seg_heads import EncoderOnlyHead
from zoo.models.tabm import EnsembleLinear


def counted_by_torch(model, *args):
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(*args)
    return counter.get_total_flops()


@pytest.mark.parametrize(
    ("model", "args"),
    [
        (nn.ConvTranspose2d(6, 4, 2, 2), (torch.randn(2, 6, 5, 3),)),
        (EnsembleLinear(5, 4, 3, first=True), (torch.randn(2, 3, 5),)),
        (MemberHeads(3, 5, 4), (torch.randn(2, 3, 5),)),
        (NumericalEmbedding(3, 8, kind="periodic", frequencies=4), (torch.randn(2, 3),)),
        (EfficientProbe(8, queries=2, reduction=2), (torch.randn(2, 7, 8),)),
        (EncoderOnlyHead(8, 3, queries=5, steps=1), ([torch.randn(2, 5 + 12, 8)], (3, 4), [])),
    ],
    ids=lambda x: type(x).__name__ if isinstance(x, nn.Module) else "",
)
def test_products_outside_attention_are_counted(model, args):
    assert count_flops(model, args) == counted_by_torch(model, *args) > 0


def test_graph_convolutions_are_counted():
    model = SegmentGat(3, 8, 2, depth=2)
    edges = torch.tensor([[0, 1, 2, 2], [1, 2, 0, 2]])  # three edges; loops are the layer's own
    args = (torch.randn(2, 4, 5, 3), edges)
    graphs, linked, dim, depth = 2 * 4, 3 + 5, 8, 2
    by_elements = 2 * 2 * graphs * linked * dim * depth  # scores and messages, no product of matrices
    assert count_flops(model, args) == counted_by_torch(model, *args) + by_elements


PLACES = [(n, p) for n in list_attention() for p in Pattern if p in get_attention(n).capabilities.patterns]


@pytest.mark.parametrize(("name", "pattern"), PLACES, ids=[f"{n}-{p.value}" for n, p in PLACES])
def test_a_mechanism_states_what_counting_finds(name, pattern):
    """Every linear layer once: those of keys for keys, those of queries for queries, small networks of gates and blocks too."""
    n, m = (12, 20) if pattern.cross else (16, 16)
    can = get_attention(name).capabilities
    options = {"compress_block": 4, "compress_stride": 2} if name == "nsa" else {}
    options |= {"grid": Grid((4, 4))} if can.needs_grid else {}
    module = create_attention(name, 24, 2, pattern=pattern, length=m, **options)
    args = (torch.randn(1, n, 24), torch.randn(1, m, 24))[: 1 + pattern.cross]
    assert module.cost(n, m).flops == pytest.approx(count_flops(module, args), rel=1e-9)
    layers = sum(2 * f.weight.numel() for f in module.modules() if isinstance(f, nn.Linear))
    if name not in ("nsa", "ppma"):  # whose layers see blocks, or heads, instead of tokens
        assert (
            min(n, m) * layers <= module.cost(n, m).flops - module.attend_cost(n, m)[0] <= max(n, m) * layers
        )
