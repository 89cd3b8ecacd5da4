"""python -m zoo verify NAME...: evaluate weights on their test split again and compare with their cards."""

from __future__ import annotations

import argparse
import math

from zoo.cli._trained import trained
from zoo.errors import WeightsError, ZooError


def reproduce(name: str) -> tuple[dict[str, float], dict[str, float]]:
    """The card's test metrics and the ones measured now; speeds (real-time factors) are not among them."""
    task, data, cfg, card = trained(name)
    recorded, found = (split.get("sha256") or {} for split in (card["data"]["split"], data.split_record()))
    if recorded.get("test") != found.get("test"):
        raise WeightsError(f"the test split of {name} is not the one of its card; the data have changed")
    return {k: v for k, v in card["metrics"].items() if not k.startswith("rtfx")}, test_metrics(
        task, data, cfg
    )


def test_metrics(task, data, cfg) -> dict[str, float]:
    """Metrics of the task's model on the test split."""
    import lightning as L

    L.seed_everything(cfg.seed, verbose=False)
    trainer = L.Trainer(
        accelerator="auto",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        inference_mode=False,  # solvers differentiate in their test
        precision=cfg.trainer.precision,
    )
    trainer.test(task, datamodule=data, verbose=False)
    return {k.removeprefix("test/"): float(v) for k, v in trainer.callback_metrics.items()}


def agrees(card: float, now: float) -> bool:
    """Equal to three digits; what is undefined (NaN) has to stay so."""
    if math.isnan(card) or math.isnan(now):
        return math.isnan(card) and math.isnan(now)
    return abs(card - now) <= 1e-3 * max(abs(card), 1e-9) + 1e-9


def main(argv: list[str]) -> int:
    from zoo.pretrained.weights import list_weights

    parser = argparse.ArgumentParser(prog="python -m zoo verify", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="+", help="weights names, files or run folders, or all")
    args = parser.parse_args(argv)
    failed = 0
    for name in list_weights() if args.names == ["all"] else args.names:
        try:
            card, now = reproduce(name)
        except ZooError as error:  # the others are still verified
            failed += 1
            print(f"{name}: NOT VERIFIED: {error}")
            continue
        for metric, value in card.items():
            ok = metric in now and agrees(value, now[metric])
            failed += not ok
            print(
                f"{name}: {metric} card {value:.5g}, now {now.get(metric, float('nan')):.5g}{'' if ok else '  DIFFERS'}"
            )
    return 1 if failed else 0
