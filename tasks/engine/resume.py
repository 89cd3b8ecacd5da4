"""`resume=`: which configuration a continued run has."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from tasks.engine.cli import CONF
from tasks.engine.folder import write_atomic
from zoo.errors import ConfigError

AUTO = "auto"  # resume=auto
FILE = "config.yaml"
SEARCH = "search.json"  # how sweep= chose the configuration
# What a continued run may change: how long it goes, on what, and how it is watched. The rest lies in its checkpoint or makes its curve.
CHANGEABLE = (
    "trainer.",
    "logger.",
    "callbacks.progress",
    "callbacks.checkpoint_every_steps",
    "callbacks.early_stop_patience",
    "data.batch_size",
    "data.eval_batch_size",
    "data.num_workers",
)
_PLACE = (
    "accelerator",
    "devices",
    "num_nodes",
    "strategy",
    "precision",
    "matmul_precision",
)  # what trainer=NAME chooses
_NO_PART = ("callbacks", "launcher", "sweep", "resume")


def run_folder(resume: str | None, fresh: str) -> str:
    """Resolver `run_folder`: the folder to continue, or a fresh one."""
    if resume == AUTO:
        raise ConfigError(
            "resume=auto goes on with what the run's folder holds, and this command names none: add hydra.run.dir=FOLDER, or write "
            "resume=FOLDER"
        )
    if not resume:
        return fresh
    return str(_stored(resume).parent.resolve())


def _stored(resume: str) -> Path:
    """The configuration of the run to continue."""
    path = Path(resume) / FILE
    if not path.exists():
        raise ConfigError(f"resume={resume}: no run there ({FILE} is missing); give a run folder")
    return path


def merge_resumed(cfg: DictConfig, overrides: list[str]) -> DictConfig:
    """With resume=FOLDER the configuration stored there, with what the command line may change of it.

    Args:
        cfg: What the command line makes without `resume`.
        overrides: The command line.

    Raises:
        ConfigError: It gives other values to what a continued run cannot change.
    """
    if not cfg.resume or cfg.resume == AUTO:
        return cfg
    merged = OmegaConf.load(_stored(cfg.resume))
    groups = {p.name for p in CONF.iterdir() if p.is_dir()}
    refused = []
    for key in (o.split("=")[0].lstrip("+~") for o in overrides):
        group, _, place = key.partition("@")
        if group.startswith("hydra") or group in _NO_PART:
            continue
        if group == "trainer":
            merged.trainer.update({k: cfg.trainer[k] for k in _PLACE})
        elif group == "logger":
            merged.logger = cfg.logger
        else:
            if group in groups:
                key = f"{place or {'experiment': 'task'}.get(group, group)}.name"
            old, new = (_value(c, key) for c in (merged, cfg))
            if old != new and key.startswith(CHANGEABLE):
                OmegaConf.update(merged, key, new, force_add=True)
            elif old != new:
                refused.append(f"{key} ({old}, now {new})")
    if refused:
        raise ConfigError(
            f"resume={cfg.resume}: that run has other values of {', '.join(refused)}. Leave them out, or start a new run without "
            f"resume=. A continued run may change {', '.join(c + '*' * c.endswith('.') for c in CHANGEABLE)}"
        )
    merged.resume = cfg.resume
    return merged


def _value(cfg: DictConfig, key: str) -> Any:
    """A plain value by dotted name; None where there is none."""
    found = OmegaConf.select(cfg, key)
    return OmegaConf.to_container(found, resolve=True) if OmegaConf.is_config(found) else found


def continued(cfg: DictConfig, folder: Path) -> tuple[DictConfig, dict[str, Any] | None]:
    """With resume=auto: the configuration that goes on with what `folder` holds, and its result if it is finished.

    Raises:
        ConfigError: The folder holds another configuration's run.
    """
    if cfg.resume != AUTO:
        return cfg, None
    cfg.resume = None
    stored = folder / FILE
    if not stored.exists():
        return cfg, None
    old, new = (OmegaConf.to_container(c, resolve=True) for c in (OmegaConf.load(stored), cfg))
    for key in ("resume", "sweep"):
        old.pop(key, None), new.pop(key, None)
    if cfg.get("sweep"):  # the search chose this one
        old["task"].pop("lr"), new["task"].pop("lr")
    different = sorted(k for k in old.keys() | new.keys() if old.get(k) != new.get(k))
    if different:
        raise ConfigError(
            f"resume=auto: {folder} holds a run with another configuration ({', '.join(different)} differ); choose another folder"
        )
    if (folder / "result.json").exists():
        return cfg, json.loads((folder / "result.json").read_text())
    if (folder / "checkpoints" / "last.ckpt").exists():
        cfg.resume = str(folder)
    return cfg, None


def search_record(folder: Path) -> dict[str, Any] | None:
    """How the run that `folder` holds was chosen, if a search did that."""
    path = folder / SEARCH
    return json.loads(path.read_text()) if path.exists() else None


def write_config(cfg: DictConfig, folder: Path) -> None:
    """Write what runs as config.yaml; what a continued run had before stays beside it as config.1.yaml, config.2.yaml ..."""
    path = folder / FILE
    going_on = bool(cfg.resume)
    cfg = OmegaConf.create(OmegaConf.to_container(cfg, resolve=True) | {"resume": None})
    if going_on and path.exists():
        earlier = OmegaConf.load(path)
        if earlier == cfg:
            return
        number = 1 + len(list(folder.glob("config.*.yaml")))
        write_atomic(folder / f"config.{number}.yaml", lambda p: OmegaConf.save(earlier, p))
    write_atomic(path, lambda p: OmegaConf.save(cfg, p))
