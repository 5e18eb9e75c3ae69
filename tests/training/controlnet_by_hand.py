"""A U-Net of 1x1 convolutions with ControlNet's interface, and its ControlNet in plain tensors with all gradients."""

from typing import Any

import linear_model as linear
import torch
from torch import Tensor, nn
from torch.nn.functional import fold, unfold

CHANNELS, RESIDUAL_WEIGHT, BASE, CONTROL = 3, 0.7, "model.denoiser.net.net.", "model.denoiser.net.controls.0."
Weights = dict[str, Tensor]


class TinyUNet(nn.Module):
    """stem, one level and a middle, all linear; time and mean context are added at the level."""

    channels, skip_widths = CHANNELS, (CHANNELS, CHANNELS)

    def __init__(self):
        super().__init__()
        self.stem, self.out = nn.Conv2d(linear.CHANNELS, CHANNELS, 1), nn.Conv2d(CHANNELS, linear.CHANNELS, 1)
        self.down, self.middle, self.up = (nn.Conv2d(CHANNELS, CHANNELS, 1) for _ in range(3))
        self.read, self.clock = nn.Linear(linear.CONTEXT, CHANNELS), nn.Parameter(torch.zeros(CHANNELS))

    def embed(self, t, cond):
        return self.read(cond.context.mean(1)) + t[:, None] / 1000 * self.clock

    def memory(self, cond):
        return None

    def encode(self, h, emb, cursor):
        skips = [h, self.down(h) + emb[:, :, None, None]]
        return self.middle(skips[1]), skips

    def forward(self, x, t, cond, *, emb=None, memory=None, residuals=(0, 0, 0)):
        h, skips = self.encode(self.stem(x), self.embed(t, cond), None)
        first, second = (skip + residual for skip, residual in zip(skips, residuals, strict=False))
        return self.out(h + residuals[2] + self.up(second) + first)


def convolve(x: Tensor, weight: Tensor, bias: Tensor, stride: int = 1) -> Tensor:
    """Convolve with a kernel of odd size and zero padding, as a product of matrices."""
    columns = unfold(x, weight.shape[2:], padding=weight.shape[2] // 2, stride=stride)
    return (weight.flatten(1) @ columns + bias[:, None]).unflatten(2, [side // stride for side in x.shape[2:]])


def convolution_gradients(x: Tensor, weight: Tensor, slope: Tensor, stride: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Return the derivatives by weight, bias and x, where `slope` is that by the output."""
    size, padding = weight.shape[2:], weight.shape[2] // 2
    columns, slope = unfold(x, size, padding=padding, stride=stride), slope.flatten(2)
    by_weight = torch.einsum("bol,bkl->ok", slope, columns).view_as(weight)
    by_x = fold(weight.flatten(1).T @ slope, x.shape[2:], size, padding=padding, stride=stride)
    return by_weight, slope.sum((0, 2)), by_x


def layer(weights: Weights, name: str) -> tuple[Tensor, Tensor]:
    return weights[f"{name}.weight"], weights[f"{name}.bias"]


class Convolutions:
    """Convolutions and SiLUs in a row: (index of the layer, stride); the outputs are stored for the gradients."""

    def __init__(self, weights: Weights, prefix: str, layers: tuple[tuple[int, int], ...]):
        self.weights, self.prefix, self.layers = weights, prefix, layers

    def forward(self, x: Tensor) -> Tensor:
        self.inputs: list[Tensor] = []
        self.slopes: list[Any] = []
        for index, stride in self.layers:
            self.inputs.append(x)
            x = convolve(x, *layer(self.weights, f"{self.prefix}{index}"), stride)
            if index != self.layers[-1][0]:
                s = 1 / (1 + (-x).exp())
                self.slopes.append(s * (1 + x * (1 - s)))
                x = x * s
        return x

    def gradients(self, slope: Tensor) -> Weights:
        result: Weights = {}
        for k in reversed(range(len(self.layers))):
            index, stride = self.layers[k]
            if k < len(self.slopes):
                slope = slope * self.slopes[k]
            name = f"{self.prefix}{index}"
            by_weight, by_bias, slope = convolution_gradients(
                self.inputs[k], self.weights[f"{name}.weight"], slope, stride
            )
            result |= {f"{name}.weight": by_weight, f"{name}.bias": by_bias}
        return result


class ControlByHand:
    """The output of a U-Net with a ControlNet (Zhang et al. 2023, eq. 2-4), and its gradients."""

    def __init__(self, weights: Weights):
        self.w = weights
        self.encoder = Convolutions(weights, f"{CONTROL}hint.", ((0, 1), (2, 1), (4, 2), (6, 1)))

    def apply(self, name: str, x: Tensor) -> Tensor:
        return convolve(x, *layer(self.w, name))

    def embed(self, prefix: str, time: Tensor, context: Tensor) -> Tensor:
        weight, bias = layer(self.w, f"{prefix}read")
        return (context @ weight.T + bias + time[:, None] / 1000 * self.w[f"{prefix}clock"])[:, :, None, None]

    def output(self, x: Tensor, time: Tensor, context: Tensor, hint: Tensor) -> Tensor:
        copy = f"{CONTROL}copied."
        self.x, self.time, self.context = x, time, context
        self.h = self.apply(f"{copy}stem", x) + self.encoder.forward(hint)
        self.second = self.apply(f"{copy}down", self.h) + self.embed(copy, time, context)
        self.middle = self.apply(f"{copy}middle", self.second)
        states = (self.h, self.second, self.middle)
        names = ("zeros.0", "zeros.1", "of_middle")
        residuals = [RESIDUAL_WEIGHT * self.apply(CONTROL + n, state) for n, state in zip(names, states, strict=True)]
        first = self.apply(f"{BASE}stem", x)
        second = self.apply(f"{BASE}down", first) + self.embed(BASE, time, context)
        middle = self.apply(f"{BASE}middle", second) + residuals[2]
        return self.apply(f"{BASE}out", middle + self.apply(f"{BASE}up", second + residuals[1]) + first + residuals[0])

    def gradients(self, slope: Tensor) -> Weights:
        """Return the gradient of every weight of the ControlNet; slope: the loss's derivative by the output."""
        result: Weights = {}

        def back(name: str, inputs: Tensor, by_output: Tensor) -> Tensor:
            by_weight, by_bias, by_input = convolution_gradients(inputs, self.w[f"{name}.weight"], by_output)
            result.update({f"{name}.weight": by_weight, f"{name}.bias": by_bias})
            return by_input

        copy = f"{CONTROL}copied."
        to_sum = RESIDUAL_WEIGHT * torch.einsum("oc,bohw->bchw", self.w[f"{BASE}out.weight"][..., 0, 0], slope)
        to_second = torch.einsum("oc,bohw->bchw", self.w[f"{BASE}up.weight"][..., 0, 0], to_sum)
        by_middle = back(f"{CONTROL}of_middle", self.middle, to_sum)
        by_second = back(f"{copy}middle", self.second, by_middle) + back(f"{CONTROL}zeros.1", self.second, to_second)
        by_h = back(f"{copy}down", self.h, by_second) + back(f"{CONTROL}zeros.0", self.h, to_sum)
        back(f"{copy}stem", self.x, by_h)
        by_embedding = by_second.sum((2, 3))
        result[f"{copy}read.weight"] = by_embedding.T @ self.context
        result[f"{copy}read.bias"] = by_embedding.sum(0)
        result[f"{copy}clock"] = (by_embedding * self.time[:, None] / 1000).sum(0)
        return result | self.encoder.gradients(by_h)
