"""Traffic models at sizes that users bring: memory of a step and the growth of group attention."""

import resource

import numpy as np
import pytest
import torch

from zoo.attention.base import Pattern
from zoo.attention.slots import Slot, resolve_slots
from zoo.layers.graph import GroupAttention
from zoo.models.registry import build_model, get_model


def test_group_attention_flops_grow_as_four_thirds():
    slot = Slot(Pattern.SELF, key_mask=True, ordered=False, length_known=True)
    factory = resolve_slots({"spatial": slot}, {"name": "softmax"})["spatial"]
    sizes, flops = [100, 300, 1000, 3000], []
    for nodes in sizes:
        module = GroupAttention(factory, 32, 4, num_nodes=nodes)
        inside = module.groups * module.within.attend_cost(module.group_size, module.group_size)[0]
        flops.append(inside + module.between.attend_cost(module.groups, module.groups)[0])
    assert np.polyfit(np.log(sizes), np.log(flops), 1)[0] == pytest.approx(4 / 3, abs=0.05)


@pytest.mark.slow
def test_883_sensors_train_within_24_gib():
    options = {"size": "pems_bay", "embedding": "learned", "num_sensors": 883, "slots_per_day": 288}
    slots = resolve_slots(get_model("gman").slots(**options), {"name": "softmax"})
    model = build_model("gman", slots, **options)
    batch = {
        "history": torch.rand(4, 12, 883) * 50,
        "history_seen": torch.rand(4, 12, 883) > 0.02,
        "clock": torch.randint(2016, (4,)),
    }
    model(**batch).abs().mean().backward()
    used_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    assert used_gib < 6  # a quarter of 24 GiB for a quarter of the batch of 16
