"""The few collectives that training needs; each is the identity in a single process."""

import os
from collections.abc import Mapping
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from torch import Tensor

from ldm.errors import UserError


def is_single_process() -> bool:
    """Whether this process is the only one."""
    return not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1)


def all_reduce_mean(x: Tensor) -> Tensor:
    """Mean of x over all processes, without gradient."""
    if is_single_process():
        return x.detach()
    x = x.detach().clone()
    dist.all_reduce(x)
    return x / dist.get_world_size()


def all_reduce_sum(x: Tensor) -> Tensor:
    """Sum of x over all processes, without gradient, where x is."""
    if is_single_process():
        return x.detach()
    total = x.detach().to("cuda" if dist.get_backend() == "nccl" else x.device, copy=True)
    dist.all_reduce(total)
    return total.to(x.device)


def destroy_process_group() -> None:
    """End the process group: from here on each process is alone, and what one of them measures waits for no other."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def all_reduce_max(x: Tensor) -> Tensor:
    """The largest x of all processes, elementwise."""
    if is_single_process():
        return x
    x = x.clone()
    dist.all_reduce(x, dist.ReduceOp.MAX)
    return x


def chief_decides(flag: bool, device: torch.device) -> bool:
    """The flag of the first process, on all of them; the others give False."""
    return flag if is_single_process() else bool(all_reduce_max(torch.tensor(int(flag), device=device)))


def all_gather_objects(value: Any) -> list[Any]:
    """A plain value of every process, in the order of the ranks."""
    if is_single_process():
        return [value]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


class EveryGradient(L.Callback):
    """Ends a training with DDP whose step gives some parameter no gradient, which DDP then does not average with those around it.

    Raises UserError naming them.
    """

    def on_before_optimizer_step(self, trainer: L.Trainer, lit: L.LightningModule, optimizer: Any) -> None:
        names = [name for name, p in lit.named_parameters() if p.requires_grad and p.grad is None]
        if names:
            shown = f"{', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
            remedy = "set has_unused_parameters = True on the class of the module that holds them"
            raise UserError(f"trainer.strategy=ddp: the loss does not depend on {shown} in this step; {remedy}")


class RankConsistencyCheck(L.Callback):
    """Lets a training begin only if all ranks are of one world and would do the same; facts: what must be equal, by name.

    Raises UserError naming what differs.
    """

    def __init__(self, facts: Mapping[str, Any]):
        self.facts = dict(facts)

    def on_fit_start(self, trainer: L.Trainer, lit: L.LightningModule) -> None:
        facts = {"number of processes": os.environ.get("WORLD_SIZE", str(trainer.world_size)), **self.facts}
        for rank, other in enumerate(all_gather_objects(facts)):
            for name, value in other.items():
                if value != facts[name]:
                    mine = trainer.global_rank
                    raise UserError(
                        f"ranks {mine} and {rank} differ in the {name} ({facts[name]}, {value}): start all alike"
                    )
        ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        if trainer.world_size != ranks:
            raise UserError(
                f"a trainer for {trainer.world_size} processes, but {ranks} are there: start as many as trainer.devices says"
            )
