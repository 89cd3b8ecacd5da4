"""Statistics of the leaderboard against values worked out by hand."""

import pytest

from tasks.engine.comparison import compare
from tasks.engine.leaderboard import mean_interval, newest, summarise, tell_apart
from tasks.engine.leaderboard_figure import pareto
from tasks.engine.leaderboard_page import page
from tasks.engine.leaderboard_text import markdown
from tasks.engine.report import higher_is_better
from tasks.engine.statistics import compositional_index, paired_bootstrap, rank
from tasks.registry import get_task


def result(attention, seed, accuracy, task="vit"):
    return {
        "task": task,
        "data": "digits",
        "model": "vit",
        "attention": attention,
        "headline": [],
        "protocol": "equal_steps",
        "seed": seed,
        "monitor": "accuracy",
        "test": {"accuracy": accuracy},
        "baselines": {},
        "slots": [],
        "command": "c",
        "cost": {
            "parameters": 10,
            "flops": 1e6,
            "state_size": None,
            "peak_memory_mib": 1.0,
            "samples_per_s": 5.0,
        },
    }


def test_mean_and_interval():
    mean, half = mean_interval([1.0, 2.0, 3.0])
    # Student's t, two degrees of freedom: 4.3027 times deviation 1 over the root of 3.
    assert mean == 2.0 and half == pytest.approx(4.3027 / 3**0.5, rel=1e-4)
    assert mean_interval([0.5]) == (0.5, None)


@pytest.mark.parametrize(
    "kind", ["classification", "ctr", "mqar", "operator", "recommendation", "tabular_multitask", "traffic"]
)
def test_the_table_and_the_task_agree_on_which_way_is_better(kind):
    task = get_task(kind)
    assert higher_is_better(task.monitor) == (task.mode == "max")


def test_rows_are_grouped_and_ordered_by_the_metric():
    rows = summarise(
        [result("a", 0, 0.5), result("b", 0, 0.9), result("a", 1, 0.7), result("c", 0, 0.1, "traffic")]
    )
    assert [(r["task"], r["attention"], r["seeds"]) for r in rows] == [
        ("traffic", "c", 1),
        ("vit", "b", 1),
        ("vit", "a", 2),
    ]
    assert rows[2]["accuracy"] == pytest.approx(0.6) and rows[1]["accuracy_ci95"] is None
    assert rows[0]["state_size"] is None


def test_settings_beyond_the_seed_make_rows_of_their_own():
    def config(**changes):
        base = {"seed": 0, "trainer": {"threads": 1}, "task": {"lr": 0.1}, "attention": {"name": "mala"}}
        return base | changes

    runs = [
        result("mala", 0, 0.5) | {"config": config()},
        result("mala", 1, 0.6) | {"config": config(seed=1, trainer={"threads": 2})},
        result("mala", 0, 0.9) | {"config": config(task={"lr": 0.2}, attention={"name": "mala", "new": 1})},
    ]
    tell_apart(runs[:2])
    assert [r["attention"] for r in runs[:2]] == ["mala", "mala"], "seeds and threads tell nothing apart"
    tell_apart(runs)
    rows = summarise(runs)
    assert [(r["attention"], r["seeds"]) for r in rows] == [
        ("mala (task.lr=0.2)", 1),
        ("mala (task.lr=0.1)", 2),
    ]
    slots = [
        result("mala", s, 0.5) | {"config": c}
        for s, c in enumerate(({"cross_attention": {"name": "gla"}}, {}))
    ]
    tell_apart(slots)
    assert [r["attention"] for r in slots] == ["mala (cross_attention=gla)", "mala (cross_attention=None)"]
    searched = [
        result("mala", s, 0.5) | {"config": {"task": {"lr": s}}, "search": {"best": s}} for s in (1, 2)
    ]
    tell_apart(searched)
    assert {r["attention"] for r in searched} == {"mala"}
    unlike = [
        result(name, 0, 0.5) | {"config": {"trainer": {"max_epochs": e}, "attention": {"name": name}}}
        for name, e in (("softmax", 36), ("mala", 2))
    ]
    tell_apart(unlike)
    labels = [r["attention"] for r in unlike]
    assert labels == ["softmax (trainer.max_epochs=36)", "mala (trainer.max_epochs=2)"], (
        "ranked, but not alike"
    )


def test_a_repeated_seed_counts_once():
    runs = [
        result("mala", seed, value) | {"written": when}
        for seed, value, when in ((0, 0.5, 2.0), (0, 0.9, 1.0), (1, 0.7, 1.0), (1, 0.6, 3.0))
    ]
    (row,) = summarise(newest(runs))
    assert row["seeds"] == 2 and row["accuracy"] == pytest.approx(0.55)


def test_pareto_front():
    points = [(1, 0.5), (2, 0.4), (3, 0.8), (3, 0.7), (4, 0.8)]
    assert pareto(points, larger_is_better=True) == [0, 2]
    assert pareto(points, larger_is_better=False) == [0, 1]


def test_ranks_and_critical_difference():
    """Demsar's worked example has k = 4 and N = 14: critical difference 1.25 at 5 %."""
    scores = {f"task{i}": {"a": 4.0, "b": 3.0, "c": 2.0, "d": 1.0} for i in range(14)}
    ranking = rank(scores)
    assert ranking.ranks == {"a": 1.0, "b": 2.0, "c": 3.0, "d": 4.0}
    assert ranking.critical == pytest.approx(1.25, abs=0.01) and ranking.p < 1e-6
    assert ranking.tied_with_best == ["a", "b"]
    scores["task0"].pop("d")  # not everywhere: not ranked
    assert set(rank(scores).ranks) == {"a", "b", "c"}
    assert rank({"t": {"a": 1.0, "b": 1.0}}).ranks == {"a": 1.5, "b": 1.5}
    assert rank({"t": {"a": 1.0}}) is None and rank({}) is None


def test_paired_bootstrap_sees_what_pairing_shows():
    noise = {s: float(s) for s in range(5)}
    mean, low, high = paired_bootstrap({s: v + 0.1 for s, v in noise.items()}, noise)
    assert mean == pytest.approx(0.1) and low == pytest.approx(0.1) == pytest.approx(high)
    mean, low, high = paired_bootstrap({0: 1.0, 1: -1.0, 2: 0.0}, {0: 0.0, 1: 0.0, 2: 0.0})
    assert low < 0 < high
    assert paired_bootstrap({0: 1.0, 1: 1.0}, noise) is None


def test_compositional_index_by_hand():
    metrics = {
        "vit": {
            "accuracy": {"a": 1.0, "b": 0.0},
            "loss": {"a": -3.0, "b": -1.0},
        },  # z: a +1 and -1, b -1 and +1
        "pinn": {"rel_l2": {"a": -1.0, "b": -2.0, "c": -3.0}},  # z: +-1.2247
    }
    index = compositional_index(metrics)
    assert index["a"] == (pytest.approx(0.5 * 1.2247, abs=1e-4), 2)
    assert index["b"] == (pytest.approx(0.0), 2) and index["c"] == (pytest.approx(-1.2247, abs=1e-4), 1)
    assert list(index) == ["a", "b", "c"]


def test_every_cell_of_the_matrix_is_a_number_or_a_reason(tmp_path):
    results = [result(a, s, v + s / 10) for a, v in (("softmax", 0.5), ("mala", 0.7)) for s in range(3)]
    results += [result("softmax", 0, 0.2, "traffic")]
    results[0]["slots"] = [{"slot": "cross", "attention": "linear"}]
    failures = [
        {
            "task": "traffic",
            "attention": "mala",
            "seed": 0,
            "kind": "CapabilityError",
            "reason": "takes no bias",
        }
    ]
    rows = summarise(results)
    (comparison,) = compare(rows, results, failures)
    texts = {v: [c.text for c in cells] for v, cells in comparison.matrix.items()}
    assert comparison.tasks == ["traffic", "vit"]
    assert texts["mala"] == ["no result [1]", "0.8 ± 0.25"] and comparison.notes[0] == "takes no bias"
    assert texts["softmax"][1].startswith("0.6 ± 0.25 [2]") and "cross=linear" in comparison.notes[1]
    assert comparison.matrix["mala"][1].best and not comparison.matrix["softmax"][1].best
    assert comparison.against["vit", "mala"][0] == pytest.approx(0.2)
    text = markdown(rows, failures, results, [comparison])
    assert "| mala | no result [1] | **0.8 ± 0.25** |" in text and "[1] takes no bias" in text
    html = page(rows, failures, results, [comparison], None)
    assert "no result [1]" in html and html.count("<section") == 3
    assert comparison.ranking is None, "mala has no result in one of the tasks"


def test_a_report_over_nothing_leaves_nothing(tmp_path):
    from zoo.__main__ import main

    assert main(["report", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert not list(tmp_path.iterdir())
