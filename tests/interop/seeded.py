"""Weights and inputs that two programs can draw alike: by name, from a generator seeded with it."""

import hashlib
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn


def numbers(name: str, shape: Iterable[int]) -> Tensor:
    """Standard normal (shape), float32, the same for the same name."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "little")
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed))


def value(name: str, shape: Iterable[int]) -> Tensor:
    """A weight that keeps the scale of what passes through it, or a bias or norm that leaves nothing at zero."""
    shape = tuple(shape)
    if len(shape) > 1:
        return numbers(name, shape) * torch.Size(shape[1:]).numel() ** -0.5
    return numbers(name, shape) * 0.3 + float("norm" in name and name.endswith("weight"))


@torch.no_grad()
def fill(module: nn.Module) -> nn.Module:
    """The module with each parameter drawn by its name; ready to be asked."""
    for name, parameter in module.named_parameters():
        parameter.copy_(value(name, parameter.shape))
    return module.eval()


def state(shapes: Mapping[str, Iterable[int]]) -> dict[str, Tensor]:
    """The state dict that `fill` leaves in a module whose parameters have these names and shapes."""
    return {name: value(name, shape) for name, shape in shapes.items()}


def digest(shapes: Mapping[str, Iterable[int]]) -> str:
    """sha256 of all names and shapes."""
    lines = sorted(f"{name} {list(shape)}" for name, shape in shapes.items())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def some(tensor: Tensor, count: int = 24) -> list[float]:
    """Numbers spread over a tensor, first and last included."""
    flat = tensor.flatten().double()
    return flat[torch.linspace(0, len(flat) - 1, count).long()].tolist()
