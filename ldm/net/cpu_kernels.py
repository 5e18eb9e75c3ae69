"""Layers for drawing on a CPU: the answers of the network's own by oneDNN's kernels, the weights laid out for them beforehand."""

from typing import Any, cast

import torch
from torch import Size, Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from ldm.net.attention import FeedForward
from ldm.net.blocks import GroupNorm, ResBlock, Upsample, upsample

# overloads of an operator looked up at each call would cost more than a small product, so they are named here
LINEAR, LINEAR_AND = torch.ops.mkldnn._linear_pointwise.default, torch.ops.mkldnn._linear_pointwise.binary
CONV_AND = torch.ops.mkldnn._convolution_pointwise.binary
ALONE: Any = ("none", [], "")  # nothing is done to the product
ADDED: Any = ("add", 1.0, None, [], None)

MIN_POSITIONS_BF16_NORM = 1024  # from so many on bfloat16 is normalised sooner as it is; with gradients, in ldm.net.blocks, it is the other way about

# nearest-neighbour doubling, then 3 taps, is 4 taps at stride 2 (rows: those taps, columns: the convolution's)
DOUBLED = torch.tensor([[0.0, 0.0, 1.0], [0.0, 1.0, 1.0], [1.0, 1.0, 0.0], [1.0, 0.0, 0.0]])


def pack(module: nn.Module, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The module with every layer in it that has a twin here replaced by it, which multiplies in dtype; a layer itself becomes its twin."""
    if isinstance(module, Upsample) and (dtype != torch.float32 or module.conv.in_channels < 64):
        module.conv = cast(
            Any, pack(module.conv, dtype)
        )  # of few channels and in bfloat16 the transposed convolution takes longer
        return module
    if isinstance(module, nn.Conv2d) and (module.padding_mode != "zeros" or isinstance(module.padding, str)):
        return module  # nobody's here, but of somebody's own network
    if (
        twin := PACKED_TYPES.get(parametrize.type_before_parametrizations(module))
    ) is not None:  # corrections are in the weights it is made of
        return twin(module, dtype)
    for name, child in module.named_children():
        setattr(module, name, pack(child, dtype))
    return module


class Linear(nn.Module):
    """torch.nn.Linear."""

    def __init__(self, layer: nn.Linear, dtype: torch.dtype):
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach().to(dtype))
        self.bias = None if layer.bias is None else layer.bias.detach().to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return LINEAR(x.to(self.weight.dtype), self.weight, self.bias, *ALONE)


class Conv2d(nn.Module):
    """torch.nn.Conv2d, padded with so many zeros."""

    def __init__(self, layer: nn.Conv2d, dtype: torch.dtype):
        super().__init__()
        self.how = (layer.padding, layer.stride, layer.dilation, layer.groups)
        # not packed: oneDNN's layout is for one shape of input, and of another it takes up to 40 times as long
        self.weight = layer.weight.detach().to(dtype, memory_format=torch.channels_last)
        self.bias = None if layer.bias is None else layer.bias.detach().to(dtype)

    def forward(self, x: Tensor, by: Tensor | None = None) -> Tensor:
        """by: (C,), added everywhere."""
        bias = self.bias if by is None else by.to(self.weight.dtype) if self.bias is None else self.bias + by
        padding, stride, dilation, groups = self.how
        return F.conv2d(x.to(self.weight.dtype), self.weight, bias, stride, padding, dilation, groups)

    def add_to(self, x: Tensor, other: Tensor) -> Tensor:
        """What forward answers plus another (B, C, H, W)."""
        return CONV_AND(x.to(self.weight.dtype), other.to(self.weight.dtype), self.weight, self.bias, *self.how, *ADDED)


class Norm(nn.Module):
    """torch.nn.GroupNorm: its statistics in float32, as its kernel has them; of few places that of bfloat16 channels last is slow."""

    def __init__(self, layer: nn.GroupNorm, dtype: torch.dtype):
        super().__init__()
        self.layer, self.dtype = layer, dtype

    def forward(self, x: Tensor) -> Tensor:
        x = x if x.shape[2:].numel() >= MIN_POSITIONS_BF16_NORM else x.float()
        return F.group_norm(x, self.layer.num_groups, self.layer.weight, self.layer.bias, self.layer.eps).to(self.dtype)


class PackedUpsample(nn.Module):
    """Upsample: doubling and convolution as one transposed convolution, of 16 products where those two have 36."""

    def __init__(self, layer: Upsample, dtype: torch.dtype):
        super().__init__()
        self.plain = Conv2d(layer.conv, dtype)  # for the odd sizes, which are not doubled
        taps = DOUBLED.to(layer.conv.weight)
        weight = torch.einsum("oikl,ak,bl->ioab", layer.conv.weight.detach(), taps, taps)
        self.weight = weight.to(dtype, memory_format=torch.channels_last)

    def forward(self, x: Tensor, emb: Tensor | None = None, size: Size | None = None) -> Tensor:
        if size is not None and size != (2 * x.shape[2], 2 * x.shape[3]):
            return self.plain(upsample(x, size))
        return F.conv_transpose2d(x.to(self.weight.dtype), self.weight, self.plain.bias, stride=2, padding=1)


class PackedResBlock(nn.Module):
    """ResBlock: what one embedding tells all rows is in the first convolution's bias, and the second is made onto what it is added to."""

    def __init__(self, block: Any, dtype: torch.dtype):
        super().__init__()
        self.block = block
        self.conv1, self.conv2 = Conv2d(block.conv1, dtype), Conv2d(block.conv2, dtype)
        self.norm1, self.norm2, self.skip = (pack(part, dtype) for part in (block.norm1, block.norm2, block.skip))
        self.emb = None if block.emb is None else pack(block.emb, dtype)

    def forward(self, x: Tensor, emb: Tensor | None = None, size: Size | None = None) -> Tensor:
        h = F.silu(self.norm1(x), inplace=True)
        if self.block.resize is not None:
            h, x = self.block.resize(h, size), self.block.resize(x, size)
        if self.emb is None or emb is None:
            h = self.norm2(self.conv1(h))
        else:
            told = self.emb(F.silu(emb))
            if self.block.scale_shift:
                scale, shift = told[:, :, None, None].chunk(2, dim=1)
                h = torch.addcmul(shift, self.norm2(self.conv1(h)), 1 + scale)
            elif len(told) == 1:
                h = self.norm2(self.conv1(h, told[0]))
            else:
                h = self.norm2(self.conv1(h) + told[:, :, None, None])
        return self.conv2.add_to(F.silu(h, inplace=True), self.skip(x))


class GEGLU(nn.Module):
    """FeedForward, whose gate and product with it are made with the projections."""

    def __init__(self, layer: FeedForward, dtype: torch.dtype):
        super().__init__()
        weight, gate = layer.up.weight.detach().to(dtype).chunk(2)
        self.bias, self.gate_bias = layer.up.bias.detach().to(dtype).chunk(2)
        self.weight, self.gate = (torch.ops.mkldnn._reorder_linear_weight(part.contiguous()) for part in (weight, gate))
        self.down = Linear(layer.down, dtype)

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.weight.dtype)
        gate = LINEAR(x, self.gate, self.gate_bias, "gelu", [], "none")
        return self.down(LINEAR_AND(x, gate, self.weight, self.bias, "mul"))


PACKED_TYPES: dict[type, Any] = {
    nn.Linear: Linear,
    nn.Conv2d: Conv2d,
    nn.GroupNorm: Norm,
    GroupNorm: Norm,
    Upsample: PackedUpsample,
    ResBlock: PackedResBlock,
    FeedForward: GEGLU,
}
