"""From a finished run to packaged weights: name, storage, cleaned card, interval, limits."""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from zoo.errors import WeightsError
from zoo.pretrained.storage import encode
from zoo.pretrained.weights import build_from_card, read_card, read_tensors, save_tensors
from zoo.settings import differences

MAX_BYTES, MAX_TOTAL_BYTES = 2 * 2**20, 20 * 2**20
# Metrics that are a share of independent test samples, by task. (A pixel accuracy or COCO's recall is not.)
_SHARES = {
    "vit": re.compile(r"accuracy"),
    "tabular": re.compile(r"accuracy$"),
    "recommendation": re.compile(r"hr_at_\d+$"),
}


def weights_name(card: Mapping[str, Any]) -> str:
    """`model_size_attention.dataset`; a solver's data set is its problem."""
    model = card["model"]
    parts = [model["name"], model["options"].get("size"), card["attention"]]
    data = card["preprocessing"].get("problem") or card["data"]["name"]
    return "_".join(p for p in parts if p) + f".{data}"


def package(
    run: Path, folder: Path, *, name: str | None = None, storage: str = "full", licence: str | None = None,
    seeds: Sequence[Path] = (),
) -> Path:  # fmt: skip
    """Write a run's best weights and their card into a folder of named weights.

    Args:
        run: Finished run folder.
        folder: Where the two files go.
        name: Their stem; `weights_name` of the card when left out.
        storage: See `zoo.pretrained.storage`; metrics must be taken anew where it rounds.
        licence: Of the weights, where the data module names none.
        seeds: Further runs of the same configuration with other seeds, for the metrics' interval.

    Returns:
        Path of the weights.

    Raises:
        WeightsError: Unfinished run, no licence, seeds of another configuration, or more bytes than a packaged file may have.
    """
    source = run / "weights.safetensors"
    if not source.exists():
        raise WeightsError(f"{run} holds no weights.safetensors; package a finished run folder")
    card = read_card(source)
    if absent := [key for key in ("command", "data", "metrics") if key not in card]:
        raise WeightsError(f"the card in {run} has no {', '.join(absent)}; package a finished run folder")
    card["licence"] = licence or card.get("licence")
    if not card["licence"]:
        raise WeightsError(f"the data of {run} name no licence; give one with --licence TEXT")
    for key in card["preprocessing"].pop("private", []):  # what the data's licence keeps from being passed on
        card["preprocessing"].pop(key)
    card["command"] = clean_command(card["command"])
    card["interval"] = intervals(card, [read_card(other / "weights.safetensors") for other in seeds])
    if seeds and storage != "full":  # the other seeds are not rounded
        card["interval"]["method"] += ", before rounding"
    card["storage"] = storage
    parameters = {name for name, _ in build_from_card(card).named_parameters()}
    entries = encode(read_tensors(source, card["sha256"]), storage, parameters)
    size = sum(t.numel() * t.element_size() for t in entries.values())
    target = folder / f"{name or weights_name(card)}.safetensors"
    others = sum(p.stat().st_size for p in folder.glob("*.safetensors") if p != target)
    if size > MAX_BYTES or others + size > MAX_TOTAL_BYTES:
        raise WeightsError(
            f"{target.name} would have {size / 2**20:.2f} MiB, all of {folder} {(others + size) / 2**20:.1f} MiB; the limits are "
            f"{MAX_BYTES >> 20} and {MAX_TOTAL_BYTES >> 20}. Use --storage half or byte"
        )
    content = {k: v for k, v in card.items() if k not in ("format", "sha256", "bytes")}
    if found := re.findall(r'"(/(?:root|home|tmp|work|Users)/[^"]*)"', json.dumps(content, default=str)):
        raise WeightsError(
            f"the card names files of this machine: {', '.join(found[:3])}; train with relative paths"
        )
    save_tensors(target, entries, content)
    return target


def clean_command(command: str) -> str:
    """A command without what belongs to one machine: run folders and where the scripts lie."""
    words = [
        w for w in shlex.split(command) if not w.startswith(("hydra.run.dir=", "hydra.sweep.dir=", "resume="))
    ]
    return shlex.join(Path(w).name if w.endswith("train.py") else w for w in words)


def intervals(card: Mapping[str, Any], others: Sequence[Mapping[str, Any]] = ()) -> dict[str, Any]:
    """95 % intervals of the test metrics: over seeds where there are several runs, else of shares of a sample.

    Returns:
        `{"method": what it covers, metric: [low, high], ...}`.
    """
    if others:
        from scipy.stats import t as student

        for other in others:
            wrong = [key for key in ("model", "slots") if other[key] != card[key]]
            wrong += differences([card.get("config", {}), other.get("config", {})])
            splits = ((run["data"]["split"].get("sha256") or {}).get("test") for run in (card, other))
            wrong += ["the test split"] if len({*splits}) > 1 else []
            wrong += [f"test metric {m}" for m in card["metrics"].keys() - other["metrics"].keys()]
            if wrong:
                raise WeightsError(
                    "runs for the interval must differ from the packaged one in their seed alone; here differs "
                    f"{', '.join(wrong[:5])}"
                )
        if len({run["seed"] for run in (card, *others)}) <= len(others):
            raise WeightsError("runs for the interval must differ in their seed alone; a seed occurs twice")
        runs, count = [card, *others], len(others) + 1
        found: dict[str, Any] = {"method": f"mean over {count} seeds, Student's t"}
        for metric in card["metrics"]:
            values = [run["metrics"][metric] for run in runs]
            mean = math.fsum(values) / count
            spread = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (count - 1))
            half = float(student.ppf(0.975, count - 1)) * spread / math.sqrt(count)
            found[metric] = [mean - half, mean + half]
        return found
    size = card["data"]["split"].get("sizes", {}).get("test", 0)
    share = _SHARES.get(card["task"])
    shares = {m: v for m, v in card["metrics"].items() if share and share.match(m)}
    if not size or not shares:
        return {"method": "none: one run, and no metric that is a share of test samples"}
    return {"method": f"Wilson, {size} test samples"} | {m: wilson(v, size) for m, v in shares.items()}


def wilson(share: float, count: int, z: float = 1.96) -> list[float]:
    """95 % interval of a share of `count` independent samples."""
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z * math.sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2) / (1 + z * z / count)
    return [max(0.0, centre - half), min(1.0, centre + half)]


__all__ = ["clean_command", "intervals", "package", "weights_name", "wilson"]
