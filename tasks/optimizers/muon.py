"""Muon for the weights of hidden layers, AdamW for everything else, as one optimiser with one schedule.

Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon): the step of a matrix is its momentum with all singular values set to
about one, by five Newton-Schulz iterations. Size of the step after Liu et al., arXiv:2502.16982: elements as large as AdamW's,
so one learning rate can serve both.
Differs from `torch.optim.Muon` in: matrices of one shape are iterated together (half the time on small networks), kernels of
convolutions count as matrices, AdamW is built in, parameters may be shared out (FSDP2; every process then iterates the whole
matrix), and CPUs without bfloat16 iterate in float32.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim.adamw import adamw

# Of Jordan's quintic polynomial: fast at small singular values, coarse at one.
COEFFICIENTS = (3.4445, -4.775, 2.0315)
ITERATIONS = 5
ADAM_RMS = 0.2  # typical root mean square of an AdamW step over its learning rate


class Muon(torch.optim.Optimizer):
    """Muon in parameter groups with `matrix=True`, AdamW in the others.

    Args:
        params: Parameters or groups.
        lr: Step size.
        betas: AdamW's moment decays.
        momentum: Of the matrices, with Nesterov's look ahead.
        weight_decay: Decoupled.
        eps: AdamW's.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        momentum: float = 0.95,
        weight_decay: float = 0.01,
        eps: float = 1e-8,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "momentum": momentum, "weight_decay": weight_decay, "eps": eps}
        # `fused` makes load_state_dict keep AdamW's count of steps beside its parameter.
        super().__init__(params, {**defaults, "matrix": False, "fused": True})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                (self._muon if group["matrix"] else self._adamw)(params, group)
        return loss

    def _muon(self, params: list[Tensor], group: dict[str, Any]) -> None:
        alike: dict[Any, list[Tensor]] = defaultdict(list)
        for p in params:
            alike[p.shape, p.dtype, p.device].append(p)
        torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        for same in alike.values():
            momenta, gradients = self._kept(same, "momentum"), [p.grad for p in same]
            torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
            ahead = torch._foreach_lerp(gradients, momenta, group["momentum"])
            whole = torch.stack([x.full_tensor() if isinstance(x, DTensor) else x for x in ahead])
            steps = orthogonal(whole.flatten(2)).to(whole.dtype)
            size = group["lr"] * ADAM_RMS * max(steps.shape[1:]) ** 0.5
            moves = [_shared_as(p, x) for p, x in zip(same, steps.view_as(whole), strict=True)]
            torch._foreach_add_(same, moves, alpha=-size)

    def _adamw(self, params: list[Tensor], group: dict[str, Any]) -> None:
        for p in params:
            if "step" not in self.state[p]:
                self.state[p]["step"] = torch.zeros((), device=p.device)
        adamw(
            params,
            [p.grad for p in params],
            self._kept(params, "mean"),
            self._kept(params, "square"),
            [],
            [self.state[p]["step"] for p in params],
            fused=group["fused"],
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )

    def _kept(self, params: list[Tensor], name: str) -> list[Tensor]:
        """One tensor of the state for each parameter, zeros at first."""
        for p in params:
            if name not in self.state[p]:
                self.state[p][name] = torch.zeros_like(p)
        return [self.state[p][name] for p in params]


def _shared_as(param: Tensor, x: Tensor) -> Tensor:
    """`x`, or the share of it that this process has of `param` under trainer=fsdp."""
    if not isinstance(param, DTensor):
        return x
    return distribute_tensor(x, param.device_mesh, param.placements, src_data_rank=None)


def orthogonal(x: Tensor) -> Tensor:
    """Nearest orthogonal matrices, roughly: singular values between 0.7 and 1.2, vectors kept.

    Args:
        x: [K, A, B].

    Returns:
        [K, A, B], in bfloat16 where the device multiplies it fast.
    """
    x = x.to(torch.bfloat16 if _fast_bfloat16(x.device) else torch.float32)
    wide = x.shape[1] <= x.shape[2]
    x = x if wide else x.mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if wide else x.mT


def _fast_bfloat16(device: torch.device) -> bool:
    return device.type != "cpu" or torch.cpu._is_avx512_bf16_supported()


def split_matrices(groups: list[dict[str, Any]], model: nn.Module, lr: float) -> list[dict[str, Any]]:
    """Groups of parameters, each cut into the weights of hidden layers, marked as `matrix` and of rate `lr`, and the rest.

    Hidden layers are linear maps and ungrouped convolutions, but for those that lead to an output, which are called "head" or end
    in "_head", and those tied to an embedding.
    """
    tables = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    hidden = {
        id(module.weight)
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d))
        and getattr(module, "groups", 1) == 1
        and not any(part.endswith("head") for part in name.split("."))
    }
    hidden -= tables
    split = []
    for group in groups:
        matrices = [p for p in group["params"] if id(p) in hidden]
        rest = [p for p in group["params"] if id(p) not in hidden]
        split += [{**group, "params": matrices, "matrix": True, "lr": lr}] if matrices else []
        split += [{**group, "params": rest, "matrix": False}] if rest else []
    return split
