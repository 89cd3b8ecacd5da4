"""python -m zoo convert WEIGHTS attention=NAME: swap the attention of trained weights and teach the new parts."""

from __future__ import annotations

import argparse
from pathlib import Path

from zoo.errors import ConfigError


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m zoo convert", description=__doc__.splitlines()[0])
    parser.add_argument("weights", help="weights name, .safetensors file or run folder of a vit")
    parser.add_argument(
        "settings", nargs="+", help="attention=NAME and, if wanted, its options: key_norm=sum"
    )
    parser.add_argument("--out", type=Path, required=True, help=".safetensors file to write")
    parser.add_argument("--samples", type=int, default=500, help="training images for the transfer")
    parser.add_argument(
        "--layers", type=int, nargs="+", help="numbers of the layers to swap; all when left out"
    )
    parser.add_argument("--objective", default="output", choices=["output", "map"])
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument(
        "--fine-tune", type=int, default=0, metavar="EPOCHS", help="then train everything on them"
    )
    args = parser.parse_args(argv)
    import yaml
    from omegaconf import OmegaConf

    from tasks.engine.run import build_data
    from zoo.conversion import convert
    from zoo.pretrained.weights import load_model, save_weights

    options = {k: yaml.safe_load(v) for k, _, v in (s.partition("=") for s in args.settings)}
    attention = options.pop("attention", None)
    if attention is None:
        raise ConfigError(
            "say which attention to put in: python -m zoo convert WEIGHTS attention=mala --out FILE"
        )
    model, card = load_model(args.weights)
    if card["task"] != "vit":
        raise ConfigError(
            f"conversion from the command line takes weights of task 'vit', not {card['task']!r}; use zoo.convert"
        )
    data = build_data(OmegaConf.create(card["config"]))
    loader = iter(data.train_dataloader())
    batches, labels, count = [], [], 0
    while count < args.samples:
        batch = next(loader)
        batches.append(batch["image"][: args.samples - count])
        labels.append(batch["label"][: args.samples - count])
        count += len(batches[-1])
    settings = {"layers": args.layers, "options": options}
    untaught, _ = convert(model, attention, **settings)
    taught, report = convert(
        model,
        attention,
        **settings,
        calibrate=batches,
        objective=args.objective,
        epochs=args.epochs,
        fine_tune=list(zip(batches, labels, strict=True)) if args.fine_tune else None,
        fine_tune_epochs=args.fine_tune,
    )
    print(report)
    scores = {
        name: _accuracy(m, data)
        for name, m in (("before", model), ("without transfer", untaught), ("after", taught))
    }
    for name, value in scores.items():
        print(f"test accuracy {name}: {value:.4f}")
    if args.layers is None:
        card["slots"] = {slot: {"name": attention, "options": options} for slot in card["slots"]}
        card["attention"] = attention
        card["metrics"] = {"accuracy": scores["after"]}
        card["converted_from"] = {"sha256": card.pop("sha256", None), "report": str(report)}
        card["config"]["attention"] = {"strict": False, "allow_order": False, "name": attention, **options}
        save_weights(args.out, taught, {k: v for k, v in card.items() if k not in ("format", "bytes")})
        print(f"wrote {args.out}")
    else:
        print("weights with different attention per layer have no card yet; nothing was written")
    return 0


def _accuracy(model, data) -> float:
    import torch

    right = total = 0
    with torch.no_grad():
        for batch in data.test_dataloader():
            right += int((model(batch["image"]).argmax(-1) == batch["label"]).sum())
            total += len(batch["label"])
    return right / total
