"""Untrained weights of every task, small enough to build in a moment, with cards as training writes them, and raw input for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from zoo.attention import resolve_slots
from zoo.models import build_model
from zoo.models.registry import model_slots
from zoo.pretrained import save_weights
from zoo.tabular.preprocess import Preprocessor
from zoo.tabular.schema import infer_schema

IMAGE = {"size": [16, 16], "channels": 3, "mean": [0.5] * 3, "std": [0.25] * 3}
LETTERS = ["", "<s>", "</s>", " ", *"abcdefghijklmnopqrstuvwxyz"]
SENSORS = ["s0", "s1", "s2"]
MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "vit": (
        "vit",
        {"image_size": 16, "in_channels": 3, "num_classes": 3, "dim": 16, "depth": 1, "num_heads": 2},
        {
            "preprocessing": {"kind": "image", "crop_ratio": 1.0, "interpolation": "bilinear", **IMAGE},
            "labels": ["a", "b", "c"],
        },
    ),
    "detr": (
        "plain_detr",
        {"image_size": 32, "num_classes": 3, "padded": True, "stem_width": 8, "dim": 16, "queries": 6}
        | {"encoder_depth": 1, "decoder_depth": 1, "num_heads": 2, "many_queries": 4, "box_hidden": 8},
        {"preprocessing": IMAGE | {"size": [32, 32]}, "labels": ["a", "b", "c"]},
    ),
    "segmentation": (
        "segmenter",
        {"image_size": 16, "num_classes": 3, "stem_width": 8, "dim": 16, "depth": 2, "num_heads": 2}
        | {"head_width": 8, "head_depth": 1},
        {"preprocessing": IMAGE, "labels": ["ground", "a", "b"]},
    ),
    "asr": (
        "aed",
        {"vocab_size": len(LETTERS), "n_mels": 16, "dim": 16, "num_heads": 2, "encoder_layers": 1}
        | {"decoder_layers": 1, "sample_rate": 8000},
        {"preprocessing": {"sample_rate": 8000, "max_s": 2.0, "chunk_s": 1.0, "pieces": LETTERS}},
    ),
    "traffic": (
        "staeformer",
        {"num_sensors": 3, "history_steps": 12, "horizon_steps": 6, "lag_steps": [24], "patch_steps": 6}
        | {"spatial_depth": 1, "temporal_depth": 1},
        {
            "preprocessing": {
                "sensors": SENSORS,
                "step_minutes": 60.0,
                "history_steps": 12,
                "lag_steps": [24],
            }
            | {"horizon_steps": 6, "null_value": "nan", "missing_as_zero": False, "unit": "vehicles/h"}
        },
    ),
    "recommendation": (
        "sasrec",
        {"num_items": 20, "max_length": 8, "dim": 16, "depth": 1},
        {"preprocessing": {"items": [f"i{n}" for n in range(20)], "max_length": 8, "exclude_seen": True}},
    ),
    "ctr": (
        "dare",
        {"num_items": 20, "num_categories": 4, "max_length": 10, "top_k": 4, "width": 4}
        | {"attention_width": 4, "hidden": (8,), "auxiliary_hidden": 8},
        {"preprocessing": {"category": [0, *(1 + n % 4 for n in range(20))], "max_length": 10}},
    ),
    "pinn": (
        "physicsformer",
        {"dim": 8, "hidden": (8,), "head": (8,), "ansatz": "burgers1d"},
        {
            "preprocessing": {"problem": "burgers1d", "coordinates": ["x", "t"], "fields": ["u"]}
            | {"lower": [-1.0, 0.0], "upper": [1.0, 1.0]}
        },
    ),
    "operator": (
        "tno",
        {"dim": 16, "depth": 1, "heads": 2},
        {"preprocessing": {"equation": "burgers", "nu": 0.01, "duration": 1.0, "nodes": 16}},
    ),
    "mqar": (
        "recall_lm",
        {"vocabulary": 32, "max_length": 16, "dim": 16, "depth": 1},
        {"preprocessing": {"kind": "tokens", "vocabulary": 32, "length": 16}},
    ),
    "treatment_effect": (
        "transtee",
        {"num_covariates": 4, "dim": 16, "depth": 1, "num_heads": 2},
        {
            "preprocessing": {"kind": "treatment", "mean": [0.0] * 4, "std": [1.0] * 4}
            | {"outcome_mean": 1.0, "outcome_std": 2.0}
        },
    ),
}
TABULAR = {"tabular": ("ft_transformer", ["label"]), "tabular_multitask": ("multitab", ["label", "price"])}
TASKS = sorted([*MODELS, *TABULAR])


def table(rows: int = 60) -> Any:
    """A small table with gaps: two numbers, a word, a class and a price."""
    import pandas as pd

    draw = np.random.default_rng(0)
    frame = pd.DataFrame({"a": draw.normal(size=rows), "b": draw.normal(size=rows)})
    frame["c"] = draw.choice(["u", "v"], rows)
    frame["label"] = np.where(frame["a"] + (frame["c"] == "u") > 0.5, "yes", "no")
    frame["price"] = 100 + 20 * frame["b"]
    frame.loc[::7, "a"] = np.nan
    return frame


def describe(task: str) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """Model name, its options, and what the card says besides."""
    if task not in TABULAR:
        return MODELS[task]
    model, targets = TABULAR[task]
    frame = table()
    unused = dict.fromkeys({"label", "price"} - set(targets), "ignore")
    p = Preprocessor(infer_schema(frame, targets, columns=unused), bins="quantile").fit(frame)
    options = {"dim": 16, "depth": 1, "num_heads": 2, "num_numerical": len(p.schema.numerical)}
    options |= {"cardinalities": p.cardinalities, "bins": p.edges}
    options["outputs"] = [t.outputs for t in p.schema.targets]
    return model, options, {"preprocessing": {"kind": "tabular", **p.to_dict()}}


def tiny_weights(task: str, folder: Path, attention: str = "softmax", **changes: Any) -> Path:
    """Save such weights, with every parameter random and of some size, and return their path."""
    model_name, options, card = describe(task)
    options = {**options, **changes}
    factories = resolve_slots(model_slots(model_name, **options), {"name": attention}, task=task)
    torch.manual_seed(0)
    model = build_model(model_name, factories, **options).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    if hasattr(model, "set_bank"):
        labels = torch.zeros(8, len(options["outputs"]))
        model.set_bank(
            torch.randn(8, options["num_numerical"]), torch.ones(8, 1, dtype=torch.long), None, labels
        )
    path = folder / "weights.safetensors"
    save_weights(
        path,
        model,
        {
            "task": task,
            "kind": task,
            "model": {"name": model_name, "options": options},
            "attention": attention,
            "slots": {k: {"name": f.name, "options": dict(f.options)} for k, f in factories.items()},
            "metrics": {"loss": 1.0},
            "licence": "CC0-1.0",
            **card,
        },
    )
    return path


def raw_inputs(task: str, folder: Path) -> tuple[list[str], str]:
    """Arguments of `zoo predict` for a task, made in `folder`, and one that is bad."""
    return _WRITERS[task](folder)


def _images(folder: Path) -> tuple[list[str], str]:
    from PIL import Image

    (folder / "pictures").mkdir()
    for i, size in enumerate([(16, 16), (30, 20)]):
        pixels = np.random.default_rng(i).integers(0, 255, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "pictures" / f"{i}.png")
    bad = folder / "pictures" / "bad.png"
    bad.write_bytes(b"no picture")
    return [str(folder / "pictures")], str(bad)


def _sounds(folder: Path) -> tuple[list[str], str]:
    import soundfile

    (folder / "sounds").mkdir()
    wave = 0.3 * np.random.default_rng(0).normal(size=12000).clip(-3, 3)
    soundfile.write(folder / "sounds" / "one.wav", wave, 8000)
    bad = folder / "sounds" / "bad.wav"
    bad.write_bytes(b"RIFF")
    return [str(folder / "sounds")], str(bad)


def _readings(folder: Path) -> tuple[list[str], str]:
    draw = np.random.default_rng(0)
    lines = ["time," + ",".join(SENSORS)]
    for hour in range(48):
        values = ",".join(f"{v:.1f}" for v in draw.uniform(10, 90, 3))
        lines.append(f"2025-03-{1 + hour // 24:02d}T{hour % 24:02d}:00,{values}")
    (folder / "readings.csv").write_text("\n".join(lines))
    bad = folder / "other.csv"
    bad.write_text("time,s0\n2025-03-01T00:00,1\n")
    return [str(folder / "readings.csv"), str(bad)], str(bad)


def _table(folder: Path) -> tuple[list[str], str]:
    table().to_csv(folder / "rows.csv", index=False)
    bad = folder / "bad.csv"
    bad.write_text("a,b\n1,2\n")
    return [str(folder / "rows.csv"), str(bad)], str(bad)


def _covariates(folder: Path) -> tuple[list[str], str]:
    np.savetxt(folder / "x.csv", np.eye(4), delimiter=",", header="a,b,c,d", comments="")
    bad = folder / "bad.csv"
    bad.write_text("a,b\n1,2\n")
    return [str(folder / "x.csv"), str(bad)], str(bad)


def _functions(folder: Path) -> tuple[list[str], str]:
    x = np.arange(16) / 16
    np.savetxt(folder / "u.csv", np.stack([np.sin(2 * np.pi * x), np.cos(2 * np.pi * x)]), delimiter=",")
    bad = folder / "bad.csv"
    bad.write_text("1,x\n")
    return [str(folder / "u.csv"), str(bad)], str(bad)


_WRITERS = {
    **dict.fromkeys(("vit", "detr", "segmentation"), _images),
    **dict.fromkeys(("tabular", "tabular_multitask"), _table),
    "asr": _sounds,
    "traffic": _readings,
    "treatment_effect": _covariates,
    "operator": _functions,
    "recommendation": lambda folder: (["i1,i2,i3", "nothing,known"], "nothing,known"),
    "ctr": lambda folder: (["3:1,2,5", "3:99"], "3:99"),
    "pinn": lambda folder: (["grid:4x5", "grid:4"], "grid:4"),
    "mqar": lambda folder: (["3,20,5", "99"], "99"),
}
