"""Largest batch of each bucket that a training step fits into a memory limit."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from data.speech_bucketing import Bucket, search_batch_size

if TYPE_CHECKING:
    from tasks.asr import SpeechToText

MIB = 2**20


def step_memory_mib(task: SpeechToText, size: int, duration_s: float, tokens: int) -> float:
    """Memory of one training step on synthetic utterances of the bucket's largest duration and length.

    On a GPU the peak that the allocator saw, infinite when it ran out; on a CPU the tensors that autograd keeps for the
    backward pass, weights, gradients and the optimiser's two moments.

    Args:
        task: Model and losses.
        size: Utterances in the batch.
        duration_s: Of each.
        tokens: Of each.
    """
    device = task.device
    samples = max(1, round(duration_s * task.data.sample_rate))
    batch = {
        "audio": torch.zeros(size, samples, device=device),
        "audio_length": torch.full((size,), samples, device=device),
        # Alternating, so that CTC needs no blanks between repeats.
        "tokens": (3 + torch.arange(tokens, device=device) % 2).expand(size, -1).contiguous(),
        "token_length": torch.full((size,), tokens, device=device),
    }
    fixed = 4 * sum(p.numel() * p.element_size() for p in task.model.parameters()) / MIB
    training = task.model.training
    task.model.train()
    try:
        if device.type == "cuda":
            return _cuda_peak_mib(task, batch)
        return fixed + _saved_mib(task, batch)
    finally:
        task.model.train(training)
        task.reset_padding()


def _saved_mib(task: SpeechToText, batch: dict[str, Tensor]) -> float:
    storages: dict[int, int] = {}
    own = {p.untyped_storage().data_ptr() for p in task.model.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = sum(task.losses(batch).values())
    total = sum(storages.values()) / MIB
    del loss
    return total


def _cuda_peak_mib(task: SpeechToText, batch: dict[str, Tensor]) -> float:
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    try:
        sum(task.losses(batch).values()).backward()
        # The optimiser's moments appear with its first step.
        moments = 2 * sum(p.numel() * p.element_size() for p in task.model.parameters())
        return (torch.cuda.max_memory_allocated() + moments) / MIB
    except torch.cuda.OutOfMemoryError:
        return float("inf")
    finally:
        task.model.zero_grad(set_to_none=True)


def search_batch_sizes(
    task: SpeechToText, buckets: list[Bucket], limit_mib: float, *, tolerance: float = 0.05
) -> list[int]:
    """Batch size of each bucket, the largest within `tolerance` that fits into `limit_mib`; never more than its members.

    Raises:
        ConfigError: One utterance of a bucket does not fit.
    """
    from zoo.errors import ConfigError

    sizes = []
    for bucket in buckets:

        def fits(size: int, bucket: Bucket = bucket) -> bool:
            return step_memory_mib(task, size, task.data.longest_s(bucket), bucket.max_tokens) <= limit_mib

        size = search_batch_size(fits, tolerance=tolerance, limit=len(bucket.members))
        if size == 0:
            raise ConfigError(
                f"task.batch_memory_mib={limit_mib}: not even one utterance of {task.data.longest_s(bucket):.1f} s fits; raise it, "
                "or lower data.max_s"
            )
        sizes.append(size)
    return sizes
