"""`trainer=fsdp`: every process holds its share of the parameters, their gradients and the optimiser's state (FSDP2).

Checkpoints, averaged weights and the weights pair hold whole tensors, so a run may go on with any other trainer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from lightning import LightningModule
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from zoo.attention.base import Attention


class Sharded(ModelParallelStrategy):
    """Lightning's strategy with all processes on the data axis and one file a checkpoint, laid out as without sharing.

    Lightning numbers the optimiser's state by the model's order of parameters; here it is the optimiser's own order, as in every other
    checkpoint.
    """

    def __init__(self) -> None:
        super().__init__(save_distributed_checkpoint=False)

    def setup_environment(self) -> None:
        self._data_parallel_size, self._tensor_parallel_size = self.num_nodes * self.num_processes, 1
        super().setup_environment()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        optimizer = getattr(optimizer, "_optimizer", optimizer)  # out of Lightning's wrapper
        found = get_optimizer_state_dict(
            self.model, optimizer, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
        )
        if not found:  # the first process has it
            return found
        return _renamed(found, {name: i for i, name in enumerate(self._names(optimizer))})

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        checkpoint = self.checkpoint_io.load_checkpoint(checkpoint_path)
        load_whole_state(self.lightning_module, checkpoint["state_dict"])
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=False):
            state = _renamed(saved, dict(enumerate(self._names(optimizer))))
            options = StateDictOptions(full_state_dict=True)
            set_optimizer_state_dict(self.model, optimizer, state, options=options)
        return checkpoint

    def _names(self, optimizer: Optimizer) -> list[str]:
        """Names of the parameters in the optimiser's order."""
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        return [names[p] for group in optimizer.param_groups for p in group["params"]]


def _renamed(state: dict[str, Any], names: dict[Any, Any]) -> dict[str, Any]:
    """An optimiser's state with its parameters called otherwise."""
    groups = [{**g, "params": [names[p] for p in g["params"]]} for g in state["param_groups"]]
    return {"state": {names[p]: s for p, s in state["state"].items()}, "param_groups": groups}


def shard(task: LightningModule, mesh: DeviceMesh) -> None:
    """Share out the parameters of `task` over the processes of `mesh`; nothing happens the second time.

    Blocks (what a ModuleList holds around attention) gather their parameters one after the other, so that one block is whole at a
    time. The rest is whole during a step of the task and not just a call of its model: losses use tables and heads of the model outside
    `forward` too.
    """
    if isinstance(task, FSDPModule):
        return
    owners = Counter(id(p) for _, p in task.named_parameters(remove_duplicate=False))
    for module in reversed(list(task.modules())):  # what lies inside first
        if isinstance(module, nn.ModuleList):
            for block in module:
                if _is_block(block) and all(owners[id(p)] == 1 for p in block.parameters()):
                    fully_shard(block, mesh=mesh)
    fully_shard(task, mesh=mesh)
    for step in ("training_step", "validation_step", "test_step"):
        register_fsdp_forward_method(task, step)


def _is_block(module: nn.Module) -> bool:
    inner = (m for m in module.modules() if m is not module)
    return not isinstance(module, Attention) and any(isinstance(m, Attention) for m in inner)


def _shared_out(module: nn.Module) -> Iterator[FSDPModule]:
    return (m for m in module.modules() if isinstance(m, FSDPModule))


def own_parameters(task: LightningModule) -> list[nn.Parameter]:
    """The model's parameters as this process keeps them; after an evaluation some may still be whole."""
    for module in _shared_out(task):
        module.reshard()
    return list(task.model.parameters())


def make_whole(task: LightningModule) -> None:
    """Give every process all parameters, for what calls parts of the model on their own: figures, decoding token by token."""
    for module in _shared_out(task):
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()


def share_again(task: LightningModule) -> None:
    """Undo `make_whole`."""
    for module in _shared_out(task):
        module.reshard()
        module.set_reshard_after_forward(module is not task, recurse=False)


def whole(tensor: Tensor) -> Tensor:
    """`tensor` with the parts of all processes; every process has to ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def as_held(tensor: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor on the device of `parameter`, reduced to this process's part where `parameter` is."""
    if not isinstance(parameter, DTensor):
        return tensor.to(parameter.device)
    mesh, placements = parameter.device_mesh, parameter.placements
    return distribute_tensor(tensor.to(parameter.device), mesh, placements, src_data_rank=None)


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """The model's tensors, whole, on the CPU; every process has to ask."""
    return {name: whole(tensor.detach()).cpu() for name, tensor in model.state_dict().items()}


def load_whole_state(module: nn.Module, state: dict[str, Any], *, strict: bool = True) -> None:
    """Put whole tensors into a module, shared out or not."""
    held = module.state_dict()
    module.load_state_dict(
        {n: as_held(t, held[n]) if n in held else t for n, t in state.items()}, strict=strict
    )
