"""`train.py` in this process, the curve that it wrote, and work in several processes."""

import csv
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from hydra.core.global_hydra import GlobalHydra


def run(*overrides: str) -> int:
    """Exit status of `python train.py OVERRIDES`."""
    import train

    GlobalHydra.instance().clear()
    argv, sys.argv = sys.argv, ["train.py", *overrides]
    try:
        return train.entry()
    finally:
        sys.argv = argv


def logged(folder: Path, column: str = "train/loss") -> dict[int, str]:
    """What metrics.csv holds of a column, as written, by step."""
    with (folder / "metrics.csv").open(newline="") as file:
        return {int(row["step"]): row[column] for row in csv.DictReader(file) if row.get(column)}


def losses(folder: Path) -> list[float]:
    """Training losses in order."""
    return [float(value) for value in logged(folder).values()]


def forked(work: Callable[[int], None], processes: int, folder: Path) -> list[int]:
    """Exit statuses of `work(rank)` in processes that share a gloo group and meet in `folder`; an exception is 1."""
    children = []
    for rank in range(processes):
        child = os.fork()
        if not child:
            try:
                torch.set_num_threads(1)  # more do not survive a fork
                place = f"file://{folder}/meet"
                dist.init_process_group("gloo", init_method=place, rank=rank, world_size=processes)
                work(rank)
                os._exit(0)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(1)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
