"""Collective operations and checks across ranks; each collective is the identity in a single process."""

import os
from collections.abc import Mapping
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from torch import Tensor

from ldm.errors import UserError


def is_single_process() -> bool:
    """Return whether this process is the only one."""
    return not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1)


def all_reduce_mean(x: Tensor) -> Tensor:
    """Return the mean of x over all processes, without gradient."""
    if is_single_process():
        return x.detach()
    x = x.detach().clone()
    dist.all_reduce(x)
    return x / dist.get_world_size()


def all_reduce_sum(x: Tensor) -> Tensor:
    """Return the sum of x over all processes, without gradient, on the device of x."""
    if is_single_process():
        return x.detach()
    total = x.detach().to("cuda" if dist.get_backend() == "nccl" else x.device, copy=True)
    dist.all_reduce(total)
    return total.to(x.device)


def destroy_process_group() -> None:
    """End the process group, so that a process that measures or writes afterwards waits for no other."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def all_reduce_max(x: Tensor) -> Tensor:
    """Return the elementwise maximum of x over all processes."""
    if is_single_process():
        return x
    x = x.clone()
    dist.all_reduce(x, dist.ReduceOp.MAX)
    return x


def chief_decides(flag: bool, device: torch.device) -> bool:
    """Return the first process's flag on all processes; the others must pass False."""
    return flag if is_single_process() else bool(all_reduce_max(torch.tensor(int(flag), device=device)))


def all_gather_objects(value: Any) -> list[Any]:
    """Return a picklable value of every process, in the order of the ranks."""
    if is_single_process():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


class EveryGradient(L.Callback):
    """Check that every parameter has a gradient, for a training with DDP that does not search for unused parameters.

    DDP would not average the gradients in the bucket of such a parameter.  Raises UserError naming the parameters.
    """

    def on_before_optimizer_step(self, trainer: L.Trainer, lit: L.LightningModule, optimizer: Any) -> None:
        names = [name for name, p in lit.named_parameters() if p.requires_grad and p.grad is None]
        if names:
            shown = f"{', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
            remedy = "set has_unused_parameters = True on the class of the module that holds them"
            raise UserError(f"trainer.strategy=ddp: the loss does not depend on {shown} in this step; {remedy}")


class RankConsistencyCheck(L.Callback):
    """Check before the first step that all ranks belong to one process group and would do the same.

    facts: values that must be equal, by name.  Raises UserError naming the one that differs.
    """

    def __init__(self, facts: Mapping[str, Any]):
        self.facts = dict(facts)

    def on_fit_start(self, trainer: L.Trainer, lit: L.LightningModule) -> None:
        facts = {"number of processes": os.environ.get("WORLD_SIZE", str(trainer.world_size)), **self.facts}
        for rank, other in enumerate(all_gather_objects(facts)):
            for name, value in other.items():
                if value != facts[name]:
                    ranks = f"ranks {trainer.global_rank} and {rank}"
                    raise UserError(f"{ranks} differ in the {name} ({facts[name]}, {value}): start all alike")
        running = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        if trainer.world_size != running:
            raise UserError(
                f"the trainer is for {trainer.world_size} processes, but {running} are running: "
                "start as many as trainer.devices"
            )
