"""Small promises of the engine: draws of summed batches, time over resumes, the end of the schedule."""

from types import SimpleNamespace

import torch

from tasks.base import ZooTask
from tasks.engine.callbacks import SeedEachStep, Speed, ValidateLast
from tasks.engine.report import print_result


def test_batches_of_one_step_draw_apart():
    trainer = SimpleNamespace(global_step=3, global_rank=0, accumulate_grad_batches=2)
    draws = []
    for batch in range(3):
        SeedEachStep(0).on_train_batch_start(trainer, None, None, batch)
        draws.append(float(torch.rand(())))
    assert draws[0] == draws[2] != draws[1]


def test_a_resumed_run_goes_on_counting():
    first, again = Speed(), Speed()
    first.samples, first.seconds = 8, 2.0
    again.load_state_dict(first.state_dict() | {"elapsed": 100.0})
    assert (again.samples, again.seconds) == (8, 2.0) and 100 < again.elapsed < 110


def test_steps_alone_end_the_schedule():
    trainer = SimpleNamespace(max_epochs=-1, max_steps=50)
    assert ZooTask.total_steps(SimpleNamespace(trainer=trainer)) == 50


def test_the_last_epoch_is_validated():
    trainer = SimpleNamespace(max_epochs=3, current_epoch=1, check_val_every_n_epoch=2)
    ValidateLast().on_train_epoch_start(trainer, None)
    assert trainer.check_val_every_n_epoch == 2
    trainer.current_epoch = 2
    ValidateLast().on_train_epoch_start(trainer, None)
    assert trainer.check_val_every_n_epoch == 1


def test_many_metrics_stay_readable(tmp_path, capsys):
    metrics = {f"a_long_metric_{i}": 0.123456 for i in range(14)}
    result = {
        "task": "asr",
        "data": "d",
        "model": "aed",
        "attention": "mala",
        "slots": [1],
        "test": metrics,
        "skipped": {},
    }
    cost = {"samples_per_s": 1.0, "parameters": 1, "flops": 1.0, "train_seconds": 1.0, "peak_memory_mib": 1.0}
    print_result(
        {**result, "baselines": {"most_common_text": {"a_long_metric_3": 0.5}}, "cost": cost}, tmp_path
    )
    out = capsys.readouterr().out
    assert "…" not in out and "most_common_text (baseline)" in out and out.count("0.1235") == 14
