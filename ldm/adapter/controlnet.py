"""ControlNet: a trainable copy of a U-Net's way down reads a hint and adds to the skips of the frozen one (Zhang et al. 2023, sec. 3)."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, cast

from torch import Tensor, nn

from ldm.adapter import lora
from ldm.condition import Condition
from ldm.errors import ConfigError
from ldm.net.attention import CrossAttentionCache
from ldm.net.blocks import zero_module
from ldm.net.unet import MemoryCursor, UNet, concat_condition

WIDTHS = (16, 32, 96, 256)  # of the hint's encoder, as its own code and diffusers have it


@dataclass(frozen=True)
class ControlNet:
    """The adapter that lets a hint draw along; hint: wraps the conditioner, so that it tells one hint more.

    Raises ConfigError without a hint, and for a network that is no U-Net.
    """

    hint: Callable[[nn.Module], nn.Module]

    def __post_init__(self) -> None:
        if self.hint is None:
            raise ConfigError("adapter=controlnet needs a hint: hint=canny, or another of conf/hint")

    def apply_to(self, model: Any, scale: float = 1.0) -> None:
        """Add a fresh ControlNet, whose residuals count `scale`, to a model's network, all else frozen."""
        net = copy.deepcopy(lora.unwrap(model.denoiser.net))
        if not hasattr(net, "contract"):
            raise ConfigError(f"adapter=controlnet: expected a U-Net, this network is a {type(net).__name__}")
        model.requires_grad_(False)
        control = ControlBranch(
            cast(UNet, lora.merge(net)), model.autoencoder.factor
        )  # its weights come without corrections: these may change
        wrapped = model.denoiser.net
        if not hasattr(wrapped, "controls"):
            model.denoiser.net = wrapped = ControlledUNet(wrapped, [])
        wrapped.controls.append(control)
        wrapped.weights.append(scale)
        model.conditioner = self.hint(model.conditioner)


class ControlBranch(nn.Module):
    """Residuals for each skip of a U-Net, first to last, and for its middle, of x_t (B, C, h, w), t, a Condition and a hint.

    net: the U-Net that is to be controlled; its way down is copied, weights included (sec. 3.1), and all residuals begin as zero.
    factor: the first stage's, 1 to 8.  hint: (B, hint_channels, h * factor, w * factor) in [0, 1], or (B, hint_channels, 1, 1).
    Raises ConfigError for another factor, or a hint of another size.
    """

    def __init__(self, net: UNet, factor: int, hint_channels: int = 3):
        super().__init__()
        self.factor = factor
        self.copied = copy.deepcopy(net).requires_grad_()  # the controlled network is frozen, its copy learns
        del self.copied.up, self.copied.out  # the way up stays the controlled network's
        widths = net.skip_widths
        self.hint = hint_encoder(hint_channels, net.channels, factor)
        self.zeros = nn.ModuleList(zero_module(nn.Conv2d(width, width, 1)) for width in widths)
        self.of_middle = zero_module(nn.Conv2d(widths[-1], widths[-1], 1))

    def forward(self, x: Tensor, t: Tensor, cond: Condition, hint: Tensor) -> list[Tensor]:
        height, width = (self.factor * side for side in x.shape[2:])
        if hint.shape[2:] == (1, 1):
            hint = hint.expand(-1, -1, height, width)
        if hint.shape[2:] != (height, width):
            raise ConfigError(
                f"a hint of {hint.shape[2]}x{hint.shape[3]}: expected {height}x{width}, the size of the image"
            )
        copied = self.copied
        h = copied.stem(concat_condition(x, cond)) + self.hint(hint)
        h, skips = copied.encode(h, copied.embed(t, cond), MemoryCursor(copied.memory(cond)))
        return [*(zero(skip) for zero, skip in zip(self.zeros, skips, strict=True)), self.of_middle(h)]


def hint_encoder(channels: int, out: int, factor: int) -> nn.Sequential:
    """(B, channels, H, W) -> (B, out, H / factor, W / factor), zero at first. Raises ConfigError unless factor is 1, 2, 4 or 8.

    Weights keep the size of what passes (He et al. 2015): torch's own make edges fainter at each layer, 600 times in the end, and a
    ControlNet as good as deaf to them.
    """
    halvings = factor.bit_length() - 1
    if factor < 1 or factor != 2**halvings or halvings >= len(WIDTHS):
        raise ConfigError(f"factor={factor}: a hint's encoder expects 1, 2, 4 or 8")
    widths = WIDTHS[: halvings + 1]
    made: list[Any] = [nn.Conv2d(channels, widths[0], 3, padding=1), nn.SiLU()]
    for narrow, wide in pairwise(widths):
        made += [
            nn.Conv2d(narrow, narrow, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(narrow, wide, 3, padding=1, stride=2),
            nn.SiLU(),
        ]
    for layer in made[::2]:
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        nn.init.zeros_(layer.bias)
    return nn.Sequential(*made, zero_module(nn.Conv2d(widths[-1], out, 3, padding=1)))


class ControlledUNet(nn.Module):
    """A U-Net with ControlNets, in the U-Net's own signature: cond.hint[i] is for the i-th, whose residuals count weights[i].

    Raises ValueError for as many hints as there are ControlNets and no other number.
    """

    net: Any

    def __init__(self, net: nn.Module, controls: Sequence[ControlBranch], weights: Sequence[float] | None = None):
        super().__init__()
        self.net, self.controls = net, nn.ModuleList(controls)
        self.weights = [1.0] * len(controls) if weights is None else list(weights)
        if len(self.weights) != len(controls):
            raise ValueError(f"weights={self.weights}: expected {len(controls)}, one for each ControlNet")

    def embed(self, t: Tensor, cond: Condition) -> Tensor:
        return self.net.embed(t, cond)

    def memory(self, cond: Condition) -> CrossAttentionCache | None:
        return self.net.memory(cond)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        cond: Condition,
        *,
        emb: Tensor | None = None,
        memory: CrossAttentionCache | None = None,
        residuals: Sequence[Tensor] | None = None,
    ) -> Tensor:
        if len(cond.hint) != len(self.controls):
            raise ValueError(f"{len(cond.hint)} hints for {len(self.controls)} ControlNets: expected one for each")
        told = [] if residuals is None else [list(residuals)]
        for control, hint, weight in zip(self.controls, cond.hint, self.weights, strict=True):
            told.append([weight * residual for residual in control(x, t, cond, hint)])
        return self.net(
            x,
            t,
            cond,
            emb=emb,
            memory=memory,
            residuals=[sum(parts[1:], parts[0]) for parts in zip(*told, strict=True)],
        )
