"""Layers for sampling on a CPU: they compute what the network's layers do, with oneDNN's kernels and packed weights."""

from typing import Any, cast

import torch
from torch import Size, Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from ldm.net.attention import FeedForward
from ldm.net.blocks import GroupNorm, ResBlock, Upsample, upsample

# looking up an operator's overload at each call would cost more than a small product, so the overloads are named here
LINEAR, LINEAR_AND = torch.ops.mkldnn._linear_pointwise.default, torch.ops.mkldnn._linear_pointwise.binary
CONV_AND = torch.ops.mkldnn._convolution_pointwise.binary
NO_POST_OP: Any = ("none", [], "")
ADD_POST_OP: Any = ("add", 1.0, None, [], None)

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}  # by the number of sides

# on smaller maps float32 is faster than bfloat16; with gradients, in ldm.net.blocks, the opposite is true
MIN_POSITIONS_BF16_NORM = 1024

# nearest-neighbour upsampling, then 3 taps, is 4 taps at stride 2 (rows: those taps, columns: the convolution's)
UPSAMPLE_TAPS = torch.tensor([[0.0, 0.0, 1.0], [0.0, 1.0, 1.0], [1.0, 1.0, 0.0], [1.0, 0.0, 0.0]])


def pack(module: nn.Module, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Replace every layer of a module that has a packed version here by it, and return the module.

    The packed layers multiply in dtype.  A module that is such a layer itself is returned packed.
    """
    if isinstance(module, Upsample) and (
        dtype != torch.float32 or module.conv.in_channels < 64 or module.strides != (2, 2)
    ):
        # the transposed convolution of PackedUpsample doubles images, and is slower for few channels and in bfloat16
        module.conv = cast(Any, pack(module.conv, dtype))
        return module
    if isinstance(module, CONVOLUTIONS) and not has_kernel(module):
        return module if isinstance(module.padding, str) else PlainConv(module, dtype)
    # a LoRA correction is a parametrization: layer.weight, which the packed layer copies, includes it
    packed_type = PACKED_TYPES.get(parametrize.type_before_parametrizations(module))
    if packed_type is not None and all(has_kernel(part) for part in module.modules() if isinstance(part, CONVOLUTIONS)):
        return packed_type(module, dtype)
    for name, child in module.named_children():
        setattr(module, name, pack(child, dtype))
    return module


def has_kernel(layer: nn.Module) -> bool:
    """Return whether a convolution has a packed version: in two dimensions, with zeros beyond the border."""
    return isinstance(layer, nn.Conv2d) and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)


class Linear(nn.Module):
    """Packed torch.nn.Linear."""

    def __init__(self, layer: nn.Linear, dtype: torch.dtype):
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach().to(dtype))
        self.bias = None if layer.bias is None else layer.bias.detach().to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return LINEAR(x.to(self.weight.dtype), self.weight, self.bias, *NO_POST_OP)


class Conv2d(nn.Module):
    """Packed torch.nn.Conv2d, with explicit zero padding."""

    def __init__(self, layer: nn.Conv2d, dtype: torch.dtype):
        super().__init__()
        self.geometry = (layer.padding, layer.stride, layer.dilation, layer.groups)
        # not reordered: oneDNN's layout is for one input shape, and other shapes take up to 40 times as long
        self.weight = layer.weight.detach().to(dtype, memory_format=torch.channels_last)
        self.bias = None if layer.bias is None else layer.bias.detach().to(dtype)

    def forward(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
        """Convolve x (B, C, H, W) and add shift (C',) at every position."""
        bias = self.bias if shift is None else shift.to(self.weight.dtype) if self.bias is None else self.bias + shift
        padding, stride, dilation, groups = self.geometry
        return F.conv2d(x.to(self.weight.dtype), self.weight, bias, stride, padding, dilation, groups)

    def add_to(self, x: Tensor, other: Tensor) -> Tensor:
        """Convolve x and add another (B, C', H', W') in the same kernel."""
        x, other = x.to(self.weight.dtype), other.to(self.weight.dtype)
        return CONV_AND(x, other, self.weight, self.bias, *self.geometry, *ADD_POST_OP)


class PlainConv(nn.Module):
    """A convolution without a packed version, in the dtype of those that have one."""

    def __init__(self, layer: Any, dtype: torch.dtype):
        super().__init__()
        self.convolve = CONVOLVE[layer.weight.ndim - 2]
        self.margins = [margin for margin in reversed(layer.padding) for _ in range(2)]
        self.mode = {"zeros": "constant"}.get(layer.padding_mode, layer.padding_mode)
        self.geometry = (layer.stride, 0, layer.dilation, layer.groups)
        self.weight = layer.weight.detach().to(dtype)
        self.bias = None if layer.bias is None else layer.bias.detach().to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x.to(self.weight.dtype), self.margins, mode=self.mode)
        return self.convolve(x, self.weight, self.bias, *self.geometry)


class Norm(nn.Module):
    """torch.nn.GroupNorm with statistics in float32, as in its kernel.

    Small maps are normalised in float32, because the kernel for bfloat16 in channels_last is slow on them.
    """

    def __init__(self, layer: nn.GroupNorm, dtype: torch.dtype):
        super().__init__()
        self.layer, self.dtype = layer, dtype

    def forward(self, x: Tensor) -> Tensor:
        x = x if x.shape[2:].numel() >= MIN_POSITIONS_BF16_NORM else x.float()
        return F.group_norm(x, self.layer.num_groups, self.layer.weight, self.layer.bias, self.layer.eps).to(self.dtype)


class PackedUpsample(nn.Module):
    """Packed Upsample: doubling and convolution as one transposed convolution, with 16 products instead of 36."""

    def __init__(self, layer: Upsample, dtype: torch.dtype):
        super().__init__()
        self.plain = Conv2d(layer.conv, dtype)  # for odd sizes, which are not doubled
        taps = UPSAMPLE_TAPS.to(layer.conv.weight)
        weight = torch.einsum("oikl,ak,bl->ioab", layer.conv.weight.detach(), taps, taps)
        self.weight = weight.to(dtype, memory_format=torch.channels_last)

    def forward(self, x: Tensor, emb: Tensor | None = None, size: Size | None = None) -> Tensor:
        if size is not None and size != (2 * x.shape[2], 2 * x.shape[3]):
            return self.plain(upsample(x, size))
        return F.conv_transpose2d(x.to(self.weight.dtype), self.weight, self.plain.bias, stride=2, padding=1)


class PackedResBlock(nn.Module):
    """Packed ResBlock, with the additions in the kernels of its convolutions.

    An embedding that all rows share is added to the first convolution's bias; the skip is added in the second's kernel.
    """

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
            projected = self.emb(F.silu(emb))
            if self.block.scale_shift:
                scale, shift = projected[:, :, None, None].chunk(2, dim=1)
                h = torch.addcmul(shift, self.norm2(self.conv1(h)), 1 + scale)
            elif len(projected) == 1:
                h = self.norm2(self.conv1(h, projected[0]))
            else:
                h = self.norm2(self.conv1(h) + projected[:, :, None, None])
        return self.conv2.add_to(F.silu(h, inplace=True), self.skip(x))


class GEGLU(nn.Module):
    """Packed FeedForward: GELU and the product with the gate are post-operations of the projections."""

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
