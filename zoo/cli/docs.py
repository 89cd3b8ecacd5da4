"""python -m zoo docs: write README's generated tables anew (a test keeps them current)."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from omegaconf import OmegaConf

from zoo.cli.list import HEAD, capability_rows, markdown_table

ROOT = Path(__file__).parents[2]


def first_comment(file: Path) -> str:
    """What a configuration file says about itself."""
    lines = [
        line for line in file.read_text().splitlines() if line.startswith("# ") and "@package" not in line
    ]
    return lines[0][2:].strip() if lines else ""


def task_table() -> str:
    """One row per task: what it is, its default model and data."""
    rows = []
    for file in sorted((ROOT / "conf" / "task").glob("*.yaml")):
        chosen: dict[str, str] = {}
        for entry in OmegaConf.load(file).get("defaults", []):
            chosen |= {str(k).lstrip("/"): v for k, v in entry.items()} if not isinstance(entry, str) else {}
        rows.append(
            [f"`{file.stem}`", first_comment(file), f"`{chosen.get('model')}`", f"`{chosen.get('data')}`"]
        )
    return markdown_table(["`task=`", "what", "default model", "default data"], rows)


def sections() -> dict[str, str]:
    """Generated parts of README by the name in their markers."""
    return {"tasks": task_table(), "attention": markdown_table(HEAD, capability_rows())}


def render(text: str) -> str:
    """README with its generated parts written anew."""
    for name, content in sections().items():
        pattern = rf"(<!-- begin {name} -->\n).*?(<!-- end {name} -->)"
        text = re.sub(pattern, lambda m, c=content: f"{m[1]}{c}\n{m[2]}", text, flags=re.S)
    return text


def main(argv: list[str]) -> int:
    argparse.ArgumentParser(prog="python -m zoo docs", description=__doc__).parse_args(argv)
    readme = ROOT / "README.md"
    readme.write_text(render(readme.read_text()))
    print(f"wrote {readme.name}")
    return 0
