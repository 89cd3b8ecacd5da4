"""DARE's search over long histories with the full and with half the width of the attention table."""

from __future__ import annotations

from collections.abc import Callable

import torch

from zoo.bench.tasks import Contestants
from zoo.models import create_model

MODE = "search"
BATCH, LENGTH, ITEMS, CATEGORIES, WIDTH = 64, 10_000, 100_000, 1000, 16


def contestants(attention: str) -> Contestants:
    """64 candidates, 10,000 behaviours each, 100,000 items; half the width first, so that the ratio is its gain."""
    draw = torch.Generator().manual_seed(0)
    items = torch.randint(1, ITEMS + 1, (BATCH, LENGTH), generator=draw)
    item = torch.randint(1, ITEMS + 1, (BATCH,), generator=draw)
    asked = (item, item % CATEGORIES + 1, items, items % CATEGORIES + 1)
    sizes = {"num_items": ITEMS, "num_categories": CATEGORIES, "max_length": LENGTH, "width": WIDTH}

    def search(attention_width: int) -> Callable[[], object]:
        torch.manual_seed(0)
        model = create_model("dare", attention=attention, attention_width=attention_width, **sizes).eval()
        return lambda: model.search(*asked)

    return {f"search, width 3 x {w}": search(w) for w in (WIDTH // 2, WIDTH)}
