"""ControlNet: a trainable copy of a U-Net's encoder reads a hint and adds to the skips of the frozen U-Net.

Zhang et al. 2023, sec. 3.
"""

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

WIDTHS = (16, 32, 96, 256)  # channels of the hint encoder, as in the authors' code and in diffusers


@dataclass(frozen=True)
class ControlNet:
    """The adapter that conditions a U-Net on a hint.

    hint: wraps the conditioner, so that its Condition has one hint more.
    Raises ConfigError without a hint, and for a network that is not a U-Net of images.
    """

    hint: Callable[[nn.Module], nn.Module]

    def __post_init__(self) -> None:
        if self.hint is None:
            raise ConfigError("adapter=controlnet needs a hint: hint=canny, or another of conf/hint")

    def apply_to(self, model: Any, scale: float = 1.0) -> None:
        """Add a new ControlNet, its residuals multiplied by `scale`, to a model's network; freeze everything else."""
        net = copy.deepcopy(lora.unwrap(model.denoiser.net))
        if not hasattr(net, "encode"):
            raise ConfigError(f"adapter=controlnet: expected a U-Net, this network is a {type(net).__name__}")
        if (sides := net.stem.weight.ndim - 2) != 2:
            raise ConfigError(f"adapter=controlnet: expected a U-Net of images, this one's samples have {sides} sides")
        model.requires_grad_(False)
        # the copy starts from the weights with LoRA merged in, and has no LoRA layers of its own
        control = ControlBranch(cast(UNet, lora.merge(net)), model.autoencoder.factor)
        wrapped = model.denoiser.net
        if not hasattr(wrapped, "controls"):
            model.denoiser.net = wrapped = ControlledUNet(wrapped, [])
        wrapped.controls.append(control)
        wrapped.weights.append(scale)
        model.conditioner = self.hint(model.conditioner)


class ControlBranch(nn.Module):
    """A ControlNet: from x_t (B, C, h, w), t, a Condition and a hint to residuals for a U-Net's skips and middle.

    It returns a residual for each skip, first to last, then one for the middle.
    net: the U-Net to be controlled; its encoder is copied with its weights (sec. 3.1), and all residuals are initially
    zero.
    factor: the first stage's, 1 to 8.  hint: (B, hint_channels, h * factor, w * factor) in [0, 1], or (B,
    hint_channels, 1, 1).
    Raises ConfigError for another factor, or a hint of another size.
    """

    def __init__(self, net: UNet, factor: int, hint_channels: int = 3):
        super().__init__()
        self.factor = factor
        self.copied = copy.deepcopy(net).requires_grad_()  # the controlled network is frozen, its copy is trained
        del self.copied.up, self.copied.out  # the copy is only the encoder
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
    """Build a hint encoder (B, channels, H, W) -> (B, out, H / factor, W / factor), initially zero.

    The initialisation preserves the scale of activations (He et al. 2015): with torch's default each layer attenuates
    edges, in total by a factor of 600, and a ControlNet hardly reacts to them.
    Raises ConfigError unless factor is 1, 2, 4 or 8.
    """
    halvings = factor.bit_length() - 1
    if factor < 1 or factor != 2**halvings or halvings >= len(WIDTHS):
        raise ConfigError(f"factor={factor}: a hint's encoder expects 1, 2, 4 or 8")
    widths = WIDTHS[: halvings + 1]
    layers: list[Any] = [nn.Conv2d(channels, widths[0], 3, padding=1), nn.SiLU()]
    for narrow, wide in pairwise(widths):
        layers += [
            nn.Conv2d(narrow, narrow, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(narrow, wide, 3, padding=1, stride=2),
            nn.SiLU(),
        ]
    for layer in layers[::2]:
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        nn.init.zeros_(layer.bias)
    return nn.Sequential(*layers, zero_module(nn.Conv2d(widths[-1], out, 3, padding=1)))


class ControlledUNet(nn.Module):
    """A U-Net with ControlNets, with the U-Net's signature.

    cond.hint[i] is for the i-th ControlNet, whose residuals are multiplied by weights[i].
    Raises ValueError unless there are as many hints as ControlNets.
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
        sources = [] if residuals is None else [list(residuals)]
        for control, hint, weight in zip(self.controls, cond.hint, self.weights, strict=True):
            sources.append([weight * residual for residual in control(x, t, cond, hint)])
        return self.net(
            x,
            t,
            cond,
            emb=emb,
            memory=memory,
            residuals=[sum(parts[1:], parts[0]) for parts in zip(*sources, strict=True)],
        )
