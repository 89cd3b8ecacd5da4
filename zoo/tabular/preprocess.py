"""From a table to tensors-to-be: fitted on training rows only, plain values afterwards."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import numpy as np

from zoo.errors import ConfigError, DataError
from zoo.tabular.bins import bin_edges
from zoo.tabular.columns import as_numbers, as_words, check_columns
from zoo.tabular.schema import Schema

if TYPE_CHECKING:
    import pandas as pd

NORMALISATIONS = ("quantile", "standard", "none")
MISSING_WORD = "<missing>"
NOISE = 1e-5
_PLAIN_NUMBER = re.compile(r"[+-]?\d+(\.\d*)?", re.ASCII)


class Preprocessor:
    """Encodes the input columns of a schema, and its targets.

    Numerical columns: quantile transform to a normal (or standardised), the training median where missing, and a
    mask of the missing places. Categorical columns: 1, 2, ... for the words seen in training, a missing value being a
    word of its own, and 0 for any other.

    Args:
        schema: Columns by role.
        normalisation: "quantile", "standard" or "none".
        missing: "embedding" gives the model a mask, "indicator" adds a two-valued column per column with gaps.
        bins: "tree" or "quantile" edges for piecewise-linear embeddings.
        num_bins: Largest number of bins per column.
        min_category_count: Words rarer than this in training count as unknown.
        seed: Of the noise that separates ties and of the trees.
    """

    def __init__(
        self,
        schema: Schema,
        *,
        normalisation: str = "quantile",
        missing: str = "embedding",
        bins: str = "tree",
        num_bins: int = 48,
        min_category_count: int = 1,
        seed: int = 0,
    ) -> None:
        if normalisation not in NORMALISATIONS:
            raise ConfigError(
                f"data.normalisation={normalisation!r}: choose from {', '.join(NORMALISATIONS)}"
            )
        if missing not in ("embedding", "indicator"):
            raise ConfigError(f"data.missing={missing!r}: choose embedding or indicator")
        self.schema = schema
        self.options = {
            "normalisation": normalisation,
            "missing": missing,
            "bins": bins,
            "num_bins": num_bins,
            "min_category_count": min_category_count,
            "seed": seed,
        }
        self.fill: list[float] = []
        self.points: list[list[float]] = []  # quantiles, or [mean, std]
        self.words: list[list[str]] = []
        self.gaps: list[str] = []
        self.edges: list[list[float]] = []

    # ---------------------------------------------------------------- fitting

    def fit(self, frame: pd.DataFrame) -> Preprocessor:
        """Learn everything from the training rows `frame`, targets included."""
        self._fit_targets(frame)
        seed, schema = self.options["seed"], self.schema
        raw = self._numbers(frame)
        self.fill = [float(np.nanmedian(c)) if not np.isnan(c).all() else 0.0 for c in raw.T]
        self.points = [self._fit_column(c, np.random.RandomState(seed + i)) for i, c in enumerate(raw.T)]
        self.gaps = [n for n, c in zip(schema.numerical, raw.T, strict=True) if np.isnan(c).any()]
        self.words = [self._fit_words(as_words(frame[name])) for name in schema.categorical]
        goal = self._tree_targets(frame)
        encoded, missing = self._encode_numbers(raw)
        self.edges = [
            bin_edges(
                np.where(m, np.nan, c).astype(np.float64),
                goal,
                method=self.options["bins"],
                num_bins=self.options["num_bins"],
                seed=seed,
            )
            for c, m in zip(encoded.T, missing.T, strict=True)
        ]
        return self

    def _fit_targets(self, frame: pd.DataFrame) -> None:
        check_columns(frame, [t.name for t in self.schema.targets], "target")
        for target in self.schema.targets:
            values = self.encode_target(frame, target)
            if target.kind == "regression":
                target.mean, target.std = float(values.mean()), float(values.std()) or 1.0
            else:
                target.counts = np.bincount(values.astype(int), minlength=len(target.classes)).tolist()

    def _fit_column(self, column: np.ndarray, draw: np.random.RandomState) -> list[float]:
        kept = column[~np.isnan(column)]
        if not len(kept):
            return [0.0, 1.0]
        if self.options["normalisation"] != "quantile":
            return [float(kept.mean()), float(kept.std()) or 1.0]
        from sklearn.preprocessing import QuantileTransformer

        # Tiny noise spreads ties over their share of the ranks, as in the authors' preprocessing; only for fitting.
        noisy = kept + draw.normal(0.0, 1.0, len(kept)) * NOISE * (kept.std() or 1.0)
        transformer = QuantileTransformer(
            n_quantiles=max(min(len(kept) // 30, 1000), min(10, len(kept))),
            output_distribution="normal",
            subsample=1_000_000_000,
            random_state=draw,
        )
        return transformer.fit(noisy[:, None]).quantiles_[:, 0].tolist()

    def _fit_words(self, words: np.ndarray) -> list[str]:
        filled = np.where(words == None, MISSING_WORD, words).astype(str)  # noqa: E711
        names, counts = np.unique(filled, return_counts=True)
        return [str(n) for n, c in zip(names, counts, strict=True) if c >= self.options["min_category_count"]]

    def _tree_targets(self, frame: pd.DataFrame) -> np.ndarray:
        parts = []
        for target in self.schema.targets:
            values = self.encode_target(frame, target)
            if target.kind == "regression":
                parts.append(((values - target.mean) / target.std)[:, None])
            elif target.kind == "binary":
                parts.append(values[:, None])
            else:
                parts.append(np.eye(len(target.classes))[values.astype(int)])
        return np.concatenate(parts, 1)

    # ---------------------------------------------------------------- encoding

    def encode(self, frame: pd.DataFrame) -> dict[str, np.ndarray]:
        """Encode the input columns; others are ignored.

        Returns:
            numerical float32 [N, Fn], missing bool [N, Fn], categorical int64 [N, Fc].

        Raises:
            DataError: A column is absent, or a numerical one holds a word or an infinite value.
        """
        check_columns(frame, self.schema.inputs, "input column")
        raw = self._numbers(frame)
        numerical, missing = self._encode_numbers(raw)
        codes = [
            self._codes(as_words(frame[n]), w)
            for n, w in zip(self.schema.categorical, self.words, strict=True)
        ]
        if self.options["missing"] == "indicator":
            places = [self.schema.numerical.index(n) for n in self.gaps]
            codes += [missing[:, p].astype(np.int64) + 1 for p in places]
            missing = np.zeros_like(missing)
        categorical = np.stack(codes, 1) if codes else np.zeros((len(frame), 0), np.int64)
        return {"numerical": numerical, "missing": missing, "categorical": categorical}

    def _numbers(self, frame: pd.DataFrame) -> np.ndarray:
        columns = [as_numbers(frame[name]) for name in self.schema.numerical]
        return np.stack(columns, 1) if columns else np.zeros((len(frame), 0))

    def _encode_numbers(self, raw: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        missing = np.isnan(raw)
        for i, name in enumerate(self.schema.numerical):
            if name not in self.gaps:  # nothing was learned about a gap here: the median stands in
                missing[:, i] = False
        filled = np.where(np.isnan(raw), np.array(self.fill)[None], raw) if raw.shape[1] else raw
        kind, out = self.options["normalisation"], np.empty(raw.shape, np.float32)
        for i, points in enumerate(self.points):
            if kind == "quantile" and len(points) > 2:
                out[:, i] = quantile_normal(filled[:, i], np.array(points))
            elif kind == "none":
                out[:, i] = filled[:, i]
            else:
                out[:, i] = (filled[:, i] - points[0]) / (points[1] if kind == "standard" else 1.0)
        return out, missing

    @staticmethod
    def _codes(words: np.ndarray, known: list[str]) -> np.ndarray:
        table = {w: i + 1 for i, w in enumerate(known)}
        # Whether pandas reads a column as text or as numbers depends on the other rows of a file: 007, 7 and 7.0 are one word,
        # unless training told them apart.
        counts = Counter(map(_plain_number, known))
        alike = {_plain_number(w): code for w, code in table.items() if counts[_plain_number(w)] == 1}
        alike[None] = 0
        filled = (MISSING_WORD if w is None else w for w in words)
        codes = [table.get(w) or alike.get(_plain_number(w), 0) for w in filled]
        return np.array(codes, dtype=np.int64)

    def encode_target(self, frame: pd.DataFrame, target: Any) -> np.ndarray:
        """One target as float64 [N]: class numbers, or values on their own scale.

        Raises:
            DataError: A missing value, or a class that the schema does not have.
        """
        if target.kind == "regression":
            values = as_numbers(frame[target.name])
            if np.isnan(values).any():
                raise DataError(
                    f"target {target.name!r} has no value in row {int(np.isnan(values).argmax())}"
                )
            return values
        table = {w: i for i, w in enumerate(target.classes)}
        words = as_words(frame[target.name])
        for row, word in enumerate(words):
            if word not in table:
                raise DataError(
                    f"target {target.name!r}: row {row} holds {word!r}; the classes are {', '.join(target.classes[:20])}"
                )
        return np.array([table[w] for w in words], dtype=np.float64)

    # ---------------------------------------------------------------- what models need

    @property
    def feature_names(self) -> list[str]:
        """Names of the model's columns: numerical, categorical, then the indicators of gaps."""
        extra = [f"{n} is missing" for n in self.gaps] if self.options["missing"] == "indicator" else []
        return [*self.schema.inputs, *extra]

    @property
    def cardinalities(self) -> list[int]:
        """Codes of each categorical column, 0 (unknown) included."""
        extra = [3] * len(self.gaps) if self.options["missing"] == "indicator" else []
        return [len(w) + 1 for w in self.words] + extra

    # ---------------------------------------------------------------- storing

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a card; `from_dict` gives an equal preprocessor."""
        fields = ("fill", "points", "words", "gaps", "edges")
        return {
            "schema": self.schema.to_dict(),
            "options": dict(self.options),
            **{f: getattr(self, f) for f in fields},
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Preprocessor:
        new = cls(Schema.from_dict(content["schema"]), **content["options"])
        for name in ("fill", "points", "words", "gaps", "edges"):
            setattr(new, name, content[name])
        return new


def _plain_number(word: str) -> Decimal | None:
    return Decimal(word) if _PLAIN_NUMBER.fullmatch(word) else None


def quantile_normal(x: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Map values to a normal through their quantiles, as scikit-learn's QuantileTransformer does.

    Args:
        x: Values [N].
        points: Quantiles at evenly spaced levels 0 .. 1, ascending [Q].
    """
    from scipy.stats import norm

    levels = np.linspace(0, 1, len(points))
    # Where a quantile repeats, the mean of interpolating from the left and from the right is the middle of its levels.
    up = np.interp(x, points, levels)
    down = -np.interp(-x, -points[::-1], -levels[::-1])
    level = 0.5 * (up + down)
    level[x <= points[0]], level[x >= points[-1]] = 0.0, 1.0
    limit = 1e-7
    return norm.ppf(level.clip(limit, 1 - limit)).clip(-5.2, 5.2)
