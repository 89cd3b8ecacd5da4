"""Thirty accidents: SIGKILL, SIGTERM and a full disk at random moments of runs and sweeps.

    python -m tests.reliability [--trials 30] [--seed 0] [--folder /some/place]

Each trial starts a run (or a sweep of two jobs), does harm at a random moment, checks what lies in the folder, goes on with
resume=auto, and compares with the same command undisturbed: every logged number, test metrics, weights. The disk is a small tmpfs
of its own, filled by a ballast file, where mounting is allowed; else the trial is left out and said so. Prints one line a trial and the
counts; exits non-zero if anything was lost.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]
MODEL = [
    "data=digits",
    "model.patch_size=4",
    "model.dim=16",
    "model.num_heads=2",
    "model.depth=1",
    "model.dropout=0.1",
]
TRAIN = [
    "trainer.max_epochs=4",
    "callbacks.ema_decay=0.9",
    "callbacks.checkpoint_every_steps=3",
    "callbacks.progress=none",
]
SWEEP = ["attention=softmax,linear", "hydra.sweep.subdir=${attention.name}"]
KINDS = ["SIGKILL", "SIGTERM", "full disk"]


def spawn(folder: Path, sweep: bool, log: Path) -> int:
    """Start train.py in a forked process, which spares each trial the imports; returns its pid."""
    arguments = [*MODEL, *TRAIN, "resume=auto"]
    place = [f"hydra.{'sweep' if sweep else 'run'}.dir={folder}"]
    argv = ["train.py", *(["-m", *SWEEP] if sweep else []), *arguments, *place]
    pid = os.fork()
    if pid:
        return pid
    status = 70
    try:
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(out, 1), os.dup2(out, 2)
        sys.argv = argv
        import train

        status = train.entry()
    finally:
        os._exit(status)


def run(folder: Path, sweep: bool, log: Path) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(spawn(folder, sweep, log), 0)[1])


def content(folder: Path) -> dict:
    """All that has to be equal: rows of every run's log, test metrics, bytes of the weights."""
    found = {}
    for path in sorted(folder.rglob("result.json")):
        with open(path.parent / "metrics.csv", newline="") as file:
            rows = sorted(tuple(sorted((k, v) for k, v in row.items() if v)) for row in csv.DictReader(file))
        result = json.loads(path.read_text())
        weights = (path.parent / "weights.safetensors").read_bytes()
        header = int.from_bytes(weights[:8], "little")  # holds the card; the tensors come after it
        found[str(path.parent.relative_to(folder))] = (
            rows,
            result["test"],
            result["steps"],
            weights[8 + header :],
        )
    return found


def intact(folder: Path) -> str | None:
    """Whether what lies there after the accident is readable; the reason if not."""
    import torch

    for path in folder.rglob("*.ckpt"):
        try:
            torch.load(path, weights_only=True)
        except Exception as error:
            return f"{path.name} is damaged: {error}"
    for path in folder.rglob("*.json"):
        try:
            json.loads(path.read_text())
        except ValueError:
            return f"{path.name} is half written"
    return None


class Disk:
    """A folder on a small file system of its own."""

    def __init__(self, path: Path, mib: int = 24) -> None:
        self.path = path
        path.mkdir(parents=True)
        command = ["mount", "-t", "tmpfs", "-o", f"size={mib}m", "tmpfs", str(path)]
        self.mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0

    def fill(self) -> None:
        with open(self.path / "ballast", "wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(1 << 16))
            except OSError:
                pass

    def free(self) -> None:
        (self.path / "ballast").unlink(missing_ok=True)

    def close(self) -> None:
        if self.mounted:
            subprocess.run(["umount", "-l", str(self.path)], check=False)


def trial(
    kind: str, sweep: bool, length: float, wanted: dict, place: Path, draw: random.Random
) -> tuple[str, str]:
    """One accident; the verdict ("exact", "too late", "lost", "not run") and what happened."""
    log = place.with_suffix(".log")
    disk = Disk(place) if kind == "full disk" else None
    if disk and not disk.mounted:
        return "not run", "no right to mount a file system"
    folder = place / "runs"
    try:
        moment = draw.uniform(0.05, 0.95) * length
        pid = spawn(folder, sweep, log)
        time.sleep(moment)
        if disk:
            disk.fill()
        else:
            os.kill(pid, getattr(signal, kind))
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        done = len(list(folder.rglob("result.json")))
        if damage := intact(folder):
            return "lost", damage
        if disk:
            disk.free()
        again = run(folder, sweep, log)
        found = content(folder)
        note = f"after {moment:.1f} s, status {status}, {done} finished then; resumed with status {again}"
        if again or found.keys() != wanted.keys():
            return "lost", f"{note}; finished: {sorted(found)}"
        if left := [p.name for p in folder.rglob(".*.tmp")]:
            return "lost", f"{note}; left behind: {left}"
        different = [name for name in wanted if found[name] != wanted[name]]
        if different:
            parts = [
                what
                for what, a, b in zip(
                    ("rows", "test", "steps", "weights"),
                    found[different[0]],
                    wanted[different[0]],
                    strict=True,
                )
                if a != b
            ]
            return "lost", f"{note}; differs in {parts}"
        return ("too late" if done == len(wanted) and status == 0 else "exact"), note
    finally:
        if disk:
            disk.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where to work; a temporary folder when left out")
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    os.chdir(ROOT)
    import torch

    import tasks.engine.run
    import tasks.engine.search  # noqa: F401

    torch.set_num_threads(1)
    draw = random.Random(args.seed)
    base = args.folder or Path(tempfile.mkdtemp())
    base.mkdir(parents=True, exist_ok=True)
    wanted, length = {}, {}
    for sweep in (False, True):
        for _ in range(
            2
        ):  # the first fills caches, the second is the undisturbed one and tells how long a run takes
            place = base / f"undisturbed-{sweep}"
            shutil.rmtree(place, ignore_errors=True)
            began = time.perf_counter()
            assert run(place, sweep, base / "undisturbed.log") == 0, f"see {base / 'undisturbed.log'}"
            length[sweep] = time.perf_counter() - began
        wanted[sweep] = content(place)
    print(f"undisturbed: a run {length[False]:.1f} s, a sweep {length[True]:.1f} s", flush=True)
    counts: Counter = Counter()
    for number in range(args.trials):
        kind, sweep = KINDS[number % 3], number % 5 == 4
        place = base / f"trial{number}"
        verdict, note = trial(kind, sweep, length[sweep], wanted[sweep], place, draw)
        counts[kind, "sweep" if sweep else "run", verdict] += 1
        print(f"{number + 1:2} {kind:9} {'sweep' if sweep else 'run':5} {verdict:8} {note}", flush=True)
    print()
    for (kind, what, verdict), count in sorted(counts.items()):
        print(f"{kind:9} in a {what:5}: {count:2} {verdict}")
    return int(any(verdict in ("lost", "not run") for _, _, verdict in counts))


if __name__ == "__main__":
    sys.exit(main())
