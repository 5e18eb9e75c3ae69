"""Sharded tensors (DTensor): gathering the full tensor, and distributing one like another."""

from typing import Any

import torch
from torch import Tensor


def is_dtensor(value: Any) -> bool:
    """Return whether a value is a DTensor, a tensor of which each process has a shard."""
    return hasattr(value, "full_tensor")


def full_tensors(value: Any) -> Any:
    """Return nested plain data with every DTensor replaced by its full tensor; all processes must call it."""
    if is_dtensor(value):
        return value.full_tensor()
    if isinstance(value, dict):
        return {key: full_tensors(item) for key, item in value.items()}
    return [full_tensors(item) for item in value] if isinstance(value, list | tuple) else value


def distribute_like(value: Tensor, p: Any) -> Tensor:
    """Shard a full tensor, which every process has, like the parameter p, with the memory layout of p's shards.

    Returns it unchanged if p is not sharded. No communication takes place.
    """
    if not is_dtensor(p):
        return value
    from torch.distributed.tensor import DTensor, distribute_tensor

    shard = distribute_tensor(
        value.to(p.device), p.device_mesh, p.placements, src_data_rank=None
    ).to_local()  # no message is sent
    local = match_layout(shard, p.to_local())
    return DTensor.from_local(local, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride())


def match_layout(value: Tensor, p: Tensor) -> Tensor:
    """Copy a tensor of the shape of p to the device of p, with the strides of p."""
    return torch.empty_like(p, dtype=value.dtype).copy_(value)


def distribute_optimizer_state(state: dict[str, Any], optimizer: Any) -> dict[str, Any]:
    """Return an optimiser's state_dict with each tensor on the device of its parameter, with its sharding and memory
    layout.

    The layout matters because fused optimisers traverse the memory of parameter and moments in parallel, whatever their
    strides.
    optimizer: one optimiser, or several that step together as its `optimizers`, whose states are in
    state["optimizers"].
    """
    if "optimizers" in state:
        pairs = zip(state["optimizers"], optimizer.optimizers, strict=True)
        return {**state, "optimizers": [distribute_optimizer_state(part, owner) for part, owner in pairs]}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    moments = {
        index: {name: moment_like(value, parameters[index]) for name, value in values.items()}
        for index, values in state["state"].items()
    }
    return {**state, "state": moments}


def moment_like(value: Any, p: Tensor) -> Any:
    """Distribute a value of a parameter's optimiser state like the parameter p, if it is a tensor of p's shape.

    Other values, such as the step count, are returned unchanged; torch moves them itself.
    """
    if not isinstance(value, Tensor) or value.ndim == 0 or value.shape != p.shape:
        return value
    return distribute_like(value, p) if is_dtensor(p) else match_layout(value, p)
