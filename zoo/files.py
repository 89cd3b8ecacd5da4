"""Files that appear complete or not at all, and array files read without running code."""

from __future__ import annotations

import os
import secrets
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from zoo.errors import DataError


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` fill a hidden neighbour of `path`, then move it into place; a failure leaves nothing behind."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        draft.touch()
        # What the user's umask gives; safetensors would leave a file for the owner alone.
        mode = draft.stat().st_mode
        write(draft)
        draft.chmod(mode)
        os.replace(draft, path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


def read_arrays(path: str | Path, *names: str) -> list[np.ndarray]:
    """Arrays of an `.npz` file by name, all of them without names, or the one of an `.npy` file.

    Raises:
        DataError: The file is missing or damaged, holds Python objects, or lacks a name.
    """
    try:
        content = np.load(path, allow_pickle=False)
        if isinstance(content, np.ndarray):
            if not names:
                return [content]
            raise DataError(f"{path} holds one array; give an .npz file with {', '.join(names)}")
        with content:
            found = content.files
            if set(names) <= set(found):
                return [content[name] for name in names or found]
    except FileNotFoundError:
        raise DataError(f"no file {path}") from None
    except DataError:
        raise
    except (OSError, ValueError, EOFError, TypeError, BadZipFile, zlib.error) as error:
        # numpy says here how to load pickled files all the same, which would run whatever code they hold.
        objects = "it is of another kind, or holds Python objects (save words as array.astype(str))"
        reason = objects if "pickle" in str(error) else error
        raise DataError(f"{path} is no readable {Path(path).suffix} file of numbers: {reason}") from None
    raise DataError(f"{path}: expected the arrays {', '.join(names)}, found {', '.join(found)}")
