"""LoRA: low-rank corrections of the weights of any network, selected by the names of its layers (Hu et al. 2021).

The network remains the same object with the same signature; it computes with W + scale * up @ down.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ldm.errors import ConfigError, UserError

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class LoRA:
    """The adapter that adds LoRA layers scaled by alpha / rank (Hu et al. 2021, sec. 4.1).

    alpha: null means rank.  Raises ConfigError as `inject` does.
    """

    rank: int = 4
    alpha: float | None = None
    target_modules: Sequence[str] = ("*attention*",)

    def apply_to(self, model: Any, scale: float = 1.0) -> None:
        """Add new corrections, multiplied by `scale`, to a model's network; freeze everything else."""
        model.requires_grad_(False)
        net = unwrap(model.denoiser.net)
        inject(net, self.rank, self.target_modules)
        set_scale(net, scale * self.scaling)

    @property
    def scaling(self) -> float:
        """The factor on up @ down: alpha / rank."""
        return 1.0 if self.alpha is None else self.alpha / self.rank


class LoRAParametrization(nn.Module):
    """W -> W + scale * up @ down for a weight W (out, in, ...) (Hu et al. 2021, eq. 3).

    down: (rank, in, ...).  up: (out, rank).  Raises ValueError for factors that do not match the weight's shape.
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
    net: nn.Module,
    rank: int = 4,
    target_modules: Sequence[str] = ("*attention*",),
    generator: torch.Generator | None = None,
) -> nn.Module:
    """Freeze a network and add a correction of that rank, initially zero, to each layer whose name matches a pattern.

    target_modules: patterns as of file names, on names like down.0.layers.1.attention.blocks.0.self_attention.qkv.
    Returns the same network.  Raises ConfigError for a rank below 1, or if no linear or convolutional layer matches.
    """
    if rank < 1:
        raise ConfigError(f"rank={rank}: expected at least 1")
    matches = {
        name: layer
        for name, layer in adaptable_layers(net)
        if any(fnmatch(name, pattern) for pattern in target_modules)
    }
    if not matches:
        some = ", ".join([name for name, _ in adaptable_layers(net)][:3])
        raise ConfigError(f"target_modules={list(target_modules)}: no layer has such a name; there are {some}, ...")
    net.requires_grad_(False)
    for layer in matches.values():
        weight = layer.weight
        width = min(rank, len(weight), weight[0].numel())
        down = torch.randn(width, *weight.shape[1:], generator=generator) * weight[0].numel() ** -0.5
        add(layer, LoRAParametrization(weight, down, torch.zeros(len(weight), width)))
    return net


def load_factors(net: nn.Module, factors: Mapping[str, Tensor], scale: float = 1.0) -> nn.Module:
    """Add saved corrections to a network, in addition to those that it has already; return the network.

    factors: from `export_factors`, LAYER.down and LAYER.up for each layer.  Raises UserError for those of another
    network.
    """
    layers = dict(adaptable_layers(net))
    names = sorted({name.rpartition(".")[0] for name in factors})
    for name in names:
        if name not in layers or {f"{name}.down", f"{name}.up"} - factors.keys():
            reason = "lacks a factor" if name in layers else "does not exist"
            raise UserError(f"this LoRA is of another network: it corrects {name}, which {reason}")
    corrections = {}
    for name in names:
        try:
            down, up = factors[f"{name}.down"], factors[f"{name}.up"]
            corrections[name] = LoRAParametrization(layers[name].weight, down, up, scale)
        except ValueError as error:
            raise UserError(f"this LoRA is of another network: {name}: {error}") from None
    for name, correction in corrections.items():
        add(layers[name], correction)
    return net


def export_factors(net: nn.Module, which: int = -1) -> dict[str, Tensor]:
    """Return the factors of a network's corrections, LAYER.down and LAYER.up.

    which: index among the corrections of a layer.
    """
    factors: dict[str, Tensor] = {}
    for name, corrections in lora_layers(net).items():
        factors |= {f"{name}.down": corrections[which].down.detach(), f"{name}.up": corrections[which].up.detach()}
    return factors


def set_scale(net: nn.Module, scale: float, which: int = -1) -> None:
    """Set the scale of a network's corrections; which: index among the corrections of a layer."""
    for corrections in lora_layers(net).values():
        corrections[which].scale = scale


def merge(net: nn.Module) -> nn.Module:
    """Add a network's corrections to its weights and remove them as separate parameters; return the network."""
    for _, layer in adaptable_layers(net):
        if parametrize.is_parametrized(layer, "weight"):
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
    return net


def lora_layers(net: nn.Module) -> dict[str, list[LoRAParametrization]]:
    """Return the corrections of each layer that has any, by the layer's name."""
    layers = {}
    for name, layer in adaptable_layers(net):
        if parametrize.is_parametrized(layer, "weight"):
            layers[name] = [p for p in layer.parametrizations.weight if isinstance(p, LoRAParametrization)]
    return layers


def adaptable_layers(net: nn.Module) -> Iterator[tuple[str, Any]]:
    """Iterate over the name and module of each layer that can have a correction."""
    return ((name, module) for name, module in net.named_modules() if isinstance(module, LAYERS))


def base_state_dict(net: nn.Module) -> dict[str, Tensor]:
    """Return the weights of a network under the names that they have without corrections."""
    original = ".parametrizations.weight.original"
    state = {name.replace(original, ".weight"): value for name, value in net.state_dict().items()}
    return {name: value for name, value in state.items() if ".parametrizations." not in name}


def unwrap(net: Any) -> Any:
    """Return the innermost network, without the modules that wrap it."""
    while hasattr(net, "net"):
        net = net.net
    return net


def add(layer: nn.Module, correction: LoRAParametrization) -> None:
    """Register a correction on a layer's weight."""
    parametrize.register_parametrization(layer, "weight", correction)
