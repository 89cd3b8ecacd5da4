"""A page per task for docs/, from the configuration, the modules' docstrings and the cards of packaged weights."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from zoo.cli.list import data_files, first_comment, markdown_table
from zoo.models.registry import get_model, task_of
from zoo.pretrained.weights import list_weights, read_card, resolve

ROOT = Path(__file__).parents[2]
CONF = ROOT / "conf"
_OPTION = re.compile(r"^(?P<indent> *)(?P<key>\w+): *(?P<value>.*?)(?: +# (?P<text>.*))?$")


def chosen(file: Path) -> dict[str, str]:
    """Groups that a task's or experiment's defaults choose."""
    found: dict[str, str] = {}
    for entry in OmegaConf.load(file).get("defaults", []):
        if not isinstance(entry, str):
            found |= {str(k).removeprefix("override ").lstrip("/"): v for k, v in entry.items()}
    return found


def task_pages() -> dict[Path, str]:
    """Text of docs/tasks/<task>.md by path."""
    files = sorted((CONF / "task").glob("*.yaml"))
    return {ROOT / "docs" / "tasks" / f"{file.stem}.md": _page(file) for file in files}


def _page(file: Path) -> str:
    task, groups, cfg = file.stem, chosen(file), OmegaConf.load(file)
    model, data = groups["model"], groups["data"]
    options = {**_values(CONF / "model" / f"{model}.yaml"), **(cfg.get("model") or {})}
    parts = [
        f"# task={task}",
        first_comment(file),
        f"    python train.py task={task} attention=softmax\n"
        f"    python train.py -m task={task} attention=softmax,linear,mala,none seed=0,1,2",
        f"Default model `{model}`: {first_comment(CONF / 'model' / f'{model}.yaml')} "
        f"Default data `{data}`: {first_comment(CONF / 'data' / f'{data}.yaml')}",
        _docstring(ROOT / "tasks" / f"{cfg.task.kind}.py"),
        "## Places that take attention\n\n" + _slots(model, options),
        _experiments(task),
        f"## Options of the task\n\n{_options(file, 'task', under='task')}",
        _others(
            "models", [f for f in sorted((CONF / "model").glob("*.yaml")) if task_of(f.stem) == task], model
        ),
        _others("data", data_files(task), data),
        f"## Options of model `{model}`\n\n{_options(CONF / 'model' / f'{model}.yaml', 'model', own=cfg.get('model'))}",
        f"## Options of data `{data}`\n\n{_options(CONF / 'data' / f'{data}.yaml', 'data', own=cfg.get('data'))}",
        _weights(task),
        "Written by `python -m zoo docs`; edit the configuration or the docstrings instead.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _values(file: Path) -> dict[str, Any]:
    values = OmegaConf.to_container(OmegaConf.load(file))
    return {k: v for k, v in values.items() if k not in ("name", "defaults")}


def _docstring(file: Path) -> str:
    """Module docstring without its first line, which names the file's place in the code."""
    text = ast.get_docstring(ast.parse(file.read_text())) or ""
    return text.partition("\n\n")[2]


def _slots(model: str, options: dict[str, Any]) -> str:
    rows = []
    for name, slot in get_model(model).slots(**options).items():
        needs = [
            text
            for text, needed in (
                ("key mask", slot.key_mask),
                (f"{slot.bias} bias", slot.bias),
                ("no order in its tokens", not slot.ordered),
                (f"{slot.grid_dims}-D grid given", slot.grid_dims),
                ("second derivatives", slot.double_backward),
                ("step-by-step decoding", slot.streaming),
            )
            if needed
        ]
        pattern = slot.pattern.value.replace("_", " ")
        rows.append([f"`attention@{name}_attention=`", pattern, ", ".join(needs) or "-"])
    return markdown_table(["override", "pattern", "needs"], rows)


def _experiments(task: str) -> str:
    rows = []
    for file in sorted((CONF / "experiment").glob("*.yaml")):
        if chosen(file).get("task") == task:
            rows.append([f"`experiment={file.stem}`", first_comment(file)])
    return "## Experiments\n\n" + markdown_table(["command", "what"], rows) if rows else ""


def _others(what: str, files: list[Path], default: str) -> str:
    """What else `model=` or `data=` may be, with what its configuration says about itself."""
    rows = [
        [f"`{file.parent.name}={file.stem}`", first_comment(file).replace("|", "\\|")]
        for file in files
        if file.stem != default
    ]
    return f"## Other {what}\n\n" + markdown_table(["choice", "what"], rows) if rows else ""


def _options(file: Path, prefix: str, under: str | None = None, own: Mapping[str, Any] | None = None) -> str:
    """Keys with defaults and comments, read line by line: a yaml parser drops the comments.

    Args:
        file: Configuration file.
        prefix: Group of the options.
        under: The mapping in the file that has them; the whole file when left out.
        own: Values that the task has in place of the file's.
    """
    rows, inside = [], under is None
    for line in file.read_text().splitlines():
        if under is not None and re.match(r"^\w", line):
            inside = line.startswith(f"{under}:")
            continue
        found = _OPTION.match(line)
        depth = 0 if under is None else 2
        if (
            not inside
            or not found
            or len(found["indent"]) != depth
            or found["key"] in ("name", "kind", "defaults")
        ):
            continue
        text = (found["text"] or "").replace("|", "\\|")
        value = (own or {}).get(found["key"], found["value"])
        rows.append([f"`{prefix}.{found['key']}`", f"`{value}`", text])
    return markdown_table(["option", "default", "meaning"], rows)


def _weights(task: str) -> str:
    rows = []
    for name in list_weights():
        card = read_card(resolve(name))
        if card["task"] == task:
            metrics = ", ".join(f"{k} {v:.4g}" for k, v in card["metrics"].items())
            rows.append([f"`{name}`", metrics, str(card.get("licence") or "-")])
    head = ["weights", "test metrics (python -m zoo verify repeats them)", "licence of the data"]
    return "## Packaged weights\n\n" + markdown_table(head, rows) if rows else ""
