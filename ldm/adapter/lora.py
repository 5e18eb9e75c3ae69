"""LoRA: to a weight its own, narrow correction, put into any network by the names of its layers (Hu et al. 2021).

The network stays the object it is, with its signature; what it computes with is W + scale * up @ down.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ldm.errors import ConfigError, UserError

LAYERS = (nn.Linear, nn.Conv2d)


@dataclass(frozen=True)
class LoRA:
    """The adapter of factors: `inject` with corrections that count alpha / rank (Hu et al. 2021, sec. 4.1).

    alpha: null for rank.  Raises ConfigError as `inject` does.
    """

    rank: int = 4
    alpha: float | None = None
    target_modules: Sequence[str] = ("*attention*",)

    def apply_to(self, model: Any, scale: float = 1.0) -> None:
        """Add fresh corrections, `scale` times as strong, to a model's network, all else frozen."""
        net = unwrap(model.denoiser.net)
        inject(net, self.rank, self.target_modules)
        set_scale(net, scale * self.scaling)

    @property
    def scaling(self) -> float:
        """What the product of the factors counts."""
        return 1.0 if self.alpha is None else self.alpha / self.rank


class LoRAParametrization(nn.Module):
    """W -> W + scale * up @ down for a weight W (out, in, ...) (Hu et al. 2021, eq. 3).

    down: (rank, in, ...).  up: (out, rank).  Raises ValueError for factors of another weight's shape.
    """

    def __init__(self, weight: Tensor, down: Tensor, up: Tensor, scale: float = 1.0):
        super().__init__()
        rank = len(down)
        if down.shape[1:] != weight.shape[1:] or up.shape != (len(weight), rank):
            raise ValueError(
                f"factors {list(down.shape)} and {list(up.shape)} are not of a weight {list(weight.shape)}"
            )
        self.down, self.up = nn.Parameter(down.to(weight)), nn.Parameter(up.to(weight))
        self.scale = scale

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.scale * (self.up @ self.down.flatten(1)).reshape(weight.shape)


def inject(
    net: nn.Module, rank: int = 4, where: Sequence[str] = ("*attention*",), generator: torch.Generator | None = None
) -> nn.Module:
    """The net, its own parameters frozen, a correction of that rank added to each layer whose name matches a pattern; it begins as nothing.

    where: as of file names, on names like down.0.layers.1.attention.blocks.0.self_attention.qkv.
    Raises ConfigError for a rank below 1, and where no linear or convolutional layer matches.
    """
    if rank < 1:
        raise ConfigError(f"rank={rank}: expected at least 1")
    found = {name: layer for name, layer in adaptable_layers(net) if any(fnmatch(name, pattern) for pattern in where)}
    if not found:
        some = ", ".join([name for name, _ in adaptable_layers(net)][:3])
        raise ConfigError(f"where={list(where)}: no layer has such a name; there are {some}, ...")
    net.requires_grad_(False)
    for layer in found.values():
        weight = layer.weight
        wide = min(rank, len(weight), weight[0].numel())
        down = torch.randn(wide, *weight.shape[1:], generator=generator) * weight[0].numel() ** -0.5
        add(layer, LoRAParametrization(weight, down, torch.zeros(len(weight), wide)))
    return net


def load_factors(net: nn.Module, factors: Mapping[str, Tensor], scale: float = 1.0) -> nn.Module:
    """The net with saved corrections added, beside those that it has already.

    factors: what `factors` gave, LAYER.down and LAYER.up for each layer.  Raises UserError for those of another network.
    """
    there = dict(adaptable_layers(net))
    names = sorted({name.rpartition(".")[0] for name in factors})
    for name in names:
        if name not in there or {f"{name}.down", f"{name}.up"} - factors.keys():
            why = "lacks a factor" if name in there else "is not here"
            raise UserError(f"this LoRA is of another network: it corrects {name}, which {why}")
    made = {}
    for name in names:
        try:
            made[name] = LoRAParametrization(there[name].weight, factors[f"{name}.down"], factors[f"{name}.up"], scale)
        except ValueError as error:
            raise UserError(f"this LoRA is of another network: {name}: {error}") from None
    for name, correction in made.items():
        add(there[name], correction)
    return net


def export_factors(net: nn.Module, which: int = -1) -> dict[str, Tensor]:
    """The factors of a net's corrections, LAYER.down and LAYER.up; which: of several in a layer."""
    made: dict[str, Tensor] = {}
    for name, corrections in lora_layers(net).items():
        made |= {f"{name}.down": corrections[which].down.detach(), f"{name}.up": corrections[which].up.detach()}
    return made


def set_scale(net: nn.Module, scale: float, which: int = -1) -> None:
    """Let a net's corrections count `scale` times; which: of several in a layer."""
    for corrections in lora_layers(net).values():
        corrections[which].scale = scale


def merge(net: nn.Module) -> nn.Module:
    """The net with its corrections added into its weights once for all, as plain as it was before."""
    for _, layer in adaptable_layers(net):
        if parametrize.is_parametrized(layer, "weight"):
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
    return net


def lora_layers(net: nn.Module) -> dict[str, list[LoRAParametrization]]:
    """The corrections in each layer that has any."""
    found = {}
    for name, layer in adaptable_layers(net):
        if parametrize.is_parametrized(layer, "weight"):
            found[name] = [one for one in layer.parametrizations.weight if isinstance(one, LoRAParametrization)]
    return found


def adaptable_layers(net: nn.Module) -> Iterator[tuple[str, Any]]:
    """Name and module of each layer that can be corrected."""
    return ((name, module) for name, module in net.named_modules() if isinstance(module, LAYERS))


def base_state_dict(net: nn.Module) -> dict[str, Tensor]:
    """The weights of a network by the names that they have without corrections."""
    original = ".parametrizations.weight.original"
    state = {name.replace(original, ".weight"): value for name, value in net.state_dict().items()}
    return {name: value for name, value in state.items() if ".parametrizations." not in name}


def unwrap(net: Any) -> Any:
    """The network within all that wraps it."""
    while hasattr(net, "net"):
        net = net.net
    return net


def add(layer: nn.Module, correction: LoRAParametrization) -> None:
    parametrize.register_parametrization(layer, "weight", correction)
