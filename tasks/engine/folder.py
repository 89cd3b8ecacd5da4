"""The run folder: what a run leaves behind, one writer at a time, no half-written file."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from zoo.errors import ConfigError, ZooError
from zoo.files import write_whole

PACKAGES = (
    "torch torchvision torchaudio triton timm torch-geometric lightning hydra-core wandb torchmetrics numpy scipy "
    "scikit-learn"
).split()


class DiskFull(ZooError, OSError):
    """No room left for a file of the run."""


def write_atomic(path: Path, write: Callable[[Path], Any]) -> None:
    """`write_whole` for a run's files: a full disk is told with the way to go on."""
    try:
        write_whole(path, write)
    except Exception as error:
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        # torch's zip writer reports a short write as RuntimeErrors of its own.
        short = ("file write failed", "No space left", "inline_container")
        if full or any(text in str(error) for text in short):
            raise DiskFull(
                f"no room left for {path.name} in {path.parent}; the previous one is intact. Free some space and go "
                f"on with resume={path.parent}"
            ) from error
        raise


def write_json(path: Path, content: Any) -> None:
    write_atomic(path, lambda p: p.write_text(json.dumps(content, indent=2, default=str) + "\n"))


class RunFolder:
    """A run's folder, locked while the run lives.

    Args:
        path: Folder to create or continue.

    Raises:
        ConfigError: Another process is writing there.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = None
        if not is_main_process():  # the other processes of a distributed run write nothing
            return
        path.mkdir(parents=True, exist_ok=True)
        self._lock = open(path / ".lock", "a+")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(self._lock.fileno()).st_nlink == 0:
                raise BlockingIOError("its owner removed it between our two calls")
        except OSError:
            self._lock.close()
            raise ConfigError(
                f"another run is writing to {path}; wait for it or choose another folder"
            ) from None

        for stale in path.rglob(".*.tmp"):  # what a killed process was writing
            stale.unlink(missing_ok=True)

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._lock is not None:
            # Removed while it is held: who opened it before then holds a file that is not in the folder.
            (self.path / ".lock").unlink(missing_ok=True)
            self._lock.close()


def is_main_process() -> bool:
    """False in processes that a launcher started beside the first one."""
    return int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0"))) == 0


def versions() -> dict[str, str]:
    """Versions that a result depends on."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def git_commit() -> str | None:
    """The commit of this checkout, with "+" when files differ from it; None outside git."""
    root = Path(__file__).parent
    try:
        head = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, timeout=10
        )
        dirty = subprocess.run(
            ["git", "status", "--porcelain", "-uno"], cwd=root, capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return head.stdout.strip() + ("+" if dirty.stdout.strip() else "") if head.returncode == 0 else None


def command() -> str:
    return " ".join(["python", *sys.argv])
