"""A pass over users with all positions trained at once, beside passes with a sample per prefix, as RecBole makes them.

Peers: RecBole's own SASRec (`pip install recbole==1.2.1`), which is left out and named where it is not installed, and
the plain network of `peers_recommendation`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from zoo.bench.peers_recommendation import (
    BATCH,
    DEPTH,
    DIM,
    DROPOUT,
    HEADS,
    ITEMS,
    LENGTH,
    PlainSasRec,
    windows,
)
from zoo.bench.peers_recommendation import contestants as steps
from zoo.bench.tasks import Contestants, training_step

MODE = f"pass over {BATCH} users"


def prefixes(items: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Every question of windows [B, L] as a window of its own [P, L], its target at the last place."""
    rows, places = (targets > 0).nonzero(as_tuple=True)
    source = torch.arange(LENGTH) - (LENGTH - 1 - places[:, None])
    history = torch.where(source >= 0, items[rows[:, None], source.clamp_min(0)], 0)
    last = torch.zeros_like(history)
    last[:, -1] = targets[rows, places]
    return history, last


def recbole_loss() -> tuple[nn.Module, Callable[[Tensor, Tensor], Tensor]]:
    """RecBole's SASRec at the configuration of `peers_recommendation`, and its loss of [P, L] prefixes."""
    from recbole.model.sequential_recommender import SASRec

    fields = {"USER_ID_FIELD": "user", "ITEM_ID_FIELD": "item", "ITEM_LIST_LENGTH_FIELD": "length"}
    names = {"LIST_SUFFIX": "_list", "NEG_PREFIX": "neg_", "MAX_ITEM_LIST_LENGTH": LENGTH, "device": "cpu"}
    shape = {
        "n_layers": DEPTH,
        "n_heads": HEADS,
        "hidden_size": DIM,
        "inner_size": 4 * DIM,
        "loss_type": "CE",
    }
    rates = {"hidden_dropout_prob": DROPOUT, "attn_dropout_prob": DROPOUT, "hidden_act": "gelu"}
    start = {"layer_norm_eps": 1e-12, "initializer_range": 0.02}
    peer = SASRec(fields | names | shape | rates | start, SimpleNamespace(num=lambda field: ITEMS + 1))

    def loss(history: Tensor, last: Tensor) -> Tensor:
        length = (history > 0).sum(1)
        place = torch.arange(LENGTH) + LENGTH - length[:, None]  # RecBole pads on the right
        items = torch.where(place < LENGTH, history.gather(1, place.clamp_max(LENGTH - 1)), 0)
        return peer.calculate_loss({"item_list": items, "length": length, "item": last[:, -1]})

    return peer, loss


def every_sample(
    peer: nn.Module, loss: Callable[..., Tensor], samples: Sequence[tuple[Any, ...]]
) -> Callable[[], None]:
    """A training step on each sample in turn."""
    turn = iter(())
    step = training_step(peer, lambda: loss(*next(turn)))

    def call() -> None:
        nonlocal turn
        turn = iter(samples)
        for _ in samples:
            step()

    return call


def contestants(attention: str) -> Contestants:
    """One step on 128 windows of up to 50 items, against a step for every 128 prefixes of the same windows."""
    found = dict([next(iter(steps(attention).items()))])
    samples = list(zip(*(t.split(BATCH) for t in prefixes(*windows())), strict=True))
    plain = PlainSasRec()
    peers = {"plain torch SASRec": (plain, plain.loss)}
    try:
        peers["RecBole SASRec"] = recbole_loss()
    except ImportError as error:
        print(f"RecBole is left out: package {error.name!r} is not installed", file=sys.stderr)
    for name, (peer, loss) in peers.items():
        found[f"{name}, {len(samples)} steps of {BATCH} prefixes"] = every_sample(peer, loss, samples)
    return found
