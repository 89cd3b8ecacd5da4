"""Finds the images of an ImageFolder tree, checks that each can be decoded, and splits them."""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from data.base import SPLITS
from data.carriers import cache_dir, write_atomic
from data.errors import DataError
from zoo.predict.images import SUFFIXES, open_image, probe_image

VAL_NAMES = ("val", "valid", "validation")
LAYOUT = "<root>/train/<class>/*.png with val/ and test/ beside it, or <root>/<class>/*.png"


@dataclass
class Folder:
    """What a scan found.

    Args:
        root: The folder.
        labels: Class names, sorted; the class number is the place in this list.
        files: (path relative to root, class number) of each split.
        skipped: Relative path of each file left out, with the reason.
        sizes: Bytes and time stamp of each readable file.
    """

    root: Path
    labels: list[str]
    files: dict[str, list[tuple[str, int]]]
    skipped: dict[str, str] = field(default_factory=dict)
    sizes: dict[str, tuple[int, int]] = field(default_factory=dict)


def scan_folder(root: Path, *, val_ratio: float, test_ratio: float, split_seed: int, validate: str) -> Folder:
    """Scan ``root`` and split it.

    With ``train/``, ``val/`` and ``test/`` the folders are the splits. With only one of val and test beside train,
    that one is the test split and validation is drawn from train, so that no figure is reported on data that
    chose the checkpoint. With class folders alone both are drawn, class by class, with ``RandomState(split_seed)``.

    Args:
        root: Folder in one of the two layouts.
        val_ratio: Share of each class for validation where it has to be drawn.
        test_ratio: Share of each class for test where it has to be drawn.
        split_seed: Seed of the draw.
        validate: "full" decodes each file once, "header" reads only its header.

    Raises:
        DataError: Missing folder, no classes, one class only, an empty class, or too few images to split.
    """
    if not root.is_dir():
        raise DataError(f"data.root={root} is not a folder; expected {LAYOUT}")
    parts = _parts(root)
    listed = {split: _class_files(folder) for split, folder in parts.items()}
    found = sorted(path for classes in listed.values() for paths in classes.values() for path in paths)
    skipped, sizes = _check_files(root, found, validate)
    labels = sorted(listed["train"])
    _check_labels(root, parts, listed, labels)

    files: dict[str, list[tuple[str, int]]] = {}
    for split, classes in listed.items():
        files[split] = []
        for label in sorted(classes):
            names = [path.relative_to(root).as_posix() for path in classes[label]]
            good = [name for name in names if name not in skipped]
            if not good and split == "train":
                first = next((f"; {name}: {skipped[name]}" for name in names), "")
                raise DataError(
                    f"class {label!r} in {parts[split]} has no readable image ({len(names)} files, all skipped{first}); "
                    "add images or remove the folder"
                )
            files[split] += [(name, labels.index(label)) for name in good]
    if set(files) != set(SPLITS):
        files = _draw_splits(files, labels, val_ratio=val_ratio, test_ratio=test_ratio, seed=split_seed)
    for split in SPLITS:
        if not files[split]:
            raise DataError(f"the {split} split of {root} has no readable image; expected {LAYOUT}")
    return Folder(root, labels, files, skipped, sizes)


def _parts(root: Path) -> dict[str, Path]:
    """Folder by split; ``{"train": root}`` if the root holds the class folders themselves."""
    train = root / "train"
    if not train.is_dir() or not any(entry.is_dir() for entry in train.iterdir()):
        return {"train": root}
    val = next((root / name for name in VAL_NAMES if (root / name).is_dir()), None)
    test = root / "test" if (root / "test").is_dir() else None
    if val is None or test is None:
        only = val or test
        return {"train": train} if only is None else {"train": train, "test": only}
    return {"train": train, "val": val, "test": test}


def _class_files(folder: Path) -> dict[str, list[Path]]:
    """Files by class; the first level of folders names the class, deeper levels belong to it."""
    classes = {}
    for entry in sorted(folder.iterdir()):
        if entry.is_dir() and not entry.name.startswith("."):
            inside = (path for path in entry.rglob("*") if path.is_file())
            classes[entry.name] = sorted(path for path in inside if not path.name.startswith("."))
    return classes


def _check_labels(root: Path, parts: dict[str, Path], listed: dict[str, dict], labels: list[str]) -> None:
    if not labels:
        raise DataError(f"{parts['train']} has no class folders; expected {LAYOUT}")
    if len(labels) == 1:
        raise DataError(
            f"{parts['train']} has one class only ({labels[0]!r}); classification needs at least two; expected {LAYOUT}"
        )
    for split, classes in listed.items():
        if unknown := sorted(set(classes) - set(labels)):
            raise DataError(
                f"{parts[split]} has classes that {parts['train']} lacks: {', '.join(unknown[:5])}; "
                "add training images of them or remove them"
            )


def _check_files(
    root: Path, paths: list[Path], validate: str
) -> tuple[dict[str, str], dict[str, tuple[int, int]]]:
    """Decode every file once; results are kept in the cache by size and time stamp."""
    store = (
        cache_dir() / "imagefolder" / f"{hashlib.sha256(str(root.resolve()).encode()).hexdigest()[:24]}.json"
    )
    try:
        known = json.loads(store.read_text())
    except (OSError, ValueError):
        known = {}

    def check(path: Path) -> tuple[str, list]:
        name = path.relative_to(root).as_posix()
        stat = path.stat()
        entry = known.get(name)
        if entry and entry[:3] == [validate, stat.st_size, stat.st_mtime_ns]:
            return name, entry
        reason = ""
        if path.suffix.lower() not in SUFFIXES:
            reason = f"not an image file (suffix {path.suffix!r})"
        else:
            try:
                (open_image if validate == "full" else probe_image)(path)
            except DataError as error:
                reason = str(error).removeprefix(f"cannot read {path} as an image: ")
        return name, [validate, stat.st_size, stat.st_mtime_ns, reason]

    with ThreadPoolExecutor() as pool:
        results = dict(pool.map(check, paths))
    if results != known:
        try:
            write_atomic(store, json.dumps(results).encode())
        except OSError:  # a read-only or full cache: the files are checked again next time
            pass
    skipped = {name: entry[3] for name, entry in results.items() if entry[3]}
    return skipped, {name: (entry[1], entry[2]) for name, entry in results.items() if not entry[3]}


def _draw_splits(
    files: dict[str, list[tuple[str, int]]],
    labels: list[str],
    *,
    val_ratio: float,
    test_ratio: float,
    seed: int,
) -> dict[str, list[tuple[str, int]]]:
    """Draw validation, and test if there is none, from each class of train; at least one image each."""
    ratios = {"val": val_ratio} if "test" in files else {"val": val_ratio, "test": test_ratio}
    drawn: dict[str, list[tuple[str, int]]] = {split: [] for split in SPLITS}
    drawn["test"] += files.get("test", [])
    random = np.random.RandomState(seed)
    for number, label in enumerate(labels):
        members = [item for item in files["train"] if item[1] == number]
        if len(members) <= len(ratios):
            raise DataError(
                f"class {label!r} has only {len(members)} readable images, too few to draw {' and '.join(ratios)} from; "
                f"add images or make the splits yourself: {LAYOUT}"
            )
        order = [members[i] for i in random.permutation(len(members))]
        start = 0
        for split, ratio in ratios.items():
            count = min(max(1, round(len(order) * ratio)), len(order) - len(ratios))
            drawn[split] += order[start : start + count]
            start += count
        if start >= len(order):
            raise DataError(
                f"data.val_ratio and data.test_ratio leave no training image of class {label!r}; lower them"
            )
        drawn["train"] += order[start:]
    return {split: sorted(items) for split, items in drawn.items()}
