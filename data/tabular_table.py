"""Tables that fit in memory: schema, split, encoding fitted on training rows, batches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from data import tabular_baselines
from data.base import SPLITS, DataError, SplitDataset, ZooData, check_range, hash_arrays
from data.sampler import BatchKey
from zoo.tabular.preprocess import Preprocessor
from zoo.tabular.schema import Schema, Target, infer_schema

if TYPE_CHECKING:
    import pandas as pd


class TabularData(ZooData):
    """Base of all tables.

    Batches: ``numerical`` float32 [B, Fn], ``categorical`` int64 [B, Fc], ``missing`` bool [B, Fn] (only where the
    training rows have gaps), ``target`` float32 [B, T] (class numbers; standardised values), ``index`` int64 [B].

    Args:
        normalisation: "quantile", "standard" or "none"; fitted on the training rows.
        missing: "embedding" (a mask for the model) or "indicator" (a column per column with gaps).
        bins: Edges for piecewise-linear embeddings: "tree" (split points that help the targets) or "quantile".
        num_bins: Largest number of bins per column.
        min_category_count: Words rarer than this in training count as never seen.
        val_fraction, test_fraction: Shares of the rows.
        baseline_models: "all", "fast" (no boosting library beyond scikit-learn) or "none".
        common: Options of :class:`data.base.ZooData`.
    """

    kind: ClassVar[str] = "tabular"

    def __init__(
        self,
        *,
        batch_size: int = 256,
        eval_batch_size: int = 2048,
        normalisation: str = "quantile",
        missing: str = "embedding",
        bins: str = "tree",
        num_bins: int = 48,
        min_category_count: int = 1,
        val_fraction: float = 0.15,
        test_fraction: float = 0.15,
        baseline_models: str = "all",
        **common: Any,
    ) -> None:
        super().__init__(batch_size=batch_size, eval_batch_size=eval_batch_size, **common)
        check_range(0.01, 0.9, val_fraction=val_fraction, test_fraction=test_fraction)
        if val_fraction + test_fraction > 0.95:
            raise DataError(
                f"data.val_fraction + data.test_fraction = {val_fraction + test_fraction} leaves no rows"
            )
        if baseline_models not in ("all", "fast", "none"):
            raise DataError(f"data.baseline_models={baseline_models!r}: choose all, fast or none")
        self.options = {
            "normalisation": normalisation,
            "missing": missing,
            "bins": bins,
            "num_bins": num_bins,
            "min_category_count": min_category_count,
        }
        self.val_fraction, self.test_fraction = val_fraction, test_fraction
        self.baseline_models = baseline_models
        self.frame: pd.DataFrame | None = None
        self.preprocessor: Preprocessor | None = None
        self.arrays: dict[str, np.ndarray] = {}
        self._splits: dict[str, np.ndarray] = {}

    # -- to be implemented -------------------------------------------------------------------------------

    def read(self) -> pd.DataFrame:
        """The whole table with its targets."""
        raise NotImplementedError

    def target_columns(self) -> list[str]:
        """Columns to predict."""
        raise NotImplementedError

    def column_kinds(self) -> Mapping[str, str]:
        """Kinds of columns that are not guessed: numerical, categorical or ignore."""
        return {}

    def target_kinds(self) -> Mapping[str, str]:
        """Kinds of targets that are not guessed: binary, multiclass or regression."""
        return {}

    def split(self, frame: pd.DataFrame) -> dict[str, np.ndarray]:
        """Row numbers of each split; by default a permutation with ``RandomState(split_seed)``."""
        n = len(frame)
        val, test = max(1, round(n * self.val_fraction)), max(1, round(n * self.test_fraction))
        if n - val - test < 2:
            raise DataError(
                f"data {self.name!r}: {n} rows are too few to train, validate and test; 4 are the least"
            )
        order = np.random.RandomState(self.split_seed).permutation(n)
        return dict(zip(SPLITS, np.split(order, [n - val - test, n - test]), strict=True))

    # -- loading -----------------------------------------------------------------------------------------

    def load(self) -> dict[str, Dataset]:
        """Read, split, infer the schema and fit the encoding on training rows, encode all rows."""
        frame = self.read().reset_index(drop=True)
        self._splits = self.split(frame)
        train = frame.iloc[self._splits["train"]]
        schema = self.make_schema(frame, train)
        self.preprocessor = Preprocessor(schema, **self.options, seed=self.split_seed).fit(train)
        self.arrays = self.preprocessor.encode(frame)
        self.arrays["target"] = np.stack([self._standard(frame, t) for t in schema.targets], 1).astype(
            np.float32
        )
        self.has_missing = bool(self.arrays["missing"].any())
        self.frame = frame
        self.labels = schema.targets[0].classes
        return {s: SplitDataset(len(rows), _Batches(self, rows)) for s, rows in self._splits.items()}

    def make_schema(self, frame: pd.DataFrame, train: pd.DataFrame) -> Schema:
        """Kinds of the inputs from the training rows; classes from all rows, each of which must occur in training."""
        kinds, columns = self.target_kinds(), self.column_kinds()
        names = self.target_columns()
        schema = infer_schema(train, names, columns=columns, target_kinds=kinds)
        everything = infer_schema(frame, names, columns=columns, target_kinds=kinds).targets
        for seen, full in zip(schema.targets, everything, strict=True):
            lost = [c for c in full.classes if c not in seen.classes]
            if seen.kind != full.kind and "regression" in (seen.kind, full.kind):
                raise DataError(
                    f"target {seen.name!r} looks like {seen.kind} in the training rows and like {full.kind} in all rows; "
                    f"say which with data.target_kind={{{seen.name}: {full.kind}}}"
                )
            if lost:
                raise DataError(
                    f"target {seen.name!r}: class {', '.join(map(repr, lost[:5]))} has no training row (of "
                    f"{len(frame)} rows in all); drop or merge such rare classes, or set data.rare_classes=drop"
                )
        return schema

    def _standard(self, frame: pd.DataFrame, target: Target) -> np.ndarray:
        values = self.preprocessor.encode_target(frame, target)
        return (values - target.mean) / target.std if target.kind == "regression" else values

    def batch(self, rows: np.ndarray, key: BatchKey) -> dict[str, Tensor]:
        """One batch of a split."""
        index = rows[key.indices]
        out = {
            name: torch.from_numpy(self.arrays[name][index])
            for name in ("numerical", "categorical", "target")
        }
        if self.has_missing:
            out["missing"] = torch.from_numpy(self.arrays["missing"][index])
        return {**out, "index": torch.from_numpy(key.indices)}

    # -- what models and tasks ask -----------------------------------------------------------------------

    @property
    def targets(self) -> list[Target]:
        """What is predicted."""
        self.setup()
        return self.preprocessor.schema.targets

    def model_arguments(self) -> dict[str, Any]:
        """Sizes that the table dictates to a model; plain values."""
        self.setup()
        p = self.preprocessor
        return {
            "num_numerical": len(p.schema.numerical),
            "cardinalities": p.cardinalities,
            "bins": p.edges,
            "outputs": [t.outputs for t in p.schema.targets],
        }

    def preprocessing(self) -> dict[str, Any]:
        """Schema, encoding and pinned order of the columns."""
        self.setup()
        return {"kind": "tabular", "features": self.preprocessor.feature_names, **self.preprocessor.to_dict()}

    # -- records -----------------------------------------------------------------------------------------

    def split_ids(self) -> dict[str, list[str]]:
        """Row numbers of the samples in the source."""
        self.setup()
        return {split: [str(i) for i in rows] for split, rows in self._splits.items()}

    def data_hash(self) -> str:
        """Hash of the encoded table, the split and the baselines' version and choice."""
        self.setup()
        return hash_arrays(
            *(self.arrays[k] for k in ("numerical", "categorical", "missing", "target")),
            *self._splits.values(),
            tabular_baselines.version(self.baseline_models),
        )

    def compute_baselines(self) -> dict[str, dict[str, float]]:
        """Majority or mean, logistic or ridge regression, boosted trees."""
        self.setup()
        return tabular_baselines.tabular_baselines(
            self.preprocessor.schema.targets,
            numbers=self.preprocessor._numbers(self.frame),
            codes=self.arrays["categorical"],
            values=self.arrays["target"],
            splits=self._splits,
            models=self.baseline_models,
        )

    def __getstate__(self) -> dict[str, Any]:
        """Workers need the arrays, not the table they came from."""
        return {**super().__getstate__(), "frame": None}


class _Batches:
    """Picklable ``key -> batch`` of one split."""

    def __init__(self, owner: TabularData, rows: np.ndarray) -> None:
        self.owner = owner
        self.rows = rows

    def __call__(self, key: BatchKey) -> dict[str, Tensor]:
        return self.owner.batch(self.rows, key)
