"""Trained models as programs that run without this package: ONNX files and torch.export archives.

Every file is compared with the model on fresh random inputs of several batch sizes before it appears under its name, and a JSON
card beside it says how to prepare the input and what the labels are.
"""

from __future__ import annotations

import json
import logging
import os
import re
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zoo.errors import ConfigError, ZooError, unknown
from zoo.programs.parts import BATCH, Part, parts_of
from zoo.pretrained.weights import load_model, sha256

SUFFIXES = {"onnx": ".onnx", "torch_export": ".pt2"}
TOLERANCE = 1e-4
# A prime that no layer has as a width: a trace decides "is the batch as wide as that?" by its example.
EXAMPLE_BATCH, CHECKED_BATCHES = 13, (1, 4)


class ExportError(ZooError, RuntimeError):
    """A model that cannot be exported, or whose program gives other results."""


@dataclass(frozen=True)
class Exported:
    """One written program.

    Attributes:
        path: The file.
        difference: Largest absolute difference from the model over all checks.
        fixed: Axes that should be free and are fixed in this program, such as "length".
    """

    path: Path
    difference: float
    fixed: tuple[str, ...]


def export(
    name: str | Path,
    output: Path,
    *,
    format: str = "onnx",
    batch: int | None = None,
    tolerance: float = TOLERANCE,
) -> list[Exported]:
    """Export trained weights.

    Args:
        name: Weights name, .safetensors file or run folder.
        output: File to write; models of several programs put the part's name before the suffix.
        format: "onnx" or "torch_export".
        batch: Fixed batch size; free when left out.
        tolerance: Largest allowed difference from the model, absolute, or relative to outputs larger than 1.

    Returns:
        What was written, one entry per program; `output` with the suffix .json is the card of all.

    Raises:
        ExportError: An operation without a form in this format, a batch that cannot be free, or a difference above
            `tolerance`. No file is left then.
    """
    if format not in SUFFIXES:
        raise unknown("export format", str(format), SUFFIXES)
    if output.suffix != SUFFIXES[format]:
        raise ConfigError(f"--output {output}: a file of format {format} ends in {SUFFIXES[format]}")
    if batch is not None and batch < 1:
        raise ConfigError(f"batch={batch} must be at least 1")
    model, card = load_model(name)
    about = f"{card['model']['name']} with attention {card.get('attention')!r}"
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.stem}.") as folder:
        written, programs = [], {}
        for part in parts_of(model, card):
            file = output.with_suffix(f".{part.name}{output.suffix}") if part.name else output
            program = _trace(part, batch, about)
            fixed = _fixed(program, part) if batch is None else tuple(_labels(part))
            if BATCH in fixed and batch is None:
                raise ExportError(f"{about} ties its program to one batch size; give one with --batch N")
            draft = Path(folder) / file.name
            _write(program, part, draft, format, fixed, about)
            difference = _compare(part, draft, format, batch, fixed, tolerance, about)
            written.append(Exported(file, difference, () if batch else fixed))
            programs[file.name] = _describe(part, program, fixed, draft, difference)
        kept = ("task", "kind", "model", "attention", "preprocessing", "labels", "licence", "metrics")
        content = {"export": format, "source_sha256": card.get("sha256"), "programs": programs}
        content |= {key: card[key] for key in kept if key in card}
        (Path(folder) / "card.json").write_text(json.dumps(content, indent=2, default=str) + "\n")
        for item in written:
            os.replace(Path(folder) / item.path.name, item.path)
        os.replace(Path(folder) / "card.json", output.with_suffix(".json"))
    return written


def _labels(part: Part) -> list[str]:
    """Names of all free axes of a part."""
    return list(dict.fromkeys(label for axes in part.axes.values() for label in axes.values()))


def _trace(part: Part, batch: int | None, about: str) -> torch.export.ExportedProgram:
    """The part as a graph; axes are free where the model allows it."""
    inputs = part.draw(batch or EXAMPLE_BATCH, part.lengths[0] if part.lengths else 0)
    free = {} if batch else part.axes
    shapes: Any = tuple(
        {axis: torch.export.Dim.AUTO for axis in free.get(name, {})} or None for name in inputs
    )
    names = list(inputs)
    if _takes_anything(part.module):
        shapes = (shapes,)
    try:
        with _quiet(), torch.no_grad():
            return torch.export.export(part.module, tuple(inputs.values()), dynamic_shapes=shapes)
    except Exception as error:  # whatever the tracer or the traced code raises
        where = re.findall(r'File "[^"]*?((?:zoo|kernels)/[^"]+)", line (\d+)', str(error))
        place = f" at {where[-1][0]}:{where[-1][1]}" if where else ""
        raise ExportError(
            f"{about}: torch.export cannot trace inputs {', '.join(names)}{place}: {_first_line(error)}"
        ) from error


def _takes_anything(module: nn.Module) -> bool:
    """Whether `forward` takes `*inputs`, which torch.export counts as one argument."""
    import inspect

    parameters = inspect.signature(module.forward).parameters.values()
    return any(p.kind is p.VAR_POSITIONAL for p in parameters)


def _placeholders(program: torch.export.ExportedProgram) -> list[Tensor]:
    values = {node.name: node.meta["val"] for node in program.graph.nodes if node.op == "placeholder"}
    return [values[name] for name in program.graph_signature.user_inputs]


def _fixed(program: torch.export.ExportedProgram, part: Part) -> tuple[str, ...]:
    """Labels of axes that the trace has turned into numbers."""
    found = []
    for value, axes in zip(_placeholders(program), _axes(part), strict=True):
        found += [label for axis, label in axes.items() if isinstance(value.shape[axis], int)]
    return tuple(dict.fromkeys(found))


def _axes(part: Part) -> list[dict[int, str]]:
    return [part.axes.get(name, {}) for name in part.draw(1, part.lengths[0] if part.lengths else 0)]


def _write(
    program: torch.export.ExportedProgram,
    part: Part,
    path: Path,
    format: str,
    fixed: tuple[str, ...],
    about: str,
) -> None:
    if format == "torch_export":
        torch.export.save(program, path)
        return
    _need("onnx", "onnxscript", "onnxruntime")
    names = list(part.draw(1, part.lengths[0] if part.lengths else 0))
    try:
        with _quiet():
            found = torch.onnx.export(
                program, dynamo=True, input_names=names, output_names=list(part.outputs), verbose=False
            )
            labels = {
                value.shape[axis]: label
                for value, axes in zip(found.model.graph.inputs, _axes(part), strict=True)
                for axis, label in axes.items()
                if label not in fixed
            }
            found.rename_axes(labels)
            found.save(path, external_data=False)
    except Exception as error:  # the converter's errors have no common public class
        operators = re.findall(r"(?:aten|zoo)[.:]+\w+(?:\.\w+)?", _chain(error))
        reason = f"operator {operators[0]} has no form in ONNX" if operators else _first_line(error)
        raise ExportError(f"{about}: {reason}; --format torch_export does not need one") from error


def _compare(
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
                    f"{about}: the program does not run with batch {size}, length {length}: {_first_line(error)}"
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
        with _quiet():
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


def _describe(
    part: Part, program: torch.export.ExportedProgram, fixed: tuple[str, ...], path: Path, difference: float
) -> dict[str, Any]:
    """The card's entry of one program."""
    inputs, ranges = [], {}
    names = part.draw(1, part.lengths[0] if part.lengths else 0)
    for name, value, axes in zip(names, _placeholders(program), _axes(part), strict=True):
        shape: list[int | str] = []
        for axis, size in enumerate(value.shape):
            label = axes.get(axis)
            shape.append(size if label is None or label in fixed else label)
            if isinstance(shape[-1], str):
                limit = program.range_constraints.get(size.node.expr)
                ranges[label] = _limits(limit) if limit is not None else "any"
        inputs.append({"name": name, "dtype": str(value.dtype).removeprefix("torch."), "shape": shape})
    return {
        "part": part.name or "model",
        "inputs": inputs,
        "outputs": list(part.outputs),
        "ranges": ranges,
        "notes": part.notes,
        "sha256": sha256(path),
        "bytes": path.stat().st_size,
        "largest_difference": difference,
    }


def _limits(limit: Any) -> str:
    # Traces call 2 the least size of every free axis; one is among the sizes that are compared.
    low, high = int(limit.lower), float(limit.upper)
    low = low if low > 2 else 1
    return f"{low} .. {high:.0f}" if high < 2**31 else f"from {low}"


def _need(*packages: str) -> None:
    import importlib.util

    absent = [p for p in packages if importlib.util.find_spec(p) is None]
    if absent:
        raise ConfigError(
            f"export to ONNX needs {', '.join(absent)}: pip install 'attention-zoo[export]' (torch_export needs nothing)"
        )


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__


def _chain(error: BaseException | None) -> str:
    parts = []
    while error is not None:
        parts.append(str(error))
        error = error.__cause__ or error.__context__
    return "\n".join(parts)


class _quiet:
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


__all__ = ["ExportError", "Exported", "export"]
