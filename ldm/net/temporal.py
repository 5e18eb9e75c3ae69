"""A U-Net of images inflated to clips: temporal layers between those of the image network (AnimateDiff).

Guo et al. 2024: the image network sees the frames one by one; after every of its layers, a transformer along time adds
what the frames have to do with each other. It is zero at first, so that before the first step nothing has changed.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from ldm.condition import Condition
from ldm.errors import ConfigError
from ldm.net.attention import CrossAttentionCache, FeedForward, SelfAttention
from ldm.net.blocks import norm, zero_module
from ldm.net.positions import sincos
from ldm.net.unet import Layer, LayerMemory, UNet


class TemporalTransformer(nn.Module):
    """Two self-attentions along time and a feed-forward layer at every place of (B F, C, H, W), added to the input.

    Sines and cosines of the frame's number are added before each attention.  The last projection is zero at first.
    frames: F, set before each forward pass.
    """

    frames: int = 1

    def __init__(self, channels: int, heads: int, groups: int):
        super().__init__()
        if heads < 1 or channels % heads:
            raise ConfigError(f"temporal_heads={heads} does not divide a level's {channels} channels; choose another")
        self.norm = norm(channels, groups)
        self.proj_in = nn.Linear(channels, channels)
        self.norms = nn.ModuleList(nn.LayerNorm(channels) for _ in range(3))
        self.attentions = nn.ModuleList(SelfAttention(channels, heads) for _ in range(2))
        self.feed_forward = FeedForward(channels)
        self.proj_out = zero_module(nn.Linear(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        sides, clips = x.shape[2:], len(x) // self.frames
        h = self.norm(x).unflatten(0, (clips, self.frames)).flatten(3)  # (B, F, C, N)
        h = self.proj_in(h.permute(0, 3, 1, 2).flatten(0, 1))  # (B N, F, C)
        places = sincos([self.frames], h.shape[2], h.device).to(h.dtype)
        for normalise, attention in zip(self.norms, self.attentions, strict=False):
            h = h + attention(normalise(h) + places)
        h = self.proj_out(h + self.feed_forward(self.norms[2](h)))
        return x + h.unflatten(0, (clips, -1)).permute(0, 2, 3, 1).flatten(0, 1).unflatten(2, sides)


class TemporalLayer(Layer):
    """A layer of a U-Net, with its weights under their names, followed by a TemporalTransformer."""

    def __init__(self, layer: Layer, temporal: TemporalTransformer):
        super().__init__(layer.res, layer.attention)
        self.temporal = temporal

    def forward(self, h: Tensor, emb: Tensor, memory: LayerMemory, mask: Tensor | None) -> Tensor:
        return self.temporal(super().forward(h, emb, memory, mask))


class InflatedUNet(UNet):
    """A U-Net of images over the frames of x (B, in_channels [+ concat], F, H, W), with temporal layers.

    The weights of a trained UNet with the same options load under their names; those of the temporal layers are new.
    temporal_heads: of their attentions.  The other options are UNet's; a residual is not taken.
    """

    spatial_dims = 3  # type: ignore[assignment]

    def __init__(
        self, in_channels: int, out_channels: int, temporal_heads: int = 8, num_groups: int = 32, **options: Any
    ):
        super().__init__(in_channels, out_channels, num_groups=num_groups, **options)

        def inflate(layer: Layer) -> TemporalLayer:
            channels = layer.res.norm2.weight.shape[0]
            return TemporalLayer(layer, TemporalTransformer(channels, temporal_heads, num_groups))

        for level in (*self.down, *self.up):
            level.layers = nn.ModuleList(inflate(layer) for layer in level.layers)
        self.middle1 = inflate(self.middle1)

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
        frames = x.shape[2]
        for module in self.modules():
            if isinstance(module, TemporalTransformer):
                module.frames = frames
        emb = self.embed(t, cond) if emb is None else emb
        memory = self.memory(cond) if memory is None else memory
        if memory is not None:
            layers = tuple(tuple((rows(k, frames), rows(v, frames)) for k, v in layer) for layer in memory.layers)
            memory = CrossAttentionCache(layers, None if memory.mask is None else rows(memory.mask, frames))
        images = replace(cond, concat=None if cond.concat is None else fold(cond.concat.expand(-1, -1, frames, -1, -1)))
        y = super().forward(
            fold(x), t, images, emb=emb if len(emb) == 1 else rows(emb, frames), memory=memory, residuals=residuals
        )
        return y.unflatten(0, (-1, frames)).transpose(1, 2)


def fold(x: Tensor) -> Tensor:
    """Make the frames of clips (B, C, F, H, W) rows of a batch of images (B F, C, H, W)."""
    return x.transpose(1, 2).flatten(0, 1)


def rows(x: Tensor, frames: int) -> Tensor:
    """Repeat each row of x (B, ...) for every frame: (B F, ...)."""
    return x.repeat_interleave(frames, 0) if len(x) > 1 else x.expand(frames, *x.shape[1:])
