"""The cross-attention U-Net of latent diffusion (LDM fig. 3), in ADM's layout."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, cat, nn

from ldm.condition import Condition
from ldm.net.attention import Attend, KeyValue, SpatialTransformer, sdpa
from ldm.net.blocks import Downsample, ResBlock, Upsample, norm, sinusoid, zeroed


class Memory(NamedTuple):
    """What cross-attention looks up: each transformer's keys and values, in the order of the forward pass, and the mask (B, 1, 1, L)."""

    layers: tuple[tuple[KeyValue, ...], ...]
    mask: Tensor | None


class Layer(nn.Module):
    """A residual block, then attention if there is any."""

    def __init__(self, res: ResBlock, attention: SpatialTransformer | None):
        super().__init__()
        self.res, self.attention = res, attention

    def forward(self, h: Tensor, emb: Tensor, memory: tuple[KeyValue, ...] | None, mask: Tensor | None) -> Tensor:
        h = self.res(h, emb)
        return h if self.attention is None else self.attention(h, memory, mask)


class UNet(nn.Module):
    """U-Net over x (B, in_channels [+ concat], H, W) that is told t and a Condition, and answers (B, out_channels, H, W).

    channels, mult: width, and its factor at each level; every level halves height and width.  blocks: residual blocks a level.
    attention: the downsample factors (1, 2, 4, ...) that have a transformer; the middle has one if any level has.
    context_dim, vector_dim, concat_channels: sizes of the Condition's fields; None or 0 where the field is not used.
    heads: attention heads, or None for as many as give head_channels each.  depth: transformer blocks at each place.
    groups: of every group normalisation.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        channels: int = 64,
        mult: Sequence[int] = (1, 2),
        blocks: int = 2,
        attention: Sequence[int] = (2,),
        context_dim: int | None = None,
        vector_dim: int | None = None,
        concat_channels: int = 0,
        heads: int | None = None,
        head_channels: int = 32,
        depth: int = 1,
        dropout: float = 0.0,
        scale_shift: bool = False,
        groups: int = 32,
        attend: Attend = sdpa,
    ):
        super().__init__()
        self.channels, emb_dim = channels, 4 * channels
        self.time = nn.Sequential(nn.Linear(channels, emb_dim), nn.SiLU(), nn.Linear(emb_dim, emb_dim))
        self.vector = nn.Sequential(nn.Linear(vector_dim, emb_dim), nn.SiLU(), nn.Linear(emb_dim, emb_dim)) if vector_dim else None

        def layer(inputs: int, width: int, attended: bool) -> Layer:
            transformer = (
                SpatialTransformer(width, heads or width // head_channels, context_dim, depth, attend, groups) if attended else None
            )
            return Layer(ResBlock(inputs, width, emb_dim, dropout, scale_shift, groups), transformer)

        self.stem = nn.Conv2d(in_channels + concat_channels, channels, 3, padding=1)
        self.down = nn.ModuleList()
        width, skips = channels, [channels]
        for level, factor in enumerate(mult):
            stage = nn.ModuleList()
            for _ in range(blocks):
                stage.append(layer(width, factor * channels, 2**level in attention))
                width = factor * channels
                skips.append(width)
            self.down.append(stage)
            if level < len(mult) - 1:
                stage.append(Downsample(width))
                skips.append(width)

        self.middle1 = layer(width, width, bool(attention))
        self.middle2 = layer(width, width, False)

        self.up = nn.ModuleList()  # after the middle: `memory` goes through the modules in the order of the forward pass
        for level, factor in reversed(list(enumerate(mult))):
            stage = nn.ModuleList()
            for _ in range(blocks + 1):
                stage.append(layer(width + skips.pop(), factor * channels, 2**level in attention))
                width = factor * channels
            if level > 0:
                stage.append(Upsample(width))
            self.up.append(stage)
        self.out = nn.Sequential(norm(width, groups), nn.SiLU(), zeroed(nn.Conv2d(width, out_channels, 3, padding=1)))

    def embed(self, t: Tensor, cond: Condition) -> Tensor:
        """Embedding (B, 4*channels) of the network's time t (B,) and of cond.vector."""
        emb = self.time(sinusoid(t, self.channels).to(self.stem.weight.dtype))
        return emb if self.vector is None else emb + self.vector(cond.vector)

    def memory(self, cond: Condition) -> Memory | None:
        """Keys and values of cond.context for every cross-attention, to be computed once per prompt; None without a context."""
        if cond.context is None:
            return None
        layers = tuple(m.memory(cond.context) for m in self.modules() if isinstance(m, SpatialTransformer))
        return Memory(layers, None if cond.mask is None else cond.mask[:, None, None, :])

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        cond: Condition,
        *,
        emb: Tensor | None = None,
        memory: Memory | None = None,
        residuals: Sequence[Tensor] | None = None,
    ) -> Tensor:
        emb = self.embed(t, cond) if emb is None else emb
        memory = self.memory(cond) if memory is None else memory
        layers, mask = (iter(memory.layers), memory.mask) if memory else (iter(()), None)

        def run(module: nn.Module, h: Tensor) -> Tensor:
            if not isinstance(module, Layer):
                return module(h)
            return module(h, emb, next(layers, None) if module.attention is not None else None, mask)

        h = self.stem(x if cond.concat is None else cat([x, cond.concat], dim=1))
        skips = [h]
        for stage in self.down:
            for module in stage:
                h = run(module, h)
                skips.append(h)
        h = run(self.middle2, run(self.middle1, h))
        if residuals is not None:
            *of_skips, of_middle = residuals
            h, skips = h + of_middle, [s + r for s, r in zip(skips, of_skips, strict=True)]
        for stage in self.up:
            for module in stage:
                h = run(module, cat([h, skips.pop()], dim=1) if isinstance(module, Layer) else h)
        return self.out(h)
