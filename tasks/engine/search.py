"""A small search before the run proper: the same budget for every variant, decided on validation alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from tasks.engine.build import plain
from tasks.engine.folder import RunFolder, is_main_process, write_json
from tasks.engine.resume import SEARCH, write_config
from tasks.engine.run import quiet, train
from zoo.errors import ConfigError, ZooError

KEY = "task.lr"


def search(cfg: DictConfig, folder: Path) -> tuple[DictConfig, dict[str, Any]]:
    """The configuration with the learning rate that validated best, and the record of the search.

    Trials lie in <folder>/search/<number>; those that ended before are read, not repeated. No trial touches the test split.

    Args:
        cfg: Resolved configuration with `cfg.sweep` (conf/sweep/).
        folder: Run folder.

    Raises:
        ConfigError: A bad search space, or optuna is not installed.
        ZooError: Every trial failed.
    """
    try:
        import optuna
    except ImportError:
        raise ConfigError('sweep=lr needs optuna: pip install -e ".[sweep]"') from None
    options = plain(cfg.sweep)
    if options["trials"] < 1 or options["factor"] <= 1 or not 0 < options["epochs"] <= 1:
        raise ConfigError("sweep: trials must be >= 1, factor > 1 and epochs in (0, 1]")
    if is_main_process():
        write_config(cfg, folder)  # what `resume=` reads when the search does not end
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=cfg.seed, n_startup_trials=3))
    study.enqueue_trial({KEY: cfg.task.lr})
    low, high = cfg.task.lr / options["factor"], cfg.task.lr * options["factor"]
    found = []
    for number in range(options["trials"]):
        trial = study.ask()
        rate = trial.suggest_float(KEY, low, high, log=True)
        outcome = _outcome(_trial_config(cfg, rate, options["epochs"]), folder / "search" / str(number))
        found.append({KEY: rate, **outcome})
        if outcome["loss"] is None:
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
        else:
            study.tell(trial, outcome["loss"])
        print(f"search {number + 1}/{options['trials']}: {KEY}={rate:.3g} {outcome['text']}", flush=True)
    ended = [f for f in found if f["loss"] is not None]
    if not ended:
        raise ZooError(f"sweep: all {len(found)} trials failed, the last with: {found[-1]['text']}")
    best = min(ended, key=lambda f: f["loss"])[KEY]
    chosen = OmegaConf.create(plain(cfg))
    chosen.task.lr, chosen.sweep = best, None
    record = {**options, "low": low, "high": high, "best": best, "found": found}
    write_json(folder / SEARCH, record)  # for runs that go on from here with the rate alone
    return chosen, record


def _trial_config(cfg: DictConfig, rate: float, share: float) -> DictConfig:
    trial = OmegaConf.create(plain(cfg))
    trial.task.lr, trial.sweep, trial.resume = rate, None, None
    trial.logger, trial.callbacks.progress = {"name": "csv"}, "none"
    if trial.protocol.name == "equal_time":
        trial.protocol.seconds *= share
    elif trial.trainer.max_epochs > 0:
        trial.trainer.max_epochs = max(1, round(trial.trainer.max_epochs * share))
    return trial


def _outcome(cfg: DictConfig, folder: Path) -> dict[str, Any]:
    """Validation of one trial; a trial that fails has a reason instead."""
    path = folder / "trial.json"
    if path.exists():
        return json.loads(path.read_text())
    quiet()
    try:
        with RunFolder(folder):
            fitted = train(cfg, folder)
        monitor = fitted.task.monitor
        value = fitted.valid[monitor]
        loss = -value if fitted.task.mode == "max" else value
        outcome = {"loss": loss, "text": f"valid/{monitor} {value:.4g}"}
    except ZooError as error:
        outcome = {"loss": None, "text": str(error)}
    write_json(path, outcome)
    return outcome
