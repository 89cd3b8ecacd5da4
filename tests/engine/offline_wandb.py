"""Reading a .wandb file: a LevelDB log of protobuf records behind a 7-byte header."""

import json
import struct
from dataclasses import dataclass, field
from pathlib import Path

BLOCK = 32 * 1024
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def read_records(path: Path):
    """Yield every `Record` message of the file."""
    from wandb.proto import wandb_internal_pb2

    data = Path(path).read_bytes()
    assert data[:4] == b":W&B"
    position, parts = 7, []
    while position + 7 <= len(data):
        left = BLOCK - position % BLOCK
        if left < 7:  # a block's tail too short for a record header
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        if kind == 0:
            position += left
            continue
        parts.append(data[position + 7 : position + 7 + length])
        position += 7 + length
        if kind in (FULL, LAST):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(b"".join(parts))
            parts = []
            yield record


@dataclass
class OfflineRun:
    """What one file says of its run."""

    id: str = ""
    group: str = ""
    tags: set = field(default_factory=set)
    exit_code: int | None = None
    config: dict = field(default_factory=dict)
    history: dict = field(default_factory=dict)
    summary: dict = field(default_factory=dict)
    artifacts: dict = field(default_factory=dict)  # type -> paths in it -> size


def read_run(path: Path) -> OfflineRun:
    found = OfflineRun()
    for record in read_records(path):
        if record.HasField("run"):
            found.id, found.group = record.run.run_id, record.run.run_group
            found.tags |= set(record.run.tags)
            found.config |= _items(record.run.config.update)
        elif record.HasField("config"):
            found.config |= _items(record.config.update)
        elif record.HasField("summary"):
            found.summary |= _items(record.summary.update)
        elif record.HasField("history"):
            for key, value in _items(record.history.item).items():
                found.history.setdefault(key, []).append(value)
        elif record.HasField("artifact"):
            contents = record.artifact.manifest.contents
            found.artifacts.setdefault(record.artifact.type, {}).update({c.path: c.size for c in contents})
        elif record.HasField("exit"):
            found.exit_code = record.exit.exit_code
    return found


def read_folder(folder: Path) -> list[OfflineRun]:
    """All offline runs below a run folder, oldest first."""
    return [read_run(path) for path in sorted(folder.glob("wandb/offline-run-*/run-*.wandb"))]


def _items(items) -> dict:
    return {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items}
