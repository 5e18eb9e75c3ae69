"""LDM's text transformer (BERTEmbedder): names of CompVis' x_transformer and of diffusers' LDMBertModel, both ways."""

from collections.abc import Iterator

from torch import Tensor

from ldm.interop.keymap import KeyMapping, State, count, export_state, import_state, layer_rows

ATTENTION = {"attention.q": "to_q", "attention.k": "to_k", "attention.v": "to_v"}


def import_bert(state: State) -> dict[str, Tensor]:
    """Convert CompVis' BERTEmbedder.transformer to a WordPiece's weights.  Raises UserError for unknown names."""
    return import_state(compvis(count(r"(?m)^attn_layers\.layers\.(\d+)\.", state) // 2), state, "BERTEmbedder")


def export_bert(state: State) -> dict[str, Tensor]:
    """Convert a WordPiece's weights to CompVis' BERTEmbedder.transformer.

    Raises UserError for a weight without a name there.
    """
    return export_state(compvis(count(r"(?m)^transformer\.layers\.(\d+)\.", state)), state, "BERTEmbedder")


def import_ldmbert(state: State) -> dict[str, Tensor]:
    """Convert diffusers' LDMBertModel to a WordPiece's weights.  Raises UserError for unknown names."""
    return import_state(diffusers(count(r"(?m)^model\.layers\.(\d+)\.", state)), state, "LDMBertModel")


def export_ldmbert(state: State) -> dict[str, Tensor]:
    """Convert a WordPiece's weights to diffusers' LDMBertModel.  Raises UserError for a weight without a name there."""
    return export_state(diffusers(count(r"(?m)^transformer\.layers\.(\d+)\.", state)), state, "LDMBertModel")


def compvis(depth: int) -> Iterator[KeyMapping]:
    """Yield every name of x_transformer's TransformerWrapper, where attention and feed-forward are separate layers."""
    yield KeyMapping("transformer.token.weight", ("token_emb.weight",))
    yield KeyMapping("transformer.position.weight", ("pos_emb.emb.weight",))
    yield from layer_rows({"norm": "norm", "logits": "to_logits"}, "transformer.", "")
    for n in range(depth):
        ours, attends, feeds = (
            f"transformer.layers.{n}.",
            f"attn_layers.layers.{2 * n}.",
            f"attn_layers.layers.{2 * n + 1}.",
        )
        yield from layer_rows({"norm1": "0", "attention.out": "1.to_out"}, ours, attends)
        for our_name, their_name in ATTENTION.items():
            yield KeyMapping(f"{ours}{our_name}.weight", (f"{attends}1.{their_name}.weight",))
        yield from layer_rows({"norm2": "0", "mlp.0": "1.net.0.0", "mlp.2": "1.net.2"}, ours, feeds)


def diffusers(depth: int) -> Iterator[KeyMapping]:
    """Yield every name of LDMBertModel."""
    yield KeyMapping("transformer.token.weight", ("model.embed_tokens.weight",))
    yield KeyMapping("transformer.position.weight", ("model.embed_positions.weight",))
    yield from layer_rows({"norm": "model.layer_norm", "logits": "to_logits"}, "transformer.", "")
    inner = {"norm1": "self_attn_layer_norm", "attention.out": "self_attn.out_proj", "norm2": "final_layer_norm"}
    for n in range(depth):
        ours, theirs = f"transformer.layers.{n}.", f"model.layers.{n}."
        yield from layer_rows({**inner, "mlp.0": "fc1", "mlp.2": "fc2"}, ours, theirs)
        for part in ("q", "k", "v"):
            yield KeyMapping(f"{ours}attention.{part}.weight", (f"{theirs}self_attn.{part}_proj.weight",))
