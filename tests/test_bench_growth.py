"""The benchmarks by length: what they time is right, what they count is counted, what they fit is fitted."""

import csv
import math

import pytest
import torch
import torch.nn.functional as F

from zoo.__main__ import main
from zoo.attention import Pattern, get_attention, list_attention
from zoo.bench import growth, masks
from zoo.bench.efficiency import contestant


def test_peak_memory_of_what_is_known():
    """Two products of 1 MiB at a time, one of them freed before the third is made."""
    x = torch.randn(512, 512)

    def call():
        a = x @ x
        b = a + 1
        del a
        return b * 2

    assert growth.peak_mib(call) == pytest.approx(2.0, abs=0.01)


@pytest.mark.parametrize(
    "mine, wanted",
    [
        ({1: 2.0, 2: 2.0, 4: 2.0}, math.sqrt(2) * 1.0),  # equal to N^2 at sqrt(2)
        ({1: 0.5, 2: 0.5, 4: 0.5}, 1.0),
        ({1: 20.0, 2: 20.0, 4: 20.0}, math.inf),
        ({1: 0.5, 2: 8.0, 4: 4.0}, 2 ** (1 + math.log(2) / math.log(8))),  # the last crossing counts
        ({8: 1.0}, math.inf),
    ],
)
def test_crossover(mine, wanted):
    assert growth.crossover(mine, {1: 1.0, 2: 4.0, 4: 16.0}) == pytest.approx(wanted)


def test_climbing_stops_before_it_costs_too_much(monkeypatch):
    monkeypatch.setattr(growth, "LARGEST_MIB", 3.0)
    x = torch.ones(1, requires_grad=True)
    build = lambda n: {
        "square": growth.Contestant(lambda: x * torch.ones(n, n), [x]),
        "line": growth.Contestant(lambda: x * torch.ones(n), [x]),
    }
    found = growth.climb(build, [128, 256, 512, 1024], ("forward", growth.BOTH), rounds=3, budget_s=1)
    assert list(found["line"].memory) == [128, 256, 512, 1024] == list(found["line"].times["forward"])
    assert list(found["square"].memory) == [128, 256]


@pytest.mark.parametrize("kind", masks.KINDS)
def test_masks_hide_what_they_say(kind):
    """Ours equals SDPA with the dense mask, whose rows all see something and, but for `full`, not everything."""
    tokens = 640  # wider than the window and than the chosen blocks
    ours, mask = masks.KINDS[kind](tokens, torch.device("cpu"))
    q, k, v = (torch.randn(1, masks.HEADS, tokens, 16, requires_grad=True) for _ in range(3))
    found, wanted = ours(q, k, v), F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    upstream = torch.randn_like(found)
    for a, b in zip(*(torch.autograd.grad(o, (q, k, v), upstream) for o in (found, wanted)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
    assert mask.any(1).all() and bool(mask.all()) == (kind == "full")


@pytest.mark.parametrize("pattern", list(Pattern))
def test_every_variant_can_be_timed(pattern):
    for name in list_attention():
        if pattern in get_attention(name).capabilities.patterns:
            growth.both(contestant(name, pattern, 64))()


def test_commands_write_one_long_table(tmp_path, capsys):
    path = tmp_path / "efficiency.csv"
    arguments = ["--no-tests", "--rounds", "3", "--lengths", "64", "128"]
    own = ["--only", "linear", "mala", "--patterns", "self", "cross", "--csv", str(path)]
    assert main(["bench", "efficiency", *arguments, *own]) == 0
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    assert {r["provider"] for r in rows} == {"softmax", "linear", "mala"}
    metrics = {"time", "peak memory", "exponent of time", "exponent of memory", "crossover of time"}
    assert metrics <= {r["metric"] for r in rows} and all(
        float(r["p50"]) >= 0 for r in rows if r["unit"] == "ms"
    )
    assert {r["shape"].split()[0] for r in rows} == {"self", "cross"}
    assert path.with_suffix(".png").stat().st_size > 10_000
    path = tmp_path / "masks.csv"
    assert main(["bench", "masks", *arguments, "--only", "causal", "document", "--csv", str(path)]) == 0
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    causal = [r for r in rows if r["shape"].startswith("causal") and r["metric"] == "time"]
    assert {r["provider"] for r in causal} == {"zoo", "torch.SDPA dense mask", "torch.SDPA"}
    assert {r["mode"] for r in causal} == {"forward", "backward"}
    share = next(r for r in rows if r["metric"] == "visible pairs" and "causal 1x4x64" in r["shape"])
    assert float(share["p50"]) == pytest.approx(65 / 128, abs=1e-3)


@pytest.mark.parametrize("what, selection", [("efficiency", "tests/attention"), ("masks", "tests/kernels")])
def test_nothing_is_timed_while_tests_fail(what, selection, monkeypatch, capsys):
    import subprocess

    from zoo.cli import bench

    asked = []

    def red(command, **_):
        asked.append(command)
        return subprocess.CompletedProcess(command, 1, stdout="1 failed", stderr="")

    monkeypatch.setattr(bench.subprocess, "run", red)
    assert main(["bench", what, "--lengths", "64"]) == 2
    assert "no timing while tests fail" in capsys.readouterr().err and selection in asked[0]


@pytest.mark.parametrize(
    "what, name, near",
    [
        ("ops", "lineer", "linear"),
        ("ops-memory", "delat", "delta"),
        ("efficiency", "malla", "mala"),
        ("masks", "casual", "causal"),
        ("memory", "gman_stp", "gman_step"),
    ],
)
def test_unknown_names_are_said_before_anything_runs(what, name, near, monkeypatch, capsys):
    from zoo.cli import bench

    monkeypatch.setattr(bench, "require_green", lambda _: pytest.fail("tests ran first"))
    assert main(["bench", what, "--only", name]) == 2
    said = capsys.readouterr().err
    assert repr(name) in said and repr(near) in said and "Traceback" not in said


def test_names_where_there_are_none_to_choose_are_refused(capsys):
    for command in (["sensors"], ["--task", "vit"]):
        assert main(["bench", *command, "--only", "mala"]) == 2
        assert "leave --only out" in capsys.readouterr().err
    assert main(["bench", "efficiency", "--no-tests", "--patterns", "crooss"]) == 2
    assert "did you mean 'cross'" in capsys.readouterr().err
    only = ["--only", "decay step by step", "--lengths", "9000"]
    assert main(["bench", "ops", "--no-tests", *only]) == 2
    assert "shorter --lengths" in capsys.readouterr().err
