"""The trainable parameters and extra state of a module."""

from typing import Any

import torch
from torch import Tensor, nn

from ldm.checkpoint.dtensor import distribute_like
from ldm.errors import UserError


def trainable_parameters(module: nn.Module) -> dict[str, Tensor]:
    """Return the trainable parameters by name, which checkpoints contain; frozen parts are stored once, elsewhere."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


@torch.no_grad()
def load_trainable(module: nn.Module, state: dict[str, Tensor]) -> None:
    """Copy saved parameters into the module in place. Raises UserError unless names and shapes are the same."""
    live = trainable_parameters(module)
    mismatched = sorted(live.keys() ^ state.keys()) or [n for n in live if live[n].shape != state[n].shape]
    if mismatched:
        names = f"{', '.join(mismatched[:4])}{' ...' if len(mismatched) > 4 else ''}"
        raise UserError(f"the weights are of another architecture: {names} do not match")
    for name, p in live.items():
        p.copy_(distribute_like(state[name], p))


def extra_state(module: nn.Module) -> dict[str, Any]:
    """Return torch's extra state (`get_extra_state`) of each submodule that has one, by module name."""
    return {
        name: m.get_extra_state()
        for name, m in module.named_modules()
        if type(m).get_extra_state is not nn.Module.get_extra_state
    }
