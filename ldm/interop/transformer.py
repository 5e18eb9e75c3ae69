"""Parameter names of one spatial transformer, which CompVis, Stability and diffusers share."""

from collections.abc import Iterator

from ldm.interop.keymap import KeyMapping, layer_rows

INNER = {
    **{"norm1": "norm1", "norm2": "norm2", "norm3": "norm3"},
    **{"self_attention.out": "attn1.to_out.0", "cross_attention.out": "attn2.to_out.0"},
    **{"feed_forward.up": "ff.net.0.proj", "feed_forward.down": "ff.net.2"},
}
STACKED = {
    "self_attention.qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "cross_attention.q": ("attn2.to_q",),
    "cross_attention.kv": ("attn2.to_k", "attn2.to_v"),
}


def transformer(ours: str, theirs: str, depth: int) -> Iterator[KeyMapping]:
    """Yield the names of a SpatialTransformer of `depth` blocks; ours, theirs: its prefix with a dot."""
    yield from layer_rows({"norm": "norm", "proj_in": "proj_in", "proj_out": "proj_out"}, ours, theirs)
    for n in range(depth):
        our_block, their_block = f"{ours}blocks.{n}.", f"{theirs}transformer_blocks.{n}."
        yield from layer_rows(INNER, our_block, their_block)
        for name, parts in STACKED.items():
            yield KeyMapping(f"{our_block}{name}.weight", tuple(f"{their_block}{part}.weight" for part in parts))
