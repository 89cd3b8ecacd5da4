"""Tables that a carrier stores as pickles: opened once from the pinned file, kept as Parquet afterwards."""

from __future__ import annotations

import io
import lzma
import pickle
from typing import TYPE_CHECKING, Any

from data import carriers
from data.errors import DataError

if TYPE_CHECKING:
    import pandas as pd

# A stored frame is made of parts of pandas and NumPy and of these; a pickle that asks for anything else is refused.
_BUILTINS = {"slice", "set", "frozenset", "list", "tuple", "dict", "bytearray", "complex", "object"}


class _FrameUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module.startswith(("pandas.", "numpy.")) or module in ("pandas", "numpy"):
            return super().find_class(module, name)
        if module in ("builtins", "_codecs", "copyreg") and (name in _BUILTINS or module != "builtins"):
            return super().find_class(module, name)
        raise DataError(f"a carried table asks for {module}.{name}, which no table needs; it was not opened")


def carried_table(source: str) -> pd.DataFrame:
    """The table of a carrier; the file's hash is checked before anything is opened."""
    import pandas as pd

    digest = next(iter(carriers.source(source).files.values()))
    path = carriers.cache_dir() / "tables" / f"{source}-{digest[:16]}.parquet"
    if path.is_file():
        return pd.read_parquet(path)
    content = lzma.decompress(carriers.read_member(source, "table"))
    frame = _FrameUnpickler(io.BytesIO(content)).load()
    frame = frame.drop(columns=[c for c in ("rownames",) if c in frame])
    for name in frame:
        if str(frame[name].dtype) in ("category", "object"):
            frame[name] = frame[name].astype(str).where(frame[name].notna(), None)
    stream = io.BytesIO()
    frame.to_parquet(stream, index=False)
    try:
        carriers.write_atomic(path, stream.getvalue())
    except OSError:  # a read-only cache only costs the time next time
        pass
    return frame
