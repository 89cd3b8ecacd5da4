"""What `train.py` says to its user: lists of names, how a sweep went, short errors."""

from __future__ import annotations

import errno
import re
import signal
import sys
import traceback
from pathlib import Path
from typing import Any, ClassVar

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from zoo.errors import CapabilityError, ConfigError, ZooError, closest

CONF = Path(__file__).parents[2] / "conf"


class RememberSweep(Callback):
    """Hydra callback: the folder of the sweep that this process leads, for `sweep_status`."""

    folder: ClassVar[Path | None] = None

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        RememberSweep.folder = Path(config.hydra.sweep.dir)


def sweep_status(status: int, error: BaseException | None) -> int:
    """Print how a sweep went; the exit status, non-zero if any job failed. Outside sweeps `status` as it is.

    A variant that a task's slots refuse is an answer, with its reason in the leaderboard, and no failure.
    """
    folder, RememberSweep.folder = RememberSweep.folder, None
    if folder is None or not folder.is_dir():
        return status
    from tasks.engine.leaderboard import collect

    results, missing = collect([folder])
    refused = [m for m in missing if m["kind"] == CapabilityError.__name__]
    failed = [m for m in missing if m not in refused]
    counts = f"{len(results)} jobs done, {len(refused)} refused, {len(failed)} failed"
    print(f"sweep {folder}: {counts}", file=sys.stderr)
    reasons: dict[str, list[str]] = {}
    for job in missing:
        reasons.setdefault(f"{job['kind']}: {job['reason']}", []).append(Path(job["folder"]).name)
    for reason, places in reasons.items():
        print(f"  {', '.join(places)}: {reason}", file=sys.stderr)
    if not failed and isinstance(error, CapabilityError | None):
        return 0
    print(f"go on with the same command and: hydra.sweep.dir={folder} resume=auto", file=sys.stderr)
    return status or 1


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


def check_choices(arguments: list[str]) -> None:
    """Refuse what Hydra takes for a group's name and is none: a list, of which the last would win, and null.

    Experiments may be listed: each adds its overrides.

    Raises:
        ConfigError: `attention=[softmax,mala]`, `task=null`.
    """
    groups = {p.name for p in CONF.iterdir() if p.is_dir()} - {"experiment"}
    for argument in arguments:
        key, _, value = argument.partition("=")
        group = key.lstrip("+").split("@")[0]
        if group not in groups:
            continue
        if value in ("null", "[]"):
            raise ConfigError(f"{argument}: leave it out, or choose: python train.py --list {group}")
        if value.startswith("["):
            names = [name.strip(" []\"'") for name in value.split(",")]
            raise ConfigError(
                f"{argument}: {group} takes one name; write {key}={names[0]}, or -m {key}={','.join(names)} for a run of each"
            )


def explain(error: BaseException) -> int:
    """Print an error as its user needs it; returns the exit status."""
    if isinstance(error, KeyboardInterrupt):
        print("interrupted; go on with resume=<run folder>", file=sys.stderr)
        return 130
    if type(error).__name__ == "SIGTERMException":  # Lightning's; not imported for --list
        print("terminated; the state is saved, go on with resume=<run folder>", file=sys.stderr)
        return 128 + signal.SIGTERM
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 1
    # The user's own mistake first, whatever wrapped it.
    for cause in sorted(_chain(error), key=lambda e: not isinstance(e, ZooError)):
        text = None
        if isinstance(cause, ZooError):
            text = str(cause)
        elif type(cause).__module__.startswith(("hydra", "omegaconf", "antlr")):
            text = _hydra_text(cause)
        elif "DataLoader worker" in str(cause):
            text = (
                f"a data-loader worker died ({str(cause).split('.')[0]}), perhaps killed for memory; go on with resume=, with "
                "fewer data.num_workers"
            )
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
        if (group, name.split("/")[0]) == ("hydra", "launcher"):
            plugin = name.split("/")[-1].split("_")[0]
            return (
                f"launcher={plugin} needs a plugin of Hydra's: pip install hydra-{plugin}-launcher; without launcher= the jobs run "
                "one after the other"
            )
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
        hint = f"known keys there: {', '.join(known)}" if known else f"to add it, write +{path}=..."
        hint = f"did you mean {' or '.join(near)}?" if near else hint
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
            cfg = compose("config", given, return_hydra_config=True)
        if "@" in path:  # attention@PLACE: those that the task's defaults name
            return sorted(k for k in cfg.hydra.runtime.choices if k.startswith(path.split("@")[0] + "@"))
        parent = path.rpartition(".")[0]
        node = OmegaConf.select(cfg, parent) if parent else cfg
        return sorted(map(str, node.keys())) if OmegaConf.is_dict(node) else []
    except (HydraException, OmegaConfBaseException):  # another argument is wrong too: no hint
        return []
