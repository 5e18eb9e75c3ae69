"""Parameter names of U-Nets and first stages by ADM, CompVis and Stability (LDM, Stable Diffusion), both ways."""

from collections.abc import Iterator

from torch import Tensor

from ldm.interop.keymap import KeyMapping, State, count, export_state, import_state, layer_rows
from ldm.interop.layout import UNetLayout
from ldm.interop.transformer import transformer

RES = {
    **{"norm1": "in_layers.0", "conv1": "in_layers.2", "emb": "emb_layers.1"},
    **{"norm2": "out_layers.0", "conv2": "out_layers.3", "skip": "skip_connection"},
}
ENDS = {
    **{"time.0": "time_embed.0", "time.2": "time_embed.2", "vector.0": "label_emb.0.0", "vector.2": "label_emb.0.2"},
    **{"stem": "input_blocks.0.0", "out.0": "out.0", "out.2": "out.2"},
}
BLOCK = {"norm1": "norm1", "conv1": "conv1", "norm2": "norm2", "conv2": "conv2", "skip": "nin_shortcut"}
ATTENTION = {"norm": "norm", "q": "q", "k": "k", "v": "v", "out": "proj_out"}
LEVEL = r"\.(?:down|up)\.(\d+)\."  # of a first stage, in ours and theirs


def import_unet(state: State) -> dict[str, Tensor]:
    """Convert CompVis' U-Net weights to ours.  Raises UserError for unknown names."""
    return import_state(unet(UNetLayout.of_compvis(state)), state, "CompVis U-Net")


def export_unet(state: State) -> dict[str, Tensor]:
    """Convert our U-Net's weights to CompVis'.  Raises UserError for a weight without a name there."""
    return export_state(unet(UNetLayout.of_ours(state)), state, "CompVis U-Net")


def import_autoencoder(state: State) -> dict[str, Tensor]:
    """Convert CompVis' AutoencoderKL or VQModel to ours.  Raises UserError for unknown names."""
    return import_state(
        autoencoder(count(LEVEL, state), count(r"\.block\.(\d+)\.", state)), state, "CompVis autoencoder"
    )


def export_autoencoder(state: State) -> dict[str, Tensor]:
    """Convert our first stage to CompVis', without scale and shift.

    Raises UserError for a weight without a name there.
    """
    return export_state(
        autoencoder(count(LEVEL, state), count(r"\.blocks\.(\d+)\.", state)), state, "CompVis autoencoder"
    )


def unet(layout: UNetLayout) -> Iterator[KeyMapping]:
    """Yield every name that a U-Net of this layout may have."""
    yield from layer_rows(ENDS, "", "")
    n = 1
    for level in range(layout.levels):
        for i in range(layout.blocks):
            yield from layer(f"down.{level}.layers.{i}.", f"input_blocks.{n}.", layout)
            n += 1
        yield from resample(f"down.{level}.resample.", f"input_blocks.{n}.0.", "op")
        n += 1
    yield from layer("middle1.", "middle_block.", layout)
    yield from layer_rows(RES, "middle2.res.", "middle_block.2.")
    n = 0
    for stage in range(layout.levels):
        for i in range(layout.blocks + 1):
            yield from layer(f"up.{stage}.layers.{i}.", f"output_blocks.{n}.", layout)
            n += 1
        index = 2 if stage in layout.attended else 1
        yield from resample(f"up.{stage}.resample.", f"output_blocks.{n - 1}.{index}.", "conv")


def layer(ours: str, theirs: str, layout: UNetLayout) -> Iterator[KeyMapping]:
    """Yield the names of a residual block and the attention after it, of the U-Net's kind."""
    yield from layer_rows(RES, f"{ours}res.", f"{theirs}0.")
    attending = transformer if layout.depth else qkv
    yield from attending(f"{ours}attention.", f"{theirs}1.", layout.depth)


def qkv(ours: str, theirs: str, depth: int = 0) -> Iterator[KeyMapping]:
    """Yield the names of a QKVAttention: convolutions of width 1; the order of its rows is the net's `new_order`."""
    yield from layer_rows({"norm": "norm"}, ours, theirs)
    yield from layer_rows({"qkv": "qkv", "out": "proj_out"}, ours, theirs, ones=1)


def resample(ours: str, theirs: str, convolution: str) -> Iterator[KeyMapping]:
    """Yield the names of a layer that halves or doubles the resolution: a convolution or a residual block."""
    yield from layer_rows({"conv": convolution}, ours, theirs)
    yield from layer_rows(RES, ours, theirs)


def autoencoder(levels: int, blocks: int) -> Iterator[KeyMapping]:
    """Yield every name that a first stage of so many levels and blocks may have."""
    yield from layer_rows({"encoder.moments": "quant_conv", "decoder.latent": "post_quant_conv"}, "", "")
    yield KeyMapping("codebook.weight", ("quantize.embedding.weight",))
    for half, levelled, change in (("encoder", "down", "downsample"), ("decoder", "up", "upsample")):
        yield from layer_rows({"stem": "conv_in", "out.0": "norm_out", "out.2": "conv_out"}, f"{half}.", f"{half}.")
        yield from layer_rows(BLOCK, f"{half}.middle.0.", f"{half}.mid.block_1.")
        yield from layer_rows(ATTENTION, f"{half}.middle.1.", f"{half}.mid.attn_1.")
        yield from layer_rows(BLOCK, f"{half}.middle.2.", f"{half}.mid.block_2.")
        for level in range(levels):
            prefix = f"{half}.{levelled}.{level}."
            for i in range(blocks):
                yield from layer_rows(BLOCK, f"{prefix}blocks.{i}.", f"{prefix}block.{i}.")
                yield from layer_rows(ATTENTION, f"{prefix}attention.{i}.", f"{prefix}attn.{i}.")
            yield from layer_rows({"resample.conv": f"{change}.conv"}, prefix, prefix)
