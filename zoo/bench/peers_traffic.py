"""GMAN's and STAEformer's training steps beside torch_geometric_temporal's GMAN, at equal configuration.

The authors' STAEformer is no package; it is timed only where its `model/STAEformer.py` can be imported as `STAEformer`.
"""

from __future__ import annotations

import torch

from zoo.attention.slots import resolve_slots
from zoo.bench.tasks import Contestants, training_step
from zoo.models.registry import build_model, get_model

BATCH, SENSORS, STEPS, SLOTS = 32, 21, 12, 24


def contestants(attention: str) -> Contestants:
    """Batch 32, 21 sensors, 12 -> 12 hourly steps; width 32, 4 heads, one block of each kind."""
    draw = torch.Generator().manual_seed(0)
    x = torch.rand(BATCH, STEPS, SENSORS, generator=draw)
    batch = {
        "history": x,
        "history_seen": torch.ones_like(x, dtype=torch.bool),
        "clock": torch.randint(7 * SLOTS, (BATCH,), generator=draw),
    }
    gman = _build(
        "gman", attention, size="pems_bay", num_heads=4, head_dim=8, embedding="learned", embedding_dim=32
    )
    stae = _build(
        "staeformer",
        attention,
        size="paper",
        value_dim=8,
        day_dim=4,
        weekday_dim=4,
        adaptive_dim=16,
        mlp_dim=64,
        temporal_depth=1,
        spatial_depth=1,
    )
    found: Contestants = {
        f"zoo gman ({attention})": training_step(gman, lambda: gman(**batch).abs().mean()),
        f"zoo staeformer ({attention})": training_step(stae, lambda: stae(**batch).abs().mean()),
    }
    return found | _temporal_package(x, draw) | _authors(x, draw)


def _build(name: str, attention: str, **options: object) -> torch.nn.Module:
    torch.manual_seed(0)
    slots = resolve_slots(get_model(name).slots(**options), {"name": attention})
    return build_model(name, slots, num_sensors=SENSORS, slots_per_day=SLOTS, **options)


def _temporal_package(x: torch.Tensor, draw: torch.Generator) -> Contestants:
    from torch_geometric_temporal.nn.attention import GMAN

    torch.manual_seed(0)
    peer = GMAN(L=1, K=4, d=8, num_his=STEPS, bn_decay=0.1, steps_per_day=SLOTS, use_bias=True, mask=False)
    sensors = torch.rand(SENSORS, 32, generator=draw)
    calendar = [torch.randint(n, (BATCH, 2 * STEPS, 1), generator=draw) for n in (7, SLOTS)]
    time = torch.cat(calendar, dim=-1).float()
    return {"torch_geometric_temporal GMAN": training_step(peer, lambda: peer(x, sensors, time).abs().mean())}


def _authors(x: torch.Tensor, draw: torch.Generator) -> Contestants:
    try:
        from STAEformer import STAEformer
    except ImportError:
        return {}
    torch.manual_seed(0)
    peer = STAEformer(
        SENSORS,
        steps_per_day=SLOTS,
        input_embedding_dim=8,
        tod_embedding_dim=4,
        dow_embedding_dim=4,
        adaptive_embedding_dim=16,
        feed_forward_dim=64,
        num_layers=1,
    )
    day = torch.rand(BATCH, STEPS, SENSORS, generator=draw)
    weekday = torch.randint(7, (BATCH, STEPS, SENSORS), generator=draw).float()
    inputs = torch.stack((x, day, weekday), dim=-1)
    return {"authors' STAEformer": training_step(peer, lambda: peer(inputs).abs().mean())}
