"""What `train.py` says to its user: lists of names, resumed configurations, short errors."""

from __future__ import annotations

import errno
import re
import sys
import traceback
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from zoo.errors import ConfigError, ZooError, closest

CONF = Path(__file__).parents[2] / "conf"


def run_folder(resume: str | None, fresh: str) -> str:
    """Resolver `run_folder`: the folder to continue, or a fresh one."""
    if not resume:
        return fresh
    if not (Path(resume) / "config.yaml").exists():
        raise ConfigError(f"resume={resume}: no run there (config.yaml is missing); give a run folder")
    return str(Path(resume).resolve())


def choices(group: str) -> list[str]:
    """Names in a configuration group."""
    return sorted(p.stem for p in (CONF / group).glob("*.yaml"))


def list_names(groups: list[str]) -> int:
    """Print the names in configuration groups; all groups when none is named."""
    known = sorted(p.name for p in CONF.iterdir() if p.is_dir())
    for group in groups or known:
        if group not in known:
            print(f"error: unknown group {group!r}; groups: {', '.join(known)}", file=sys.stderr)
            return 2
        print(f"{group}: {', '.join(choices(group))}")
    return 0


def merge_resumed(cfg: DictConfig, overrides: list[str]) -> DictConfig:
    """With resume=FOLDER the configuration stored there counts, changed only by plain values given now."""
    if not cfg.resume:
        return cfg
    resumed = OmegaConf.load(Path(cfg.resume) / "config.yaml")
    groups = {p.name for p in CONF.iterdir() if p.is_dir()}
    changes = [o for o in overrides if "=" in o and o.split("=")[0].split("@")[0] not in groups | {"resume"}]
    merged = OmegaConf.merge(resumed, OmegaConf.from_dotlist([o.lstrip("+") for o in changes]))
    merged.resume = cfg.resume
    return merged


def explain(error: BaseException) -> int:
    """Print an error as its user needs it; returns the exit status."""
    if isinstance(error, KeyboardInterrupt):
        print("interrupted; go on with resume=<run folder>", file=sys.stderr)
        return 130
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 1
    # The user's own mistake first, whatever wrapped it.
    for cause in sorted(_chain(error), key=lambda e: not isinstance(e, ZooError)):
        text = None
        if isinstance(cause, ZooError):
            text = str(cause)
        elif type(cause).__module__.startswith(("hydra", "omegaconf", "antlr")):
            text = _hydra_text(cause)
        elif isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
            text = f"no room left on the disk ({cause.filename or 'unknown file'}); free some and use resume="
        if text:
            print(f"error: {text}", file=sys.stderr)
            return 2
    traceback.print_exception(error)
    return 1


def _chain(error: BaseException | None) -> list[BaseException]:
    found = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__ or error.__context__
    return found


def _hydra_text(error: BaseException) -> str:
    text = str(error)
    missing = re.search(r"Could not find '([\w@]+)/([^']+)'", text)
    if missing:
        group, name = missing[1].split("@")[0], missing[2]
        near = closest(name, choices(group))
        hint = (
            f"did you mean {' or '.join(map(repr, near))}?"
            if near
            else f"choose from: {', '.join(choices(group))}"
        )
        return f"unknown {group} {name!r}; {hint} see: python train.py --list {group}"
    override = re.search(r"Could not override '([^']+)'", text)
    if override:
        path = override[1]
        known = _known_keys(path)
        near = closest(path.rsplit(".", 1)[-1], known)
        hint = f"did you mean {' or '.join(near)}?" if near else f"known keys there: {', '.join(known)}"
        return f"unknown key {path!r}; {hint}"
    return " ".join(text.split())


def _known_keys(path: str) -> list[str]:
    """Keys beside `path` in the configuration that the other arguments of this command make."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    given = [a for a in sys.argv[1:] if "=" in a and not a.startswith(("-", "hydra", path))]
    given = [a.split("=")[0] + "=" + a.split("=", 1)[1].split(",")[0] for a in given]
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            node: Any = compose("config", given)
        for part in path.split(".")[:-1]:
            node = node[part]
        return sorted(map(str, node.keys()))
    except (HydraException, OmegaConfBaseException):  # another argument is wrong too: no hint
        return []
