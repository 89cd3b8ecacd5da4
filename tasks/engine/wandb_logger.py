"""Weights & Biases beside metrics.csv: offline unless a key is there, and never in the way of a run."""

from __future__ import annotations

import os
import secrets
import warnings
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import WandbLogger
from omegaconf import DictConfig, OmegaConf

from tasks.engine.folder import is_main_process, write_atomic
from zoo.errors import ConfigError

MODES = ("online", "offline", "disabled")  # each is what remains when the one before does not start
ELSE = {
    "online": "this run is logged offline, see wandb sync",
    "offline": "metrics.csv has the run",
    "disabled": "metrics.csv has the run",
}
INIT_TIMEOUT_S = 20
FINISH_TIMEOUT_S = 300.0  # what is not uploaded by then waits on the disk for wandb sync


class ZooWandb(WandbLogger):
    """A W&B run that also carries figures, the slot table, results and the model card."""

    def log_run_extras(self, figures: list[Path], result: dict[str, Any], folder: Path) -> None:
        """Upload figures and slots, put the test metrics into the summary, store card and weights as an artifact."""
        import wandb

        run = self.experiment
        images = {f"figures/{path.stem}": wandb.Image(str(path)) for path in figures if path.suffix == ".png"}
        columns = ["slot", "pattern", "attention", "note"]
        table = wandb.Table(columns=columns, data=[[row[c] for c in columns] for row in result["slots"]])
        run.log({**images, "slots": table})
        run.summary.update({f"test/{k}": v for k, v in result["test"].items()})
        run.summary.update({f"cost/{k}": v for k, v in result["cost"].items() if v is not None})
        run.summary.update(
            {f"baseline/{n}/{k}": v for n, scores in result["baselines"].items() for k, v in scores.items()}
        )
        artifact = wandb.Artifact(
            f"{result['task']}-{result['attention']}-{run.id}", type="model", metadata=result
        )
        for name in ("weights.safetensors", "weights.json"):
            artifact.add_file(str(folder / name))
        run.log_artifact(artifact)
        run.finish()


def build_wandb(cfg: DictConfig, folder: Path, options: dict[str, Any]) -> ZooWandb:
    """The logger of this run; a resumed run continues under its id."""
    mode = options.pop("mode")
    if mode == "auto":
        mode = os.environ.get("WANDB_MODE") or ("online" if _has_key() else "offline")
    if mode not in MODES:
        raise ConfigError(f"logger.mode={mode!r}: choose auto, {', '.join(MODES)}")
    if mode == "offline" and is_main_process():
        print(f"W&B: logged offline; wandb sync {folder}/wandb/offline-run-* sends it")
    import wandb

    if wandb.run is not None:  # of a job of this sweep that failed; Lightning would log into it
        wandb.finish(exit_code=1)
    identity = folder / "wandb_id"
    if is_main_process() and not identity.exists():
        write_atomic(identity, lambda p: p.write_text(secrets.token_hex(4)))
    sweep = folder.parent.name if (folder.parent / "multirun.yaml").exists() else None

    def logger(mode: str) -> ZooWandb:
        return ZooWandb(
            name=folder.name,
            save_dir=str(folder),
            id=identity.read_text() if is_main_process() else None,  # the others log nothing
            project=options["project"],
            entity=options["entity"],
            group=sweep,
            tags=[cfg.task.name, cfg.attention.name, *options["tags"]],
            config=OmegaConf.to_container(cfg, resolve=True),
            mode=mode,
            # "allow" continues an online run; offline runs are joined by their id when they are synced.
            resume="allow" if mode == "online" else None,
            settings=wandb.Settings(
                init_timeout=INIT_TIMEOUT_S, finish_timeout=FINISH_TIMEOUT_S, console="off", silent=True
            ),
        )

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for attempt in MODES[MODES.index(mode) :]:
            found = logger(attempt)
            found._wandb_init.pop("anonymous", None)  # Lightning gives None, of which W&B warns
            try:
                _ = found.experiment  # connects
                return found
            except Exception as error:  # its kinds have no common base; no training ends for a logger
                wandb.teardown()
                print(f"W&B {attempt} does not start ({type(error).__name__}); {ELSE[attempt]}")
    return found


def _has_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    netrc = Path(os.environ.get("NETRC", Path.home() / ".netrc"))
    return netrc.exists() and "wandb" in netrc.read_text(errors="ignore")
