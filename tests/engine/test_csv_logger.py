"""metrics.csv after kills: no row twice, none lost, no half row."""

import csv

from tasks.engine.csv_logger import MetricsCsv


def read(path):
    with open(path, newline="") as file:
        return [{k: v for k, v in row.items() if v} for row in csv.DictReader(file)]


def test_rows_are_appended_and_new_columns_rewrite(tmp_path):
    logger = MetricsCsv(tmp_path)
    for step in range(3):
        logger.log_metrics({"train/loss": step / 2}, step)
        logger.save()
    logger.log_metrics({"valid/loss": 7.0}, 2)
    logger.save()
    rows = read(tmp_path / "metrics.csv")
    assert [r.get("train/loss") for r in rows] == ["0.0", "0.5", "1.0", None] and rows[3][
        "valid/loss"
    ] == "7.0"


def test_resume_after_a_kill(tmp_path):
    logger = MetricsCsv(tmp_path)
    for step in range(5):
        logger.log_metrics({"train/loss": float(step), "lr": 1.0}, step)
        logger.save()
    path = tmp_path / "metrics.csv"
    path.write_text(path.read_text()[:-2])  # killed in the middle of the last row's last number
    again = MetricsCsv(tmp_path)
    again.rewind(3)
    assert [r["step"] for r in read(path)] == ["0", "1", "2"]
    again.rewind(4, {"train/loss": 3.0})  # the checkpoint's own row, killed before it was logged
    again.log_metrics({"train/loss": 4.0}, 4)
    again.save()
    assert [(r["step"], r["train/loss"]) for r in read(path)][-2:] == [("3", "3.0"), ("4", "4.0")]
    again.rewind(4, {"train/loss": 99.0})  # there already: the logged one stays
    assert [r["train/loss"] for r in read(path)] == ["0.0", "1.0", "2.0", "3.0"]
