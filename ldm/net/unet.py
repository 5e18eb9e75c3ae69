"""The U-Net of ADM and of latent diffusion (LDM fig. 3): residual blocks, two kinds of attention, and conditioning."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ldm.condition import Condition
from ldm.errors import ConfigError
from ldm.net.attention import (
    AttentionFn,
    CrossAttentionCache,
    KeyValue,
    QKVAttention,
    SpatialTransformer,
    make_memory,
    require_context,
    sdpa,
)
from ldm.net.blocks import (
    Downsample,
    PaddingMode,
    ResBlock,
    Resize,
    Upsample,
    conv,
    downsample,
    maybe_checkpoint,
    mlp,
    norm,
    timestep_embedding,
    upsample,
    zero_module,
)

Attention = SpatialTransformer | QKVAttention
LayerMemory = tuple[KeyValue, ...] | None


class Layer(nn.Module):
    """A residual block, followed by attention unless it is None."""

    def __init__(self, res: ResBlock, attention: Attention | None):
        super().__init__()
        self.res, self.attention = res, attention

    def forward(self, h: Tensor, emb: Tensor, memory: LayerMemory, mask: Tensor | None) -> Tensor:
        h = self.res(h, emb)
        return h if self.attention is None else self.attention(h, memory, mask)


class MemoryCursor:
    """An iterator that gives each layer its part of a CrossAttentionCache, in the order of the forward pass."""

    def __init__(self, memory: CrossAttentionCache | None):
        self.layers: Iterator[tuple[KeyValue, ...]] = iter(memory.layers if memory else ())
        self.mask = memory.mask if memory else None

    def __call__(self, layer: nn.Module) -> tuple[LayerMemory, Tensor | None]:
        return (next(self.layers, None) if layer.attention is not None else None), self.mask


class Down(nn.Module):
    """The layers of one resolution, then downsampling, except at the last: h (B, C, ...) -> each output, the skips."""

    def __init__(self, layers: Sequence[Layer], resample: nn.Module | None):
        super().__init__()
        self.layers, self.resample = nn.ModuleList(layers), resample

    def forward(self, h: Tensor, emb: Tensor, cursor: MemoryCursor, keep: bool) -> list[Tensor]:
        states = []
        for layer in self.layers:
            h = maybe_checkpoint(layer, h, emb, *cursor(layer), keep=keep)
            states.append(h)
        return states if self.resample is None else [*states, maybe_checkpoint(self.resample, h, emb, keep=keep)]


class Up(nn.Module):
    """The layers of one resolution, each with a skip popped off `skips`, then upsampling, except at the finest."""

    def __init__(self, layers: Sequence[Layer], resample: nn.Module | None):
        super().__init__()
        self.layers, self.resample = nn.ModuleList(layers), resample

    def forward(self, h: Tensor, skips: list[Tensor], emb: Tensor, cursor: MemoryCursor, keep: bool) -> Tensor:
        for layer in self.layers:
            h = maybe_checkpoint(layer, torch.cat([h, skips.pop()], dim=1), emb, *cursor(layer), keep=keep)
        return h if self.resample is None else maybe_checkpoint(self.resample, h, emb, skips[-1].shape[2:], keep=keep)


@dataclass(frozen=True)
class UNetBlockConfig:
    """The options of a U-Net's layers, except those that depend on a layer's position."""

    emb_dim: int
    context_dim: int | None
    num_heads: int | None
    num_head_channels: int
    dropout: float
    use_scale_shift_norm: bool
    resblock_updown: bool
    num_groups: int
    eps: float
    block: Callable[..., Attention]
    downsample: Callable[..., nn.Module]
    attention_fn: AttentionFn
    dims: int = 2
    padding_mode: PaddingMode = "zeros"

    def layer(self, inputs: int, width: int, depth: int) -> Layer:
        """Build a layer from width `inputs` to `width`; depth 0: without attention."""
        return Layer(self.residual(inputs, width), self.attention(width, depth) if depth else None)

    def attention(self, width: int, depth: int) -> Attention:
        """Build an attention of `depth` blocks. Raises ConfigError if the heads do not divide the width."""
        divisor = self.num_heads or self.num_head_channels
        if divisor < 1 or width % divisor:
            option = "num_heads" if self.num_heads else "num_head_channels"
            raise ConfigError(f"{option}={divisor} does not divide a level's {width} channels; choose another")
        heads = self.num_heads or width // self.num_head_channels
        sizes = {"context_dim": self.context_dim, "depth": depth, "groups": self.num_groups}
        return self.block(width, heads, **sizes, attend=self.attention_fn, dims=self.dims)

    def down(self, width: int) -> nn.Module:
        if self.resblock_updown:
            return self.residual(width, width, downsample)
        return self.downsample(width, dims=self.dims, padding_mode=self.padding_mode)

    def up(self, width: int) -> nn.Module:
        if self.resblock_updown:
            return self.residual(width, width, upsample)
        return Upsample(width, dims=self.dims, padding_mode=self.padding_mode)

    def conv(self, inputs: int, outputs: int) -> Any:
        return conv(inputs, outputs, dims=self.dims, padding_mode=self.padding_mode)

    def residual(self, inputs: int, width: int, resize: Resize | None = None) -> ResBlock:
        norms = (self.use_scale_shift_norm, self.num_groups, self.eps)
        return ResBlock(inputs, width, self.emb_dim, self.dropout, *norms, resize, self.dims, self.padding_mode)


def concat_condition(x: Tensor, cond: Condition) -> Tensor:
    """Concatenate x_t (B, C, ...) and cond.concat, if there is any, along the channels."""
    return x if cond.concat is None else torch.cat([x, cond.concat], dim=1)


def transformer_depths(depth: int | Sequence[int], attention: Sequence[int], levels: int) -> list[int]:
    """Return the number of transformer blocks at each level, and last in the middle; 0 means no attention.

    The middle has attention if any factor is listed, even one that no level has, as in the published configurations
    that list such a factor.
    Raises ConfigError if there are not as many depths as levels.
    """
    each = [depth] * levels if isinstance(depth, int) else list(depth)
    if len(each) != levels:
        raise ConfigError(
            f"transformer_depth={each}: expected one number, or {levels}, one for each level of channel_mult"
        )
    return [d if 2**level in attention else 0 for level, d in enumerate(each)] + [each[-1] if attention else 0]


class UNetEncoder(nn.Module):
    """The U-Net's downsampling path and its middle, which classifiers and ControlNets share; the options are UNet's.

    depths: from `transformer_depths`.
    """

    def __init__(
        self,
        config: UNetBlockConfig,
        in_channels: int,
        channels: int,
        channel_mult: Sequence[int],
        num_res_blocks: int,
        depths: Sequence[int],
        vector_dim: int | None = None,
        vector_embedding: Callable[[int, int], nn.Module] = mlp,
        time_embedding: Callable[[Tensor, int], Tensor] = timestep_embedding,
        gradient_checkpointing: bool = False,
        concat_vector: bool = False,
    ):
        super().__init__()
        self.concat_vector = concat_vector
        self.channels, self.context_dim, self.sinusoid, self.checkpoint = (
            channels,
            config.context_dim,
            time_embedding,
            gradient_checkpointing,
        )
        self.time = mlp(channels, 4 * channels)
        self.vector = vector_embedding(vector_dim, 4 * channels) if vector_dim else None
        self.stem = config.conv(in_channels, channels)
        self.down = nn.ModuleList()
        width, self.skip_widths = channels, [channels]
        for level, factor in enumerate(channel_mult):
            last = level == len(channel_mult) - 1
            widths = [width, *[factor * channels] * num_res_blocks]
            layers = [config.layer(a, b, depths[level]) for a, b in pairwise(widths)]
            width = widths[-1]
            self.down.append(Down(layers, None if last else config.down(width)))
            self.skip_widths += [*widths[1:], *[width] * (not last)]
        self.middle1 = config.layer(width, width, depths[-1])
        self.middle2 = config.layer(width, width, 0)

    def embed(self, t: Tensor, cond: Condition) -> Tensor:
        """Embed the network's time t (B,) and cond.vector: (B, 4*channels), or twice as many with concat_vector."""
        emb = self.time(self.sinusoid(t, self.channels).to(self.stem.weight.dtype))
        if self.vector is None:
            return emb
        vector = self.vector(cond.vector)
        return torch.cat([emb, vector], dim=1) if self.concat_vector else emb + vector

    def memory(self, cond: Condition) -> CrossAttentionCache | None:
        """Compute keys and values of cond.context for every attention, once per prompt; None without a context.

        Raises ConfigError for a context if the network has no cross-attention.
        """
        context = require_context(cond, self.context_dim)
        if context is None:
            return None
        return make_memory(
            (m.attention.memory(context) for m in self.modules() if isinstance(m, Layer) and m.attention is not None),
            cond,
        )

    def encode(self, h: Tensor, emb: Tensor, cursor: MemoryCursor) -> tuple[Tensor, list[Tensor]]:
        """Return the middle's output (B, C, ...) and the skips, first to last, of the stem's h (B, channels, ...)."""
        skips, keep = [h], not self.checkpoint
        for level in self.down:
            skips += level(skips[-1], emb, cursor, keep)
        h = maybe_checkpoint(self.middle1, skips[-1], emb, *cursor(self.middle1), keep=keep)
        return maybe_checkpoint(self.middle2, h, emb, *cursor(self.middle2), keep=keep), skips


class UNet(UNetEncoder):
    """U-Net over x (B, in_channels [+ concat], ...) with sides of any length; returns (B, out_channels, ...).

    dims: the number of sides, 1 (B, C, L), 2 (B, C, H, W) or 3 (B, C, F, H, W).
    padding_mode: what every convolution sees beyond the border: zeros, or circular, the opposite border, for data on a
    ring or torus.
    channels, channel_mult: width, and its factor at each level; every level halves each side.
    num_res_blocks: residual blocks per level.
    attention_resolutions: the downsampling factors (1, 2, 4, ...) that have attention; the middle has it if any factor
    is listed.
    context_dim, vector_dim, concat_channels: sizes of the Condition's fields; None or 0 where the field is not used.
    num_heads: attention heads, or None for as many as have num_head_channels each.
    transformer_depth: transformer blocks per attention, one number or one for each level.
    use_scale_shift_norm, resblock_updown: ADM's residual blocks, and such blocks to change the resolution.
    num_groups, eps: of the residual blocks' normalisations.
    block: constructor of the attention, SpatialTransformer or QKVAttention with their options.
    downsample: constructor of the layer that halves a level without resblock_updown; with stride=[1, 2, 2] a clip's
    frames stay as many.
    time_embedding: embeds t.  vector_embedding: maps cond.vector to the time embedding's width.
    concat_vector: the two are concatenated (AudioLDM), not added.
    gradient_checkpointing: recompute activations in the backward pass.
    residuals: a tensor for each skip, first to last, and one for the middle, added to them (ControlNet).
    Raises ConfigError for num_heads or num_head_channels that do not divide, or depths of another number than levels.
    """

    @staticmethod
    def spatial_dims(dims: int = 2, **options: Any) -> int:
        """Return the number of sides of the samples that a network with these options takes."""
        return dims

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        channels: int = 64,
        channel_mult: Sequence[int] = (1, 2),
        num_res_blocks: int = 2,
        attention_resolutions: Sequence[int] = (2,),
        context_dim: int | None = None,
        vector_dim: int | None = None,
        concat_channels: int = 0,
        num_heads: int | None = None,
        num_head_channels: int = 32,
        transformer_depth: int | Sequence[int] = 1,
        dropout: float = 0.0,
        use_scale_shift_norm: bool = False,
        resblock_updown: bool = False,
        num_groups: int = 32,
        eps: float = 1e-5,
        block: Callable[..., Attention] = SpatialTransformer,
        downsample: Callable[..., nn.Module] = Downsample,
        time_embedding: Callable[[Tensor, int], Tensor] = timestep_embedding,
        vector_embedding: Callable[[int, int], nn.Module] = mlp,
        attention_fn: AttentionFn = sdpa,
        gradient_checkpointing: bool = False,
        dims: int = 2,
        padding_mode: PaddingMode = "zeros",
        concat_vector: bool = False,
    ):
        is_concatenated = concat_vector and bool(vector_dim)
        emb_dim = 8 * channels if is_concatenated else 4 * channels
        blocks = (use_scale_shift_norm, resblock_updown, num_groups, eps, block, downsample, attention_fn)
        config = UNetBlockConfig(
            emb_dim, context_dim, num_heads, num_head_channels, dropout, *blocks, dims=dims, padding_mode=padding_mode
        )
        depths = transformer_depths(transformer_depth, attention_resolutions, len(channel_mult))
        super().__init__(
            config,
            in_channels + concat_channels,
            channels,
            channel_mult,
            num_res_blocks,
            depths,
            vector_dim,
            vector_embedding,
            time_embedding,
            gradient_checkpointing,
            is_concatenated,
        )
        width, skips = self.skip_widths[-1], list(self.skip_widths)
        # registered after the middle: `memory` visits the modules in the order of the forward pass
        self.up = nn.ModuleList()
        for level, factor in reversed(list(enumerate(channel_mult))):
            layers = []
            for _ in range(num_res_blocks + 1):
                layers.append(config.layer(width + skips.pop(), factor * channels, depths[level]))
                width = factor * channels
            self.up.append(Up(layers, config.up(width) if level else None))
        self.out = nn.Sequential(norm(width, num_groups, eps), nn.SiLU(), zero_module(config.conv(width, out_channels)))

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
        emb = self.embed(t, cond) if emb is None else emb
        cursor = MemoryCursor(self.memory(cond) if memory is None else memory)
        h, skips = self.encode(self.stem(concat_condition(x, cond)), emb, cursor)
        if residuals is not None:
            *skip_residuals, middle_residual = residuals
            h, skips = h + middle_residual, [s + r for s, r in zip(skips, skip_residuals, strict=True)]
        for level in self.up:
            h = level(h, skips, emb, cursor, not self.checkpoint)
        return self.out(h)
