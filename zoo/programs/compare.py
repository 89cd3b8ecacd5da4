"""A written program beside its model: run both, measure the difference."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zoo.errors import ZooError
from zoo.programs.parts import Part

CHECKED_BATCHES = (1, 4)


class ExportError(ZooError, RuntimeError):
    """A model that cannot be exported, or whose program gives other results."""


def compare(
    part: Part,
    path: Path,
    format: str,
    batch: int | None,
    fixed: tuple[str, ...],
    tolerance: float,
    about: str,
) -> float:
    """Largest difference between model and written program; every free axis takes several sizes."""
    run = _runner(path, format)
    lengths = part.lengths[:1] if batch or "length" in fixed else part.lengths
    worst = 0.0
    for size in (batch,) if batch else CHECKED_BATCHES:
        for length in lengths or (0,):
            inputs = part.draw(size, length)
            with torch.no_grad():
                wanted = part.module(*inputs.values())
            wanted = wanted if isinstance(wanted, tuple) else (wanted,)
            try:
                found = run(inputs)
            except Exception as error:
                raise ExportError(
                    f"{about}: the program does not run with batch {size}, length {length}: {first_line(error)}"
                ) from error
            for name, a, b in zip(part.outputs, wanted, found, strict=True):
                difference = _distance(a, b)
                worst = max(worst, difference)
                if not difference <= tolerance * max(1.0, float(a.abs().max())):
                    raise ExportError(
                        f"{about}: output {name!r} of the program differs from the model's by {difference:.3g}, more than "
                        f"the tolerance {tolerance:g}; nothing was written"
                    )
    return worst


def _distance(wanted: Tensor, found: Tensor) -> float:
    if wanted.shape != found.shape:
        return float("inf")
    a, b = wanted.double(), found.double()
    same = (a == b) | (a.isnan() & b.isnan())
    return float(torch.where(same, 0.0, (a - b).abs()).nan_to_num(float("inf")).max()) if a.numel() else 0.0


def _runner(path: Path, format: str) -> Any:
    """A function from inputs by name to a list of outputs."""
    if format == "torch_export":
        with quiet():
            program = torch.export.load(path).module()

        def run(inputs: dict[str, Tensor]) -> list[Tensor]:
            with torch.no_grad():
                out = program(*inputs.values())
            return list(out) if isinstance(out, (tuple, list)) else [out]

        return run
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    taken = {value.name for value in session.get_inputs()}  # an input that nothing reads is dropped
    return lambda inputs: [
        torch.from_numpy(out)
        for out in session.run(None, {k: v.numpy() for k, v in inputs.items() if k in taken})
    ]


def first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__


class quiet:
    """Keep the exporters' advice for their own developers off the screen."""

    def __enter__(self) -> None:
        self.disabled = logging.root.manager.disable
        logging.disable(logging.WARNING)
        self.warnings = warnings.catch_warnings()
        self.warnings.__enter__()
        warnings.simplefilter("ignore")

    def __exit__(self, *exc: object) -> None:
        self.warnings.__exit__(*exc)
        logging.disable(self.disabled)
