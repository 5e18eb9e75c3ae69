"""CLIP's text tower: names of transformers' CLIPTextModel and of open_clip, both ways.

Ours is open_clip's, without the image tower.
"""

from collections.abc import Iterator

from torch import Tensor

from ldm.errors import UserError
from ldm.interop.keymap import KeyMapping, State, count, export_state, import_state, layer_rows

POSITIONS = "embeddings.position_ids"  # 0, 1, 2, ...: a buffer in transformers before 4.31
NOT_TEXT = ("logit_scale", "attn_mask")  # in open_clip: the temperature of contrastive training, and the causal mask
LAYER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}
PREFIX = "text_model."  # of every name except the projection's, before transformers 5


def import_text(state: State) -> dict[str, Tensor]:
    """Convert transformers' CLIPTextModel, with or without projection, to open_clip's names.

    Raises UserError for unknown names.
    """
    bare = {name.removeprefix(PREFIX): value for name, value in state.items()}
    bare.pop(POSITIONS, None)
    return import_state(tower(count(r"(?m)^encoder\.layers\.(\d+)\.", bare)), bare, "CLIP text model")


def export_text(state: State, depth: int | None = None, projection: bool = False) -> dict[str, Tensor]:
    """Convert open_clip's text tower to transformers' names.

    depth: number of layers to export; Stable Diffusion 2 uses the last but one, so its folder has 23 of 24.
    projection: export the projection of the pooled vector, for CLIPTextModelWithProjection (SDXL's second tower).
    Raises UserError for a weight without a name in transformers, and if depth is too large.
    """
    bare = {name.removeprefix("text."): value for name, value in state.items()}
    layers = count(r"(?m)^transformer\.resblocks\.(\d+)\.", bare)
    if not 0 < (depth or layers) <= layers:
        raise UserError(f"depth={depth}: the text tower has {layers} layers")
    beyond = tuple(f"transformer.resblocks.{n}." for n in range(depth or layers, layers))
    left_out = (*NOT_TEXT, *(() if projection else ("text_projection",)))
    weights = {name: value for name, value in bare.items() if name not in left_out and not name.startswith(beyond)}
    state = export_state(tower(layers), weights, "CLIP text model")
    return {name if name == "text_projection.weight" else f"{PREFIX}{name}": value for name, value in state.items()}


def import_open_clip(state: State) -> dict[str, Tensor]:
    """Return the text tower in open_clip's weights, including CustomTextCLIP's.  Raises UserError if there is none."""
    bare = {name.removeprefix("text."): value for name, value in state.items() if not name.startswith("visual.")}
    if "token_embedding.weight" not in bare:
        raise UserError("these are not the weights of an open_clip text tower: no token_embedding.weight")
    return {name: value for name, value in bare.items() if name not in NOT_TEXT}


def tower(depth: int) -> Iterator[KeyMapping]:
    """Yield every name that a text tower of `depth` layers may have."""
    yield KeyMapping("token_embedding.weight", ("embeddings.token_embedding.weight",))
    yield KeyMapping("positional_embedding", ("embeddings.position_embedding.weight",))
    yield from layer_rows({"ln_final": "final_layer_norm"}, "", "")
    yield KeyMapping("text_projection", ("text_projection.weight",), transposed=True)
    for n in range(depth):
        ours, theirs = f"transformer.resblocks.{n}.", f"encoder.layers.{n}."
        yield from layer_rows(LAYER, ours, theirs)
        for leaf in ("weight", "bias"):
            parts = (f"{theirs}self_attn.{part}_proj.{leaf}" for part in ("q", "k", "v"))
            yield KeyMapping(f"{ours}attn.in_proj_{leaf}", tuple(parts))
