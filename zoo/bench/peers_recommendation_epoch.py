"""A pass over users with all positions trained at once, beside one with a sample per prefix, as RecBole makes them.

RecBole 1.2.1 needs 760 steps of 128 prefixes for an epoch of MovieLens-100K, about 310 ms each on two cores: 235 s,
computed from the step and not run in full. Here the peer is the plain network of `peers_recommendation`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.bench.peers_recommendation import BATCH, LENGTH, PlainSasRec, windows
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


def contestants(attention: str) -> Contestants:
    """One step on 128 windows of up to 50 items, against a step for every 128 prefixes of the same windows."""
    ours = dict([next(iter(steps(attention).items()))])
    peer = PlainSasRec()
    samples = list(zip(*(t.split(BATCH) for t in prefixes(*windows())), strict=True))
    turn = iter(())

    def loss() -> Tensor:
        return peer.loss(*next(turn))

    step = training_step(peer, loss)

    def every_prefix() -> None:
        nonlocal turn
        turn = iter(samples)
        for _ in samples:
            step()

    return {**ours, f"plain torch SASRec, {len(samples)} steps of {BATCH} prefixes": every_prefix}
