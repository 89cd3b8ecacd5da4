"""python -m zoo docs: write README's generated tables and the pages in docs/tasks anew (tests keep them current)."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from zoo.cli.list import HEAD, capability_rows, first_comment, markdown_table
from zoo.cli.task_pages import chosen, task_pages

ROOT = Path(__file__).parents[2]


def task_table() -> str:
    """One row per task: what it is, its default model and data."""
    rows = []
    for file in sorted((ROOT / "conf" / "task").glob("*.yaml")):
        groups = chosen(file)
        rows.append(
            [f"`{file.stem}`", first_comment(file), f"`{groups.get('model')}`", f"`{groups.get('data')}`"]
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
    pages = task_pages()
    for path, text in pages.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    print(f"wrote {readme.name} and {len(pages)} pages in docs/tasks")
    return 0
