"""Statistics of the leaderboard against values worked out by hand."""

import pytest

from tasks.engine.leaderboard import mean_interval, summarise
from tasks.engine.leaderboard_figure import pareto


def result(attention, seed, accuracy, task="vit"):
    return {
        "task": task,
        "data": "digits",
        "model": "vit",
        "attention": attention,
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


def test_pareto_front():
    points = [(1, 0.5), (2, 0.4), (3, 0.8), (3, 0.7), (4, 0.8)]
    assert pareto(points, larger_is_better=True) == [0, 2]
    assert pareto(points, larger_is_better=False) == [0, 1]
