"""Tensors that lie with several processes, a share with each: put together, and shared out."""

from typing import Any

import torch
from torch import Tensor


def is_dtensor(value: Any) -> bool:
    """Whether a value is a tensor of which each process holds a share (a DTensor)."""
    return hasattr(value, "full_tensor")


def full_tensors(value: Any) -> Any:
    """Nested plain data with every sharded tensor put together; all processes must call it."""
    if is_dtensor(value):
        return value.full_tensor()
    if isinstance(value, dict):
        return {key: full_tensors(one) for key, one in value.items()}
    return [full_tensors(one) for one in value] if isinstance(value, list | tuple) else value


def distribute_like(value: Tensor, p: Any) -> Tensor:
    """A whole tensor that every process has, sharded as p is, each shard laid out in memory as that of p."""
    if not is_dtensor(p):
        return value
    from torch.distributed.tensor import DTensor, distribute_tensor

    shard = distribute_tensor(
        value.to(p.device), p.device_mesh, p.placements, src_data_rank=None
    ).to_local()  # no message is sent
    local = match_layout(shard, p.to_local())
    return DTensor.from_local(local, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride())


def match_layout(value: Tensor, p: Tensor) -> Tensor:
    """A tensor of the shape of p, on the device of p and with its strides."""
    return torch.empty_like(p, dtype=value.dtype).copy_(value)


def distribute_optimizer_state(state: dict[str, Any], optimizer: Any) -> dict[str, Any]:
    """An optimiser's state_dict with each tensor on the device of its parameter, sharded and laid out in memory as that is.

    Whatever wrote it: fused optimisers go through the memory of parameter and moments side by side, whatever their strides.
    optimizer: one, or several that step as one, which are its `optimizers`, as the dicts in state["optimizers"] are theirs.
    """
    if "optimizers" in state:
        pairs = zip(state["optimizers"], optimizer.optimizers, strict=True)
        return {**state, "optimizers": [distribute_optimizer_state(one, other) for one, other in pairs]}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    moments = {
        number: {name: moment_like(value, parameters[number]) for name, value in values.items()}
        for number, values in state["state"].items()
    }
    return {**state, "state": moments}


def moment_like(value: Any, p: Tensor) -> Any:
    """A value of a parameter's state as the parameter is, if it is a tensor of its shape; torch sees to numbers, as the step is."""
    if not isinstance(value, Tensor) or value.ndim == 0 or value.shape != p.shape:
        return value
    return distribute_like(value, p) if is_dtensor(p) else match_layout(value, p)
