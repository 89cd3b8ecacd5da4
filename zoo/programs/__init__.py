"""Trained models as programs that run without this package: ONNX files and torch.export archives.

Every file is compared with the model on fresh random inputs of several batch sizes before it appears under its name, and a JSON
card beside it says how to prepare the input and what the labels are.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zoo.errors import ConfigError, unknown
from zoo.pretrained.weights import load_model, sha256
from zoo.programs.compare import ExportError, compare, first_line, quiet
from zoo.programs.forms import parts_of
from zoo.programs.parts import BATCH, Part

SUFFIXES = {"onnx": ".onnx", "torch_export": ".pt2"}
TOLERANCE = 1e-4
# A prime that no layer has as a width: a trace decides "is the batch as wide as that?" by its example.
EXAMPLE_BATCH = 13


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
    drafts = tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.stem}.")
    # Seeded, so that an export is accepted or refused alike every time.
    with drafts as folder, torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        written, programs = [], {}
        for part in parts_of(model, card):
            file = output.with_suffix(f".{part.name}{output.suffix}") if part.name else output
            program = _trace(part, batch, about)
            fixed = _fixed(program, part) if batch is None else tuple(part.labels)
            if BATCH in fixed and batch is None:
                raise ExportError(f"{about} ties its program to one batch size; give one with --batch N")
            draft = Path(folder) / file.name
            _write(program, part, draft, format, fixed, about)
            difference = compare(part, draft, format, batch, fixed, tolerance, about)
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


def _trace(part: Part, batch: int | None, about: str) -> torch.export.ExportedProgram:
    """The part as a graph; axes are free where the model allows it, the batch before all."""
    inputs = part.example(batch or EXAMPLE_BATCH)
    labels = [] if batch else part.labels
    attempts = [labels, [BATCH]] if labels not in ([], [BATCH]) else [labels]
    with quiet(), torch.no_grad():
        # Fills the models' caches of tables: filled by a trace, they would keep its tensors without values.
        part.module(*inputs.values())
        for wanted in attempts:
            free = tuple(
                {a: torch.export.Dim.AUTO for a, label in part.axes.get(name, {}).items() if label in wanted}
                or None
                for name in inputs
            )
            shapes: Any = (free,) if _takes_anything(part.module) else free
            try:
                return torch.export.export(part.module, tuple(inputs.values()), dynamic_shapes=shapes)
            except Exception as error:  # whatever the tracer or the traced code raises
                failure = error
    found = re.findall(r'File "[^"]*?((?:zoo|kernels)/[^"]+)", line (\d+)', str(failure))
    place = f" at {found[-1][0]}:{found[-1][1]}" if found else ""
    raise ExportError(
        f"{about}: torch.export cannot trace inputs {', '.join(inputs)}{place}: {first_line(failure)}"
    ) from failure


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
    return [part.axes.get(name, {}) for name in part.example()]


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
    names = list(part.example())
    try:
        with quiet():
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
        reason = f"operator {operators[0]} has no form in ONNX" if operators else first_line(error)
        raise ExportError(f"{about}: {reason}; --format torch_export does not need one") from error


def _describe(
    part: Part, program: torch.export.ExportedProgram, fixed: tuple[str, ...], path: Path, difference: float
) -> dict[str, Any]:
    """The card's entry of one program."""
    inputs, ranges = [], {}
    for name, value, axes in zip(part.example(), _placeholders(program), _axes(part), strict=True):
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
            f"export to ONNX needs {', '.join(absent)}: pip install -e '.[export]' (torch_export needs nothing)"
        )


def _chain(error: BaseException | None) -> str:
    parts = []
    while error is not None:
        parts.append(str(error))
        error = error.__cause__ or error.__context__
    return "\n".join(parts)


__all__ = ["ExportError", "Exported", "export"]
