"""Small promises of the engine: draws of summed batches, time over resumes, the end of the schedule."""

from types import SimpleNamespace

import torch

from tasks.base import ZooTask
from tasks.engine.callbacks import SeedEachStep, Speed


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
