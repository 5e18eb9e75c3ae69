"""ADM's, CompVis' and Stability's names of U-Nets and first stages (LDM's and Stable Diffusion's released checkpoints), both ways."""

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
LEVEL = r"\.(?:down|up)\.(\d+)\."  # of a first stage, ours or theirs


def import_unet(state: State) -> dict[str, Tensor]:
    """Our U-Net's weights of CompVis'. Raises UserError for names that it does not have."""
    return import_state(unet(UNetLayout.of_compvis(state)), state, "CompVis U-Net")


def export_unet(state: State) -> dict[str, Tensor]:
    """CompVis' U-Net weights of ours. Raises UserError for what it has no name for."""
    return export_state(unet(UNetLayout.of_ours(state)), state, "CompVis U-Net")


def import_autoencoder(state: State) -> dict[str, Tensor]:
    """Our first stage's weights of CompVis' AutoencoderKL or VQModel. Raises UserError for names that these do not have."""
    return import_state(
        autoencoder(count(LEVEL, state), count(r"\.block\.(\d+)\.", state)), state, "CompVis autoencoder"
    )


def export_autoencoder(state: State) -> dict[str, Tensor]:
    """CompVis' first stage of ours, without scale and shift. Raises UserError for what it has no name for."""
    return export_state(
        autoencoder(count(LEVEL, state), count(r"\.blocks\.(\d+)\.", state)), state, "CompVis autoencoder"
    )


def unet(layout: UNetLayout) -> Iterator[KeyMapping]:
    """Every name that a U-Net of this layout may have."""
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
        place = 2 if stage in layout.attended else 1
        yield from resample(f"up.{stage}.resample.", f"output_blocks.{n - 1}.{place}.", "conv")


def layer(ours: str, theirs: str, layout: UNetLayout) -> Iterator[KeyMapping]:
    """A residual block and the attention after it, of the U-Net's kind."""
    yield from layer_rows(RES, f"{ours}res.", f"{theirs}0.")
    attending = transformer if layout.depth else qkv
    yield from attending(f"{ours}attention.", f"{theirs}1.", layout.depth)


def qkv(ours: str, theirs: str, depth: int = 0) -> Iterator[KeyMapping]:
    """A QKVAttention: convolutions of width 1, whose rows are ordered as the net's `new_order` says."""
    yield from layer_rows({"norm": "norm"}, ours, theirs)
    yield from layer_rows({"qkv": "qkv", "out": "proj_out"}, ours, theirs, ones=1)


def resample(ours: str, theirs: str, convolution: str) -> Iterator[KeyMapping]:
    """What halves or doubles a level: a convolution, or a residual block."""
    yield from layer_rows({"conv": convolution}, ours, theirs)
    yield from layer_rows(RES, ours, theirs)


def autoencoder(levels: int, blocks: int) -> Iterator[KeyMapping]:
    """Every name that a first stage of so many levels and blocks may have."""
    yield from layer_rows({"encoder.moments": "quant_conv", "decoder.latent": "post_quant_conv"}, "", "")
    yield KeyMapping("codebook.weight", ("quantize.embedding.weight",))
    for half, levelled, change in (("encoder", "down", "downsample"), ("decoder", "up", "upsample")):
        yield from layer_rows({"stem": "conv_in", "out.0": "norm_out", "out.2": "conv_out"}, f"{half}.", f"{half}.")
        yield from layer_rows(BLOCK, f"{half}.middle.0.", f"{half}.mid.block_1.")
        yield from layer_rows(ATTENTION, f"{half}.middle.1.", f"{half}.mid.attn_1.")
        yield from layer_rows(BLOCK, f"{half}.middle.2.", f"{half}.mid.block_2.")
        for level in range(levels):
            place = f"{half}.{levelled}.{level}."
            for i in range(blocks):
                yield from layer_rows(BLOCK, f"{place}blocks.{i}.", f"{place}block.{i}.")
                yield from layer_rows(ATTENTION, f"{place}attention.{i}.", f"{place}attn.{i}.")
            yield from layer_rows({"resample.conv": f"{change}.conv"}, place, place)
