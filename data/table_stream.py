"""A table too big for memory: encoded piece by piece into arrays on disk, batches read from there.

Schema and encoding are fitted on a random sample of the training rows; two passes over the file, one to draw the
sample and one to encode. What stays in memory is the sample, one piece of the file and the order of the rows.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from filelock import FileLock
from torch.utils.data import Dataset

from data import carriers, register_data, tabular_baselines
from data.base import SPLITS, DataError, SplitDataset, check_at_least
from data.tabular_table import TabularData, _Batches
from zoo.tabular.columns import MISSING_WORDS, check_columns, check_header
from zoo.tabular.preprocess import Preprocessor
from zoo.tabular.schema import infer_schema

if TYPE_CHECKING:
    import pandas as pd


@register_data("table_stream")
class TableStreamData(TabularData):
    """As ``table``, for files that memory does not hold; CSV, TSV or Parquet.

    Args:
        path: File.
        target: Column to predict, or several.
        columns: Kind by column: numerical, categorical or ignore.
        target_kind: Kind by target: binary, multiclass or regression.
        sample_rows: Training rows that schema, encoding and baselines are fitted on.
        piece_rows: Rows read at once.
        scratch: Folder for the encoded arrays, about 5 bytes per number; null for the cache.
        common: Options of :class:`data.tabular_table.TabularData`.
    """

    def __init__(
        self,
        *,
        path: str | None = None,
        target: str | Sequence[str] | None = None,
        columns: Mapping[str, str] | None = None,
        target_kind: Mapping[str, str] | None = None,
        sample_rows: int = 50_000,
        piece_rows: int = 8192,
        scratch: str | None = None,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        if path is None or not target:
            raise DataError("data=table_stream needs data.path=<file> and data.target=<column>")
        check_at_least(100, sample_rows=sample_rows, piece_rows=piece_rows)
        self.path = Path(path).expanduser()
        self.target = [target] if isinstance(target, str) else list(target)
        self.columns, self.target_kind = dict(columns or {}), dict(target_kind or {})
        self.sample_rows, self.piece_rows = sample_rows, piece_rows
        self.scratch = Path(scratch).expanduser() if scratch else None
        self._sample_places = np.zeros(0, np.int64)
        self._sample: pd.DataFrame | None = None

    def pieces(self) -> Iterator[pd.DataFrame]:
        """The file in order, `piece_rows` rows at a time."""
        import pandas as pd

        name = self.path.name.lower()
        if not self.path.is_file():
            raise DataError(f"no table at {self.path}; give a .csv, .tsv or .parquet file")
        if name.endswith((".parquet", ".pq")):
            import pyarrow.parquet as pq

            # Without its own pool pyarrow keeps freed memory for later; a stream has no later.
            with pq.ParquetFile(self.path, memory_map=False, pre_buffer=False) as file:
                for batch in file.iter_batches(self.piece_rows):
                    yield batch.to_pandas()
        elif name.endswith((".csv", ".csv.gz", ".tsv", ".tsv.gz")):
            separator = "\t" if ".tsv" in name else ","
            check_header(self.path, separator)
            yield from pd.read_csv(
                self.path,
                sep=separator,
                na_values=list(MISSING_WORDS),
                keep_default_na=False,
                skipinitialspace=True,
                chunksize=self.piece_rows,
                low_memory=False,
            )
        else:
            raise DataError(f"{self.path.name}: unknown kind of table; give .csv, .tsv or .parquet")

    def _count(self) -> int:
        if self.path.name.lower().endswith((".parquet", ".pq")) and self.path.is_file():
            import pyarrow.parquet as pq

            return pq.read_metadata(self.path).num_rows
        return sum(len(piece) for piece in self.pieces())

    def load(self) -> dict[str, Dataset]:
        """Split by row number, sample, fit, encode to disk."""
        import pandas as pd

        rows = self._count()
        self._splits = self.split(range(rows))
        train = self._splits["train"]
        draw = np.random.RandomState(self.split_seed)
        places = np.sort(draw.choice(train, min(self.sample_rows, len(train)), replace=False))
        kept, start = [], 0
        for piece in self.pieces():
            check_columns(piece, self.target, "target")
            inside = (
                places[np.searchsorted(places, start) : np.searchsorted(places, start + len(piece))] - start
            )
            kept.append(piece.iloc[inside])
            start += len(piece)
        self._sample, self._sample_places = pd.concat(kept, ignore_index=True), places
        schema = infer_schema(self._sample, self.target, columns=self.columns, target_kinds=self.target_kind)
        self.preprocessor = Preprocessor(schema, **self.options, seed=self.split_seed).fit(self._sample)
        self.arrays = self._encode(rows)
        self.has_missing = bool(self.preprocessor.gaps) and self.options["missing"] == "embedding"
        self.labels = schema.targets[0].classes
        return {s: SplitDataset(len(r), _Batches(self, r)) for s, r in self._splits.items()}

    def _encode(self, rows: int) -> dict[str, np.ndarray]:
        p = self.preprocessor
        widths = {
            "numerical": (np.float32, len(p.schema.numerical)),
            "missing": (np.bool_, len(p.schema.numerical)),
            "categorical": (np.int64, len(p.cardinalities)),
            "target": (np.float32, len(p.schema.targets)),
        }
        folder = (self.scratch or carriers.cache_dir() / "streams") / self._key()
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):  # processes of one run, or jobs side by side
            if not (folder / "done").exists():
                self._write(folder, widths)
        return {
            key: np.memmap(folder / f"{key}.bin", kind, "r", shape=(rows, width))
            if width
            else np.zeros((rows, 0), kind)
            for key, (kind, width) in widths.items()
        }

    def _write(self, folder: Path, widths: dict[str, tuple[type, int]]) -> None:
        """Encode the whole file into `folder`; the file `done` says that it is complete."""
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        files = {k: (folder / f"{k}.bin").open("wb") for k in widths}
        try:
            start = 0
            for piece in self.pieces():
                try:
                    found = self.preprocessor.encode(piece)
                    targets = self.preprocessor.schema.targets
                    found["target"] = np.stack([self._standard(piece, t) for t in targets], 1)
                except DataError as error:  # its row numbers count from the piece's first
                    raise DataError(
                        f"{self.path}, rows {start} to {start + len(piece) - 1}: {error}"
                    ) from None
                start += len(piece)
                for key, (kind, _) in widths.items():
                    files[key].write(np.ascontiguousarray(found[key], dtype=kind).data)
        finally:
            for file in files.values():
                file.close()
        (folder / "done").touch()

    def _key(self) -> str:
        """Names the encoded arrays: the file as it is now and everything that the encoding depends on."""
        stat = self.path.stat()
        content = [str(self.path.resolve()), stat.st_size, stat.st_mtime_ns, self.preprocessor.to_dict()]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:24]

    def target_columns(self) -> list[str]:
        """What the user named."""
        return self.target

    def data_hash(self) -> str:
        """Hash of the file's stamp, the encoding, the split and the baselines' version."""
        self.setup()
        record = [
            self._key(),
            self.split_seed,
            self.sample_rows,
            tabular_baselines.version(self.baseline_models),
        ]
        return hashlib.sha256(json.dumps(record).encode()).hexdigest()

    def split_ids(self) -> dict[str, list[str]]:
        """Too many to name: a split is known by its seed and its sizes."""
        self.setup()
        return {s: [f"{len(self._splits[s])} rows of RandomState({self.split_seed})"] for s in SPLITS}

    def split_record(self) -> dict[str, Any]:
        """As in the base class, with the true sizes."""
        return {**super().split_record(), "sizes": {s: len(rows) for s, rows in self._splits.items()}}

    def compute_baselines(self) -> dict[str, dict[str, float]]:
        """Fitted on the sample of training rows; scored on at most `sample_rows` rows of test."""
        self.setup()
        parts = [self._sample_places, *(self._splits[s][: self.sample_rows] for s in ("val", "test"))]
        rows = np.concatenate(parts)
        ends = np.cumsum([len(p) for p in parts])
        places = np.split(np.arange(len(rows)), ends[:-1])
        numbers = np.where(self.arrays["missing"][rows], np.nan, self.arrays["numerical"][rows])
        return tabular_baselines.tabular_baselines(
            self.preprocessor.schema.targets,
            numbers=numbers.astype(np.float64),
            codes=np.asarray(self.arrays["categorical"][rows]),
            values=np.asarray(self.arrays["target"][rows]),
            splits=dict(zip(SPLITS, places, strict=True)),
            models=self.baseline_models,
        )
