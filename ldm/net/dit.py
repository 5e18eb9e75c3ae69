"""The diffusion transformer DiT with adaLN-Zero (Peebles & Xie 2023), with later blocks as options."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.condition import Condition
from ldm.errors import ConfigError
from ldm.net.attention import (
    AttentionFn,
    CrossAttention,
    CrossAttentionCache,
    KeyValue,
    Rotate,
    SelfAttention,
    make_memory,
    require_context,
    sdpa,
    tokens,
)
from ldm.net.blocks import CONV, as_sides, identity_embedding, maybe_checkpoint, mlp, timestep_embedding, zero_module
from ldm.net.positions import sincos

plain_norm = partial(nn.LayerNorm, elementwise_affine=False, eps=1e-6)


class MLP(nn.Module):
    """Two linear layers on x (B, N, C), `mult` times as wide inside, with a GELU (its tanh form) between."""

    def __init__(self, channels: int, mult: float = 4.0):
        super().__init__()
        self.up, self.down = nn.Linear(channels, int(mult * channels)), nn.Linear(int(mult * channels), channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x), approximate="tanh"))


class SwiGLU(nn.Module):
    """Gated feed-forward layer of x (B, N, C), 2/3 `mult` times as wide inside: an MLP's size (Shazeer 2020, eq. 6)."""

    def __init__(self, channels: int, mult: float = 4.0):
        super().__init__()
        inside = int(2 / 3 * int(mult * channels))
        self.up, self.down = nn.Linear(channels, 2 * inside), nn.Linear(inside, channels)

    def forward(self, x: Tensor) -> Tensor:
        gate, h = self.up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * h)


class DiTBlock(nn.Module):
    """Self-attention, cross-attention (with a context_dim) and feed-forward on x (B, N, C), with adaLN-Zero.

    The modulation is a linear function of silu(emb) (B, C).
    Cross-attention is placed as in PixArt-alpha (Chen et al. 2023, fig. 4): not modulated, and initially zero.
    """

    def __init__(
        self,
        channels: int,
        heads: int,
        context_dim: int | None,
        norm: Callable[[int], nn.Module],
        feed_forward: Callable[[int], nn.Module],
        qk_norm: Callable[[int], nn.Module] | None,
        attend: AttentionFn,
    ):
        super().__init__()
        self.norm1, self.attention = norm(channels), SelfAttention(channels, heads, attend, bias=True, qk_norm=qk_norm)
        self.cross_attention = CrossAttention(channels, context_dim, heads, attend) if context_dim else None
        self.norm2, self.feed_forward = norm(channels), feed_forward(channels)
        self.modulation = nn.Linear(channels, 6 * channels)

    def forward(
        self,
        x: Tensor,
        silu_emb: Tensor,
        memory: tuple[KeyValue, ...] | None,
        mask: Tensor | None,
        rotate: Rotate | None,
    ) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(silu_emb)[:, None].chunk(6, dim=-1)  # (B, 1, C)
        x = x + gate1 * self.attention(self.norm1(x) * (1 + scale1) + shift1, rotate)
        if self.cross_attention is not None and memory is not None:
            x = x + self.cross_attention(x, memory[0], mask)
        return x + gate2 * self.feed_forward(self.norm2(x) * (1 + scale2) + shift2)


class Head(nn.Module):
    """From tokens (B, N, C) to their patches (B, N, features), modulated by adaLN on silu(emb) (B, C)."""

    def __init__(self, channels: int, features: int, norm: Callable[[int], nn.Module]):
        super().__init__()
        self.norm, self.modulation, self.out = (
            norm(channels),
            nn.Linear(channels, 2 * channels),
            nn.Linear(channels, features),
        )

    def forward(self, x: Tensor, silu_emb: Tensor) -> Tensor:
        shift, scale = self.modulation(silu_emb)[:, None].chunk(2, dim=-1)  # (B, 1, C)
        return self.out(self.norm(x) * (1 + scale) + shift)


class DiT(nn.Module):
    """Transformer over the patches of x (B, in_channels [+ concat], ...); returns (B, out_channels, ...).

    patch_size: the sides of a patch, which must divide those of x: a list of one, two or three numbers for (B, C, L),
    (B, C, H, W) or (B, C, F, H, W), as [1, 2, 2] for the frames of a clip; one number for both sides of an image.
    channels, depth, num_heads: width, blocks, attention heads.
    context_dim, vector_dim, concat_channels: sizes of the Condition's fields; None or 0 where the field is not used.
    norm, feed_forward: constructors of the layers, called with the width.  qk_norm: constructor of the normalisation of
    queries and keys, called with a head's width, or None.
    positions: embeddings added to the tokens of a grid.  rotary: rope, or None.  time_embedding: embeds t in
    `frequencies` numbers.
    vector_embedding: maps cond.vector to the time embedding; DiT adds a class's row unchanged.
    residuals: one (B, N, channels) for each block, added to its output.
    gradient_checkpointing: recompute activations in the backward pass.
    LightningDiT (Yao & Wang 2025) is torch.nn.RMSNorm, SwiGLU and rope.  Raises ConfigError for sizes the patch does
    not divide.
    """

    @staticmethod
    def spatial_dims(patch_size: int | Sequence[int] = 2, **options: Any) -> int:
        """Return the number of sides of the samples that a network with these options takes."""
        return len(as_sides(patch_size, "patch_size"))

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        patch_size: int | Sequence[int] = 2,
        channels: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        context_dim: int | None = None,
        vector_dim: int | None = None,
        concat_channels: int = 0,
        frequencies: int = 256,
        norm: Callable[[int], nn.Module] = plain_norm,
        feed_forward: Callable[[int], nn.Module] = MLP,
        qk_norm: Callable[[int], nn.Module] | None = None,
        positions: Callable[..., Tensor] = sincos,
        rotary: Callable[..., Rotate] | None = None,
        time_embedding: Callable[[Tensor, int], Tensor] = timestep_embedding,
        vector_embedding: Callable[[int, int], nn.Module] = identity_embedding,
        attention_fn: AttentionFn = sdpa,
        gradient_checkpointing: bool = False,
    ):
        super().__init__()
        if num_heads < 1 or channels % num_heads:
            raise ConfigError(f"num_heads={num_heads} does not divide channels={channels}")
        self.sides, self.channels, self.heads, self.frequencies, self.context_dim = (
            as_sides(patch_size, "patch_size"),
            channels,
            num_heads,
            frequencies,
            context_dim,
        )
        self.positions, self.rotary, self.sinusoid, self.checkpoint = (
            positions,
            rotary,
            time_embedding,
            gradient_checkpointing,
        )
        self.time = mlp(frequencies, channels)
        self.vector = vector_embedding(vector_dim, channels) if vector_dim else None
        self.patch = CONV[len(self.sides)](in_channels + concat_channels, channels, self.sides, self.sides)
        self.blocks = nn.ModuleList(
            DiTBlock(channels, num_heads, context_dim, norm, feed_forward, qk_norm, attention_fn) for _ in range(depth)
        )
        self.head = Head(channels, math.prod(self.sides) * out_channels, norm)
        self.initialise()

    def initialise(self) -> None:
        """Initialise the weights as DiT's code does (sec. 3.2).

        Xavier; a small normal for the time embedding; zero for the last layer of each residual branch and of the
        network.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear) or module is self.patch:
                nn.init.xavier_uniform_(module.weight.flatten(1))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, DiTBlock | Head):
                zero_module(module.modulation)
            elif isinstance(module, CrossAttention):
                zero_module(module.out)
        zero_module(self.head.out)
        for module in self.time:
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)

    def embed(self, t: Tensor, cond: Condition) -> Tensor:
        """Embed the network's time t (B,) and cond.vector: (B, channels)."""
        emb = self.time(self.sinusoid(t, self.frequencies).to(self.patch.weight.dtype))
        return emb if self.vector is None else emb + self.vector(cond.vector)

    def memory(self, cond: Condition) -> CrossAttentionCache | None:
        """Compute keys and values of cond.context for every block, once per prompt; None without a context.

        Raises ConfigError for a context if the network has no cross-attention.
        """
        context = require_context(cond, self.context_dim)
        if context is None:
            return None
        return make_memory(((m.memory(context),) for m in self.modules() if isinstance(m, CrossAttention)), cond)

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
        if len(self.sides) != x.ndim - 2 or any(s % p for s, p in zip(x.shape[2:], self.sides, strict=False)):
            sides, patch = (" x ".join(map(str, one)) for one in (x.shape[2:], self.sides))
            raise ConfigError(f"{sides} cannot be cut into patches of {patch}; choose another size of image")
        silu_emb = F.silu(self.embed(t, cond) if emb is None else emb)
        memory = self.memory(cond) if memory is None else memory
        h = self.patch(x if cond.concat is None else torch.cat([x, cond.concat], dim=1))  # (B, C, *grid)
        grid = h.shape[2:]
        rotate = self.rotary(grid, self.channels // self.heads, h.device) if self.rotary else None
        h = tokens(h) + self.positions(grid, self.channels, h.device).to(h.dtype)  # (B, N, C)
        layers: Sequence[tuple[KeyValue, ...] | None] = memory.layers if memory else [None] * len(self.blocks)
        added: Sequence[Tensor | None] = residuals if residuals is not None else [None] * len(self.blocks)
        mask, keep = memory.mask if memory else None, not self.checkpoint
        for block, kv, residual in zip(self.blocks, layers, added, strict=True):
            h = maybe_checkpoint(block, h, silu_emb, kv, mask, rotate, keep=keep)
            h = h if residual is None else h + residual
        return join_patches(self.head(h, silu_emb), grid, self.sides)


def join_patches(h: Tensor, grid: Sequence[int], patch: Sequence[int]) -> Tensor:
    """Put the patches of tokens (B, N, features), of a grid of N, side by side: (B, C, ...).

    The features of a token are the positions of its patch, the last side fastest, then C, which is DiT's order.
    """
    dims = len(grid)
    h = h.unflatten(2, (*patch, -1)).unflatten(1, tuple(grid))  # (B, *grid, *patch, C)
    sides = [axis for side in range(1, dims + 1) for axis in (side, side + dims)]
    return h.permute(0, -1, *sides).reshape(len(h), -1, *(g * p for g, p in zip(grid, patch, strict=True)))
