"""Tensors that lie with several processes, a share with each: put together, and shared out."""

from typing import Any

import torch
from torch import Tensor


def is_share(value: Any) -> bool:
    """Whether a value is a tensor of which each process holds a share (a DTensor)."""
    return hasattr(value, "full_tensor")


def whole(value: Any) -> Any:
    """Nested plain data with every sharded tensor put together; all processes must call it."""
    if is_share(value):
        return value.full_tensor()
    if isinstance(value, dict):
        return {key: whole(one) for key, one in value.items()}
    return [whole(one) for one in value] if isinstance(value, list | tuple) else value


def like(value: Tensor, p: Any) -> Tensor:
    """A whole tensor that every process has, shared out as p is."""
    if not is_share(p):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(p.device), p.device_mesh, p.placements, src_data_rank=None)  # each takes its own: no message


def states_like(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """An optimiser's saved state, each tensor shaped as a parameter shared out as that is and laid out in memory as that is.

    Fused optimisers go through the memory of parameter and moments side by side, whatever their strides.
    """
    if "state" not in state:  # of several joined, whose parameters are not sharded
        return state
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    held = {place: {name: moment_like(one, parameters[place]) for name, one in kept.items()} for place, kept in state["state"].items()}
    return {**state, "state": held}


def moment_like(one: Any, p: Tensor) -> Any:
    """A value of a parameter's state as the parameter is, if it is a tensor of its shape."""
    if not isinstance(one, Tensor) or one.shape != p.shape:
        return one
    return like(one, p) if is_share(p) else torch.empty_like(p, dtype=one.dtype).copy_(one)
