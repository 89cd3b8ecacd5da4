"""Train, test and report: `python train.py task=vit attention=mala`. Options live in conf/, see README."""

import os
import sys
from pathlib import Path

# Errors reach `entry` below, which prints the user's own ones in one line.
os.environ.setdefault("HYDRA_FULL_ERROR", "1")

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from tasks.engine.cli import check_choices, explain, list_names, sweep_status
from tasks.engine.resume import continued, merge_resumed, run_folder, search_record

OmegaConf.register_new_resolver("run_folder", run_folder)


@hydra.main(version_base="1.3", config_path=str(Path(__file__).parent / "conf"), config_name="config")
def main(cfg: DictConfig) -> float | None:
    from tasks.engine.leaderboard import record_failure, write_leaderboard
    from tasks.engine.run import run

    hydra_cfg = HydraConfig.get()
    folder = Path(hydra_cfg.runtime.output_dir)
    sweep = Path(hydra_cfg.sweep.dir) if hydra_cfg.mode is RunMode.MULTIRUN else None
    try:
        cfg, result = continued(merge_resumed(cfg, list(hydra_cfg.overrides.task)), folder)
        if result is None:
            found = search_record(folder) if cfg.resume else None
            if cfg.get("sweep"):
                from tasks.engine.search import search

                cfg, found = search(cfg, folder)
            result = run(cfg, folder, found)
    except BaseException as error:
        if sweep:
            record_failure(sweep, folder, cfg, error)
        raise
    if sweep:
        write_leaderboard(sweep)
    return result.get("test", {}).get(result.get("monitor", ""), None)


def entry() -> int:
    if "--list" in sys.argv:
        return list_names(sys.argv[sys.argv.index("--list") + 1 :])
    status, trouble = 0, None
    try:
        check_choices(sys.argv[1:])
        main()
    except BaseException as error:
        status, trouble = explain(error), error
    return sweep_status(status, trouble)


if __name__ == "__main__":
    sys.exit(entry())
