"""python -m zoo convert WEIGHTS attention=NAME: swap the attention of trained weights and teach the new parts."""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo.errors import ConfigError, WeightsError

if TYPE_CHECKING:
    from torch import Tensor, nn

CHUNK = 32  # samples per step of the transfer; a fifth of the chunks decides when to stop


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m zoo convert", description=__doc__.splitlines()[0])
    parser.add_argument("weights", help="weights name, .safetensors file or run folder")
    parser.add_argument(
        "settings", nargs="+", help="attention=NAME and, if wanted, its options: key_norm=sum"
    )
    parser.add_argument("--out", type=Path, required=True, help=".safetensors file to write")
    parser.add_argument("--samples", type=int, default=500, help="training samples for the transfer")
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

    from tasks.base import ZooTask
    from tasks.engine.run import build_data, build_task, quiet
    from zoo.cli.verify import test_metrics
    from zoo.conversion import convert
    from zoo.pretrained.weights import load_weights, read_card, resolve, save_weights, swap_layers

    options = {k: yaml.safe_load(v) for k, _, v in (s.partition("=") for s in args.settings)}
    attention = options.pop("attention", None)
    if attention is None:
        raise ConfigError(
            "say which attention to put in: python -m zoo convert WEIGHTS attention=mala --out FILE"
        )
    quiet()
    path = resolve(args.weights)
    card = read_card(path)
    if "config" not in card:
        raise WeightsError(
            f"the card of {args.weights} holds no configuration, so its task and data are not known"
        )
    cfg = OmegaConf.create(card["config"])
    data = build_data(cfg)
    task, _ = build_task(cfg, data)
    if type(task).losses is ZooTask.losses:
        raise ConfigError(
            f"task {card['task']!r} has no loss of a batch to learn from; retrain: {card['command']} attention={attention}"
        )
    swap_layers(task.model, card)
    load_weights(task.model, path)
    batches = _training_batches(data, args.samples)

    def loss(model: nn.Module, batch: dict[str, Any]) -> Tensor:
        task.model = model
        return sum(task.losses(batch).values())

    model = copy.deepcopy(task.model).eval()
    settings = {"layers": args.layers, "options": options}
    untaught, _ = convert(model, attention, **settings)
    taught, report = convert(
        model,
        attention,
        **settings,
        calibrate=batches,
        objective=args.objective,
        epochs=args.epochs,
        fine_tune=[(batch, None) for batch in batches] if args.fine_tune else None,
        fine_tune_epochs=args.fine_tune,
        loss=lambda value, _: value,
        call=loss,
    )
    print(report)
    scores = {}
    for name, candidate in (("before", model), ("without transfer", untaught), ("after", taught)):
        task.model = candidate
        scores[name] = test_metrics(task, data, cfg)
        print(f"test {task.monitor} {name}: {scores[name][task.monitor]:.4f}")
    change = {"attention": attention, "options": options, "layers": report.layers}
    card["swapped"] = [*card.get("swapped", []), change]
    card["attention"] = f"{card['attention']}+{attention}" if args.layers else attention
    card["metrics"] = scores["after"]
    for stale in ("interval", "metrics_before_rounding"):  # of the weights before
        card.pop(stale, None)
    card["converted_from"] = {"sha256": card.pop("sha256", None), "report": str(report)}
    save_weights(args.out, taught, {k: v for k, v in card.items() if k not in ("format", "bytes", "storage")})
    print(f"wrote {args.out}")
    return 0


def _training_batches(data: Any, samples: int) -> list[dict[str, Any]]:
    """Training samples in small batches: `samples` of them, or one pass where there are fewer."""
    from tasks.base import batch_size

    chunks, count = [], 0
    for batch in data.train_dataloader():
        take = min(batch_size(batch), samples - count)
        for start in range(0, take, CHUNK):
            chunks.append({k: v[start : min(start + CHUNK, take)] for k, v in batch.items()})
        count += take
        if count >= samples:
            break
    return chunks
