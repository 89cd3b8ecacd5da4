"""The promises of the layout: layers, light imports, generated README, complete configuration."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from tasks.registry import check_types, get_data, get_task
from zoo.attention.registry import get_attention
from zoo.models.registry import get_model

ROOT = Path(__file__).parents[1]
SOURCES = [p for folder in ("zoo", "kernels", "tasks", "data") for p in sorted((ROOT / folder).rglob("*.py"))]

# From the top down; a file may import its own layer and those below.
LAYERS = [
    ("zoo/cli", "zoo/__main__", "zoo/bench", "zoo/sklearn"),
    ("tasks",),
    ("data",),
    ("zoo",),
    ("kernels",),
]


def layer(path: str) -> int:
    for level, prefixes in enumerate(LAYERS):
        if path.startswith(prefixes):
            return level
    raise AssertionError(f"{path} belongs to no layer")


def imports(tree: ast.AST):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module


@pytest.mark.parametrize("file", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_downward(file):
    own = str(file.relative_to(ROOT))
    for name in imports(ast.parse(file.read_text())):
        if name.split(".")[0] in ("zoo", "kernels", "tasks", "data"):
            assert layer(name.replace(".", "/")) >= layer(own), f"{own} imports {name} from a layer above"


def test_listing_needs_torch_alone():
    """In a fresh process where the heavy packages cannot be imported."""
    code = (
        "import sys\n"
        "for name in ('triton', 'timm', 'torch_geometric', 'torchaudio', 'wandb', 'lightning', 'pandas', 'scipy', "
        "'sklearn', 'matplotlib', 'hydra'):\n"
        "    sys.modules[name] = None\n"
        "import zoo, torch\n"
        "names = zoo.list_attention()\n"
        "for name in names:\n"
        "    pattern = sorted(zoo.get_attention(name).capabilities.patterns)[0]\n"
        "print(len(names), 'zoo.attention.mala' in sys.modules)\n"
        "y = zoo.create_attention('mala', 16, 2, pattern='self')(torch.zeros(1, 3, 16))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(len(list_variant_files())), "True"]


def list_variant_files():
    skip = {"base", "registry", "slots", "types", "__init__"}
    return [p for p in (ROOT / "zoo" / "attention").glob("*.py") if p.stem not in skip and p.stem[0] != "_"]


def test_every_variant_has_its_yaml_and_the_other_way_round():
    yamls = {p.stem for p in (ROOT / "conf" / "attention").glob("*.yaml")}
    assert yamls == {p.stem for p in list_variant_files()}


def test_readme_tables_are_current():
    from zoo.cli.docs import render

    text = (ROOT / "README.md").read_text()
    assert render(text) == text, "run: python -m zoo docs"


def test_the_table_of_mechanisms_has_state_and_cost():
    from zoo.cli.list import HEAD, capability_rows

    rows = {row[0]: dict(zip(HEAD, row, strict=True)) for row in capability_rows()}
    assert rows["softmax"]["state"] == f"{2 * 64 * 1024:,}, grows"
    assert rows["linear"]["state"] == f"{4 * 16 * 17:,}, constant" and rows["clear"]["state"] == ""
    cost = {name: float(row["MFLOPs"]) for name, row in rows.items()}
    assert cost["softmax"] == pytest.approx((1024 * 64 * 64 * 8 + 1024**2 * 64 * 4) / 1e6, abs=0.1)
    assert 0 < cost["none"] < cost["linear"] < cost["sqa"] < cost["softmax"]


def test_task_pages_are_current():
    from zoo.cli.task_pages import task_pages

    pages = task_pages()
    for path, text in pages.items():
        assert path.read_text() == text, f"{path.name}; run: python -m zoo docs"
    assert {p.name for p in pages} == {p.name for p in (ROOT / "docs" / "tasks").iterdir()}


def test_readme_opens_with_the_two_commands_and_its_python_runs():
    text = (ROOT / "README.md").read_text()
    commands = [line.strip() for line in text.splitlines() if line.startswith("    ")][:2]
    assert commands == [
        "pip install -e . && python train.py task=vit attention=mala",
        'pip install -e ".[dev]" && pytest -n 2',
    ]
    for block in re.findall(r"```python\n(.*?)```", text, re.S):
        exec(compile(block, "README.md", "exec"), {})


def test_no_registry_host_is_named():
    pattern = re.compile(r"pythonhosted|pypi\.org/simple|--index-url|--extra-index-url")
    for path in [*SOURCES, ROOT / "pyproject.toml", ROOT / "README.md", ROOT / ".ci" / "run"]:
        assert not pattern.search(path.read_text()), path


@pytest.mark.parametrize("group", ["task", "experiment"])
def test_every_configuration_composes(group):
    import train  # registers the resolver

    assert train
    for file in sorted((ROOT / "conf" / group).glob("*.yaml")):
        GlobalHydra.instance().clear()
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            cfg = compose("config", [f"{group}={file.stem}", "attention=mala"])
        OmegaConf.resolve(cfg)
        assert cfg.attention.name == "mala" and cfg.task.kind and cfg.model.name and cfg.data.name
        assert get_task(cfg.task.kind).data_kind in (None, get_data(cfg.data.name).kind), file.stem
        assert cfg.attention.strict is False


@pytest.mark.parametrize("group", ["attention", "data", "model", "task"])
def test_defaults_have_the_types_of_the_arguments(group):
    """What a user may give is checked by the same annotations."""
    find = {"attention": get_attention, "data": get_data, "model": get_model, "task": get_task}[group]
    for file in sorted((ROOT / "conf" / group).glob("*.yaml")):
        options = OmegaConf.to_container(OmegaConf.load(file))
        options = options["task"] if group == "task" else options
        check_types(group, find(options["kind" if group == "task" else "name"]), options)


@pytest.mark.parametrize(
    "file", sorted((ROOT / "conf").rglob("*.yaml")), ids=lambda p: str(p.relative_to(ROOT))
)
def test_every_yaml_line_has_a_comment(file):
    """Experiments list changes to commented defaults and need none."""
    if file.parent.name in ("experiment", "sweep") or file.name == "config.yaml":
        return
    inside_defaults = False
    for line in file.read_text().splitlines():
        if re.match(r"^defaults:", line):
            inside_defaults = True
        elif inside_defaults and line and not line.startswith((" ", "-")):
            inside_defaults = False
        if inside_defaults or not re.match(r"^\s*[\w@/]+: +\S", line):
            continue
        if re.match(r"^(name|kind):|^  (name|kind):", line) or file.parent.name in ("trainer", "task"):
            continue
        assert "#" in line, f"{file.name}: no comment: {line}"
