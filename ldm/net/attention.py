"""Self- and cross-attention, and the spatial transformer of latent diffusion (LDM, app. E.2.1)."""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.condition import Condition
from ldm.errors import ConfigError
from ldm.net.blocks import CONV, norm, zero_module

MAX_SMALL_SEQUENCE = 128  # keys
# q, k, v (B, heads, N, d), mask (B, 1, 1, L) or None -> (B, heads, N, d)
AttentionFn = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
KeyValue = tuple[Tensor, Tensor]  # each (B, heads, L, d)
Rotate = Callable[[Tensor], Tensor]  # queries or keys (B, heads, N, d), each rotated by its position


class CrossAttentionCache(NamedTuple):
    """Keys and values of every cross-attention layer, in the order of the forward pass, and the mask (B, 1, 1, L)."""

    layers: tuple[tuple[KeyValue, ...], ...]
    mask: Tensor | None


def require_context(cond: Condition, context_dim: int | None) -> Tensor | None:
    """Return cond.context (B, L, D), or None if there is none.

    Raises ConfigError if there is a context but the network has no cross-attention (context_dim is None).
    """
    if cond.context is not None and not context_dim:
        raise ConfigError(
            "the condition has a context but the network has no cross-attention; build it with context_dim"
        )
    return cond.context


def make_memory(layers: Iterable[tuple[KeyValue, ...]], cond: Condition) -> CrossAttentionCache:
    """Build the cache of these keys and values, with the condition's mask in the shape that attention takes."""
    return CrossAttentionCache(tuple(layers), None if cond.mask is None else cond.mask[:, None, None, :])


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Compute attention with torch's fused kernel.

    When training in bfloat16 on a CPU, few keys go through softmax_attention instead, whose gradients are faster there.
    """
    if (
        v.device.type == "cpu"
        and v.dtype == torch.bfloat16
        and k.shape[-2] <= MAX_SMALL_SEQUENCE
        and torch.is_grad_enabled()
    ):
        return softmax_attention(q, k, v, mask)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Compute attention without a fused kernel; the result is that of sdpa."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)  # (B, heads, N, L)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(v.dtype) @ v


class SelfAttention(nn.Module):
    """Multi-head attention of x (B, N, C) over itself, with one projection for query, key and value.

    bias: whether that projection has one.
    qk_norm: builds the normalisation of queries and of keys over a head's d (Dehghani et al. 2023), or None.
    """

    def __init__(
        self,
        channels: int,
        heads: int,
        attend: AttentionFn = sdpa,
        bias: bool = False,
        qk_norm: Callable[[int], nn.Module] | None = None,
    ):
        super().__init__()
        self.heads, self.attend = heads, attend
        self.qkv = nn.Linear(channels, 3 * channels, bias=bias)
        self.q_norm, self.k_norm = (qk_norm(channels // heads) if qk_norm else nn.Identity() for _ in range(2))
        self.out = nn.Linear(channels, channels)

    def forward(self, x: Tensor, rotate: Rotate | None = None) -> Tensor:
        q, k, v = rearrange(self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.heads)
        q, k = self.q_norm(q), self.k_norm(k)
        if rotate is not None:
            q, k = rotate(q), rotate(k)
        return self.out(rearrange(self.attend(q, k, v, None), "b h n d -> b n (h d)"))


class CrossAttention(nn.Module):
    """Multi-head attention of x (B, N, C) over a context (B, L, D), whose keys and values `memory` computes."""

    def __init__(self, channels: int, context_dim: int, heads: int, attend: AttentionFn = sdpa):
        super().__init__()
        self.heads, self.attend = heads, attend
        self.q = nn.Linear(channels, channels, bias=False)
        self.kv = nn.Linear(context_dim, 2 * channels, bias=False)
        self.out = nn.Linear(channels, channels)

    def memory(self, context: Tensor) -> KeyValue:
        """Compute keys and values of the context (B, L, D): two of (B, heads, L, d)."""
        k, v = rearrange(self.kv(context), "b n (two h d) -> two b h n d", two=2, h=self.heads)
        return k, v

    def forward(self, x: Tensor, memory: KeyValue, mask: Tensor | None) -> Tensor:
        q = rearrange(self.q(x), "b n (h d) -> b h n d", h=self.heads)
        return self.out(rearrange(self.attend(q, *memory, mask), "b h n d -> b n (h d)"))


class FeedForward(nn.Module):
    """GEGLU feed-forward layer of x (B, N, C), `mult` times as wide inside (Shazeer 2020)."""

    def __init__(self, channels: int, mult: int = 4):
        super().__init__()
        self.up = nn.Linear(channels, 2 * mult * channels)
        self.down = nn.Linear(mult * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        h, gate = self.up(x).chunk(2, dim=-1)
        return self.down(h * F.gelu(gate))


class TransformerBlock(nn.Module):
    """Pre-norm self-attention, cross-attention (with a context_dim) and feed-forward on x (B, N, C) (LDM tab. 16).

    twice: without a context_dim, a second self-attention is in the place of the cross-attention.
    """

    def __init__(
        self,
        channels: int,
        heads: int,
        context_dim: int | None = None,
        attend: AttentionFn = sdpa,
        twice: bool = False,
    ):
        super().__init__()
        is_double = twice and not context_dim
        self.norm1, self.self_attention = nn.LayerNorm(channels), SelfAttention(channels, heads, attend)
        self.norm2 = nn.LayerNorm(channels) if context_dim or is_double else None
        self.cross_attention = CrossAttention(channels, context_dim, heads, attend) if context_dim else None
        self.second_attention = SelfAttention(channels, heads, attend) if is_double else None
        self.norm3, self.feed_forward = nn.LayerNorm(channels), FeedForward(channels)

    def forward(self, x: Tensor, memory: KeyValue | None = None, mask: Tensor | None = None) -> Tensor:
        x = x + self.self_attention(self.norm1(x))
        if self.cross_attention is not None and self.norm2 is not None and memory is not None:
            x = x + self.cross_attention(self.norm2(x), memory, mask)
        if self.second_attention is not None and self.norm2 is not None:
            x = x + self.second_attention(self.norm2(x))
        return x + self.feed_forward(self.norm3(x))


class SpatialTransformer(nn.Module):
    """`depth` transformer blocks over a feature map (B, C, ...), a token per position, added to it (LDM app. E.2.1).

    conv: store the projections as 1x1 convolutions (SD 1), not as linear layers (SD 2, SDXL); they compute the same.
    twice: without a context_dim, each block has a second self-attention, as CompVis' code and AudioLDM's models do.
    dims: sides of the map.
    """

    def __init__(
        self,
        channels: int,
        heads: int,
        context_dim: int | None = None,
        depth: int = 1,
        attend: AttentionFn = sdpa,
        groups: int = 32,
        conv: bool = False,
        eps: float = 1e-6,
        twice: bool = False,
        dims: int = 2,
    ):
        super().__init__()
        self.norm, self.conv = norm(channels, groups, eps), conv
        self.proj_in = CONV[dims](channels, channels, 1) if conv else nn.Linear(channels, channels)
        self.blocks = nn.ModuleList(TransformerBlock(channels, heads, context_dim, attend, twice) for _ in range(depth))
        self.proj_out = zero_module(CONV[dims](channels, channels, 1) if conv else nn.Linear(channels, channels))

    def memory(self, context: Tensor) -> tuple[KeyValue, ...]:
        """Compute keys and values of the context (B, L, D) for each block."""
        return tuple(m.memory(context) for m in self.modules() if isinstance(m, CrossAttention))

    def forward(self, x: Tensor, memory: tuple[KeyValue, ...] | None = None, mask: Tensor | None = None) -> Tensor:
        sides, h = x.shape[2:], self.norm(x)
        h = tokens(self.proj_in(h)) if self.conv else self.proj_in(tokens(h))
        for i, block in enumerate(self.blocks):
            h = block(h, memory[i] if memory else None, mask)
        return x + (self.proj_out(feature_map(h, sides)) if self.conv else feature_map(self.proj_out(h), sides))


class QKVAttention(nn.Module):
    """ADM's attention of a feature map (B, C, ...) over itself, added to the input.

    Dhariwal & Nichol 2021; DDPM with one head.
    new_order: the projection's 3C channels are (q, k, v) of (heads, d), ADM's `use_new_attention_order`, not heads of
    (q, k, v).
    depth: must be 1.  Raises ConfigError for another depth, or for a context, which it does not support.
    dims: not read: a map of any number of sides is a set of tokens.
    """

    def __init__(
        self,
        channels: int,
        heads: int,
        context_dim: int | None = None,
        depth: int = 1,
        attend: AttentionFn = sdpa,
        groups: int = 32,
        new_order: bool = False,
        eps: float = 1e-5,
        dims: int = 2,
    ):
        super().__init__()
        if context_dim or depth != 1:
            option = f"context_dim={context_dim}" if context_dim else f"transformer_depth={depth}"
            raise ConfigError(
                f"{option}: QKVAttention is one self-attention; "
                "use SpatialTransformer, or conditioner=none or label_vector"
            )
        self.heads, self.attend = heads, attend
        self.order = "b n (three h d) -> three b h n d" if new_order else "b n (h three d) -> three b h n d"
        self.norm = norm(channels, groups, eps)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = zero_module(nn.Linear(channels, channels))

    def memory(self, context: Tensor) -> tuple[KeyValue, ...]:
        """Return an empty tuple: there is no cross-attention."""
        return ()

    def forward(self, x: Tensor, memory: tuple[KeyValue, ...] | None = None, mask: Tensor | None = None) -> Tensor:
        q, k, v = rearrange(self.qkv(tokens(self.norm(x))), self.order, three=3, h=self.heads)
        h = rearrange(self.attend(q, k, v, None), "b h n d -> b n (h d)")
        return x + feature_map(self.out(h), x.shape[2:])


def tokens(x: Tensor) -> Tensor:
    """Flatten a feature map (B, C, ...) to tokens (B, N, C), a token per position, the last side fastest."""
    return x.movedim(1, -1).flatten(1, -2)  # a view, if the channels are last in memory


def feature_map(h: Tensor, sides: Sequence[int]) -> Tensor:
    """Reshape tokens (B, N, C) to a feature map (B, C, *sides)."""
    return h.unflatten(1, tuple(sides)).movedim(-1, 1)
