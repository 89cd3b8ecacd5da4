"""Which columns of a table are inputs, of which kind, and which are targets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from zoo.errors import DataError
from zoo.tabular.columns import as_numbers, as_words, check_columns, check_names, is_missing

if TYPE_CHECKING:
    import pandas as pd

KINDS = ("numerical", "categorical", "ignore")
TARGET_KINDS = ("binary", "multiclass", "regression")
FEW_VALUES = 20
"""Whole-number targets with at most this many values are classes."""


@dataclass
class Target:
    """One thing to predict.

    Attributes:
        name: Column.
        kind: "binary", "multiclass" or "regression".
        classes: Labels in the order of the model's outputs; empty for regression.
        mean, std: Of the training rows, regression only: the model predicts (value - mean) / std.
        counts: Training rows of each class.
    """

    name: str
    kind: str
    classes: list[str] = field(default_factory=list)
    mean: float = 0.0
    std: float = 1.0
    counts: list[int] = field(default_factory=list)

    @property
    def outputs(self) -> int:
        """Numbers that the model predicts for this target."""
        return len(self.classes) if self.kind == "multiclass" else 1


@dataclass
class Schema:
    """Columns by role, in the order in which the model sees them.

    Attributes:
        numerical, categorical: Input columns.
        targets: What to predict.
        ignored: Columns left out and why.
        notes: What the user should know about the guesses that were made.
    """

    numerical: list[str]
    categorical: list[str]
    targets: list[Target]
    ignored: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def inputs(self) -> list[str]:
        return [*self.numerical, *self.categorical]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a card."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Schema:
        return cls(**{**content, "targets": [Target(**t) for t in content["targets"]]})

    def describe(self) -> str:
        """One line per role, for printing."""
        lines = [
            f"numerical ({len(self.numerical)}): {', '.join(self.numerical) or '-'}",
            f"categorical ({len(self.categorical)}): {', '.join(self.categorical) or '-'}",
        ]
        for t in self.targets:
            lines.append(
                f"target: {t.name} ({t.kind}{', ' + ' | '.join(t.classes[:8]) if t.classes else ''})"
            )
        lines += [f"ignored: {name} ({why})" for name, why in self.ignored.items()]
        return "\n".join([*lines, *(f"note: {n}" for n in self.notes)])


def infer_schema(
    frame: pd.DataFrame,
    targets: Sequence[str],
    *,
    columns: Mapping[str, str] | None = None,
    target_kinds: Mapping[str, str] | None = None,
) -> Schema:
    """Guess each column's kind from its values.

    Args:
        frame: Training rows, or a sample of them.
        targets: Columns to predict.
        columns: Kinds that the user fixes: numerical, categorical or ignore, by column.
        target_kinds: Kinds of targets that the user fixes: binary, multiclass or regression.

    Raises:
        DataError: Repeated or absent columns, an unknown kind, or a target that cannot be predicted.
    """
    columns, target_kinds = dict(columns or {}), dict(target_kinds or {})
    check_names(list(map(str, frame.columns)), "table")
    if not targets:
        raise DataError("no target column was named; set data.target")
    check_columns(frame, targets, "target")
    check_names(list(targets), "targets")
    check_columns(frame, list(columns), "schema column")
    for name in target_kinds:
        if name not in targets:
            raise DataError(f"a kind is given for target {name!r}; the targets are {', '.join(targets)}")
    for name, kind in columns.items():
        if kind not in KINDS:
            raise DataError(
                f"schema: kind {kind!r} of column {name!r} is unknown; choose from {', '.join(KINDS)}"
            )
        if name in targets and kind != "ignore":
            raise DataError(f"schema: column {name!r} is a target and cannot be an input too")
    schema = Schema([], [], [])
    for name in map(str, frame.columns):
        if name in targets:
            continue
        kind, why = _guess(frame[name], columns.get(name))
        if kind == "ignore":
            schema.ignored[name] = why
        else:
            getattr(schema, kind).append(name)
            if why:
                schema.notes.append(f"{name}: {why}")
    if not schema.inputs:
        raise DataError(f"no input column is left; ignored: {schema.ignored}")
    schema.targets = [_target(frame[name], target_kinds.get(name)) for name in targets]
    return schema


def _guess(column: pd.Series, wanted: str | None) -> tuple[str, str]:
    if wanted == "ignore":
        return "ignore", "asked for"
    missing = is_missing(column)
    if missing.all():
        return "ignore", "no value in any row"
    present = column[~missing]
    distinct = present.astype(str).nunique()
    if distinct == 1 and not missing.any():
        return "ignore", "one value in all rows"
    if wanted:
        return wanted, ""
    if column.dtype.kind == "M":
        return "ignore", "a date: turn it into numbers"
    if column.dtype.kind == "b":
        return "categorical", ""
    if column.dtype.kind in "fiu":
        return "numerical", ""
    import pandas as pd

    parsed = pd.to_numeric(present, errors="coerce").notna()
    if parsed.all():
        return "numerical", "numbers stored as text"
    if distinct > 50 and distinct > 0.5 * len(present):
        return "ignore", f"{distinct} different words in {len(present)} rows: an identifier or free text"
    note = (
        f"{int(parsed.sum())} of {len(present)} values are numbers, the others words"
        if parsed.mean() > 0.5
        else ""
    )
    return "categorical", note


def _target(column: pd.Series, wanted: str | None) -> Target:
    name = str(column.name)
    if wanted is not None and wanted not in TARGET_KINDS:
        raise DataError(f"target {name!r}: kind {wanted!r} is unknown; choose from {', '.join(TARGET_KINDS)}")
    present = column[~is_missing(column)]
    distinct = present.astype(str).nunique()
    if distinct < 2:
        raise DataError(f"target {name!r} has {distinct} distinct value(s); there is nothing to predict")
    numeric = column.dtype.kind in "fiu"
    whole = numeric and bool((present == present.round()).all())
    kind = wanted
    if kind is None:
        if distinct == 2:
            kind = "binary"
        elif numeric and not (whole and distinct <= FEW_VALUES):
            kind = "regression"
        else:
            kind = "multiclass"
    if kind == "regression":
        as_numbers(column)
        return Target(name, kind)
    classes = sorted(set(as_words(present)), key=lambda w: (float(w), w) if numeric else (0.0, w))
    if kind == "binary" and len(classes) != 2:
        raise DataError(
            f"target {name!r} has {len(classes)} classes, a binary one has 2; declare it multiclass"
        )
    if len(classes) > 0.5 * len(present):
        raise DataError(
            f"target {name!r} has {len(classes)} classes in {len(present)} rows; is it a number stored as text, or "
            "an identifier? declare its kind in data.target_kind"
        )
    return Target(name, kind, classes)
