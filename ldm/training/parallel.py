"""The few collectives that training needs; each is the identity in a single process."""

import torch.distributed as dist
from torch import Tensor


def mean_over_ranks(x: Tensor) -> Tensor:
    """Mean of x over all processes, without gradient."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return x.detach()
    x = x.detach().clone()
    dist.all_reduce(x)
    return x / dist.get_world_size()


def sum_over_ranks(x: Tensor) -> Tensor:
    """Sum of x over all processes, without gradient, where x is."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return x.detach()
    total = x.detach().to("cuda" if dist.get_backend() == "nccl" else x.device, copy=True)
    dist.all_reduce(total)
    return total.to(x.device)


def disband() -> None:
    """End the process group: from here on each process is alone, and what one of them measures waits for no other."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
