"""Any table that a user brings: one CSV, TSV or Parquet file, or the folder layout of RTDL and TabM."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data import register_data
from data.base import SPLITS, DataError
from data.tabular_table import TabularData
from zoo.errors import closest
from zoo.files import read_arrays
from zoo.tabular.columns import MISSING_WORDS, check_columns, is_missing, read_table

if TYPE_CHECKING:
    import pandas as pd

_RTDL_KINDS = {"regression": "regression", "binclass": "binary", "multiclass": "multiclass"}


@register_data("table")
class TableData(TabularData):
    """A file with a target column, or a folder of ``.npy`` arrays with ``info.json``.

    The schema is guessed from the training rows and printed; `columns` and `target_kind` override it.

    Args:
        path: File or folder.
        target: Column to predict, or several.
        columns: Kind by column: numerical, categorical or ignore.
        target_kind: Kind by target: binary, multiclass or regression.
        split_column: Column that says train, val or test; left out of the inputs. Null splits at random.
        missing_words: Words that stand for a missing value in text files.
        rare_classes: Classes without training row: "error", or "drop" their rows.
        drop_missing_target: Leave out rows without a target instead of refusing them.
        show_schema: Print the schema.
        common: Options of :class:`data.tabular_table.TabularData`.
    """

    def __init__(
        self,
        *,
        path: str | None = None,
        target: str | Sequence[str] | None = None,
        columns: Mapping[str, str] | None = None,
        target_kind: Mapping[str, str] | None = None,
        split_column: str | None = None,
        missing_words: Sequence[str] = MISSING_WORDS,
        rare_classes: str = "error",
        drop_missing_target: bool = False,
        show_schema: bool = True,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        if path is None:
            raise DataError(
                "data=table needs data.path=<file.csv | file.parquet | folder> and data.target=<column>"
            )
        if rare_classes not in ("error", "drop"):
            raise DataError(f"data.rare_classes={rare_classes!r}: choose error or drop")
        self.path = Path(path).expanduser()
        self.target = [target] if isinstance(target, str) else list(target or ())
        self.columns, self.target_kind = dict(columns or {}), dict(target_kind or {})
        self.split_column, self.missing_words = split_column, tuple(missing_words)
        self.rare_classes, self.drop_missing_target, self.show_schema = (
            rare_classes,
            drop_missing_target,
            show_schema,
        )
        self._given: np.ndarray | None = None

    def read(self) -> pd.DataFrame:
        """Read the file or the folder, and set rows without a target aside."""
        if self.path.is_dir():
            frame, self._given = self._read_folder()
        else:
            frame = read_table(self.path, missing_words=self.missing_words)
            if not self.target:
                raise DataError(f"data.target is not set; columns: {', '.join(map(str, frame.columns[:30]))}")
        check_columns(frame, self.target, "target")
        if self.split_column:
            check_columns(frame, [self.split_column], "split column")
            self._given = frame.pop(self.split_column).astype(str).str.strip().to_numpy()
        check_columns(frame, list(self.columns), "schema column")
        keep = self._kept_rows(frame)
        if self._given is not None:
            self._given = self._given[keep]
        return frame[keep]

    def _kept_rows(self, frame: pd.DataFrame) -> np.ndarray:
        keep = np.ones(len(frame), bool)
        for name in self.target:
            empty = is_missing(frame[name])
            if empty.any() and not self.drop_missing_target:
                raise DataError(
                    f"target {name!r} is empty in {int(empty.sum())} of {len(frame)} rows (first: row "
                    f"{int(empty.argmax())}); fill them or set data.drop_missing_target=true"
                )
            keep &= ~empty
            if self.rare_classes == "drop" and self.target_kind.get(name) != "regression":
                counts = frame[name].map(frame[name].value_counts())
                numeric = frame[name].dtype.kind == "f"
                rare = (counts < 3).to_numpy() & (not numeric)
                keep &= ~rare
        if keep.sum() < len(frame):
            self.skipped = {
                f"{len(frame) - int(keep.sum())} rows": "no target, or a class with fewer than 3 rows"
            }
        return keep

    def _read_folder(self) -> tuple[pd.DataFrame, np.ndarray]:
        """N_<split>.npy (numbers), C_<split>.npy (words), y_<split>.npy and info.json with task_type."""
        import pandas as pd

        info = self.path / "info.json"
        if not info.is_file():
            raise DataError(
                f"{self.path} is a folder without info.json; give a file, or the layout of RTDL and TabM"
            )
        kind = json.loads(info.read_text()).get("task_type")
        if kind not in _RTDL_KINDS:
            near = closest(str(kind), _RTDL_KINDS) or list(_RTDL_KINDS)
            raise DataError(f"{info}: task_type {kind!r} is unknown; nearest: {', '.join(near)}")
        frames, given = [], []
        for split in SPLITS:
            parts = {}
            for prefix in ("N", "C", "y"):
                # TabM's newer layout calls them X_num, X_cat and Y.
                other = {"N": "X_num", "C": "X_cat", "y": "Y"}[prefix]
                for name in (f"{prefix}_{split}.npy", f"{other}_{split}.npy"):
                    if (self.path / name).is_file():
                        (parts[prefix],) = read_arrays(self.path / name)
                        break
            if "y" not in parts or not {"N", "C"} & set(parts):
                raise DataError(f"{self.path}: y_{split}.npy and N_{split}.npy or C_{split}.npy are needed")
            columns = {f"n{i}": parts["N"][:, i] for i in range(parts["N"].shape[1])} if "N" in parts else {}
            if "C" in parts:
                columns |= {f"c{i}": parts["C"][:, i].astype(str) for i in range(parts["C"].shape[1])}
            lengths = {len(v) for v in parts.values()}
            if len(lengths) > 1:
                raise DataError(f"{self.path}: the {split} arrays have different lengths {sorted(lengths)}")
            frames.append(pd.DataFrame({**columns, "y": parts["y"]}))
            given.append(np.full(len(parts["y"]), split))
        self.target = ["y"]
        self.target_kind = {"y": _RTDL_KINDS[kind]}
        self.columns = {c: "categorical" for c in frames[0] if c.startswith("c")} | self.columns
        return pd.concat(frames, ignore_index=True), np.concatenate(given)

    def split(self, frame: pd.DataFrame) -> dict[str, np.ndarray]:
        """The splits that the source gives, or random ones."""
        if self._given is None:
            return super().split(frame)
        names = {"valid": "val", "validation": "val", "dev": "val"}
        given = np.array([names.get(g, g) for g in self._given])
        strange = sorted(set(given) - set(SPLITS))
        if strange:
            raise DataError(
                f"split column {self.split_column!r} holds {str(strange[0])!r}; write train, val or test"
            )
        found = {split: np.flatnonzero(given == split) for split in SPLITS}
        # Files are often sorted, and a bank of training rows takes the first ones.
        order = np.random.RandomState(self.split_seed).permutation(found["train"])
        count = 0
        if not len(found["val"]):  # many sources give train and test alone
            count = max(1, round(len(order) * self.val_fraction))
            found["val"] = order[:count]
        found["train"] = order[count:]
        return found

    def preprocessing(self) -> dict[str, Any]:
        """As the base class; with the words that will mean a missing value in files to predict, too."""
        return {**super().preprocessing(), "missing_words": list(self.missing_words)}

    def make_schema(self, frame: pd.DataFrame, train: pd.DataFrame) -> Any:
        """As the base class; printed."""
        schema = super().make_schema(frame, train)
        if self.show_schema:
            print(f"schema of {self.path.name}, {len(frame):,} rows\n{schema.describe()}", flush=True)
        return schema

    def target_columns(self) -> list[str]:
        """What the user named."""
        return self.target

    def column_kinds(self) -> Mapping[str, str]:
        """What the user fixed."""
        return self.columns

    def target_kinds(self) -> Mapping[str, str]:
        """What the user or the folder fixed."""
        return self.target_kind
