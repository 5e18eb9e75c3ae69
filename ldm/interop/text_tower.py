"""The text tower of a diffusers pipeline, with the words it cuts prompts into: CLIP's, or the transformer of LDM's own text-to-image."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ldm.errors import UserError
from ldm.interop import bert, clip_config, config_nodes, text, weights_file
from ldm.interop.pipeline import Pipeline, require_values
from ldm.io.atomic import CorruptFileError
from ldm.io.download import minilm
from ldm.io.parse import parse_json

BERT = {
    "activation_function": "gelu",
    "scale_embedding": False,
}  # what an LDMBertModel must be for ours to compute the same
UNCASED = 30_522  # words of BERT's own list


@dataclass(frozen=True)
class ExportedTextTower:
    """A text tower as diffusers keeps it. config, state: of its folder.  words: files of the tokenizer's.  dim: of a token.  listed: what
    model_index.json says of tower and tokenizer."""

    config: dict[str, Any]
    state: dict[str, Tensor]
    words: dict[str, str]
    dim: int
    listed: tuple[list[str], list[str]]


@dataclass(frozen=True)
class ImportedTextTower:
    """A text tower as ours: the conditioner's node, and its weights, those of CLIP's tower apart."""

    node: config_nodes.Node
    text: dict[str, Tensor] = field(default_factory=dict)
    conditioner_state: dict[str, Tensor] = field(default_factory=dict)


def read_config(folder: Path, name: str = "config.json") -> dict[str, Any]:
    """A part's config. Raises UserError for a part that is not there, CorruptFileError for one that is no JSON object."""
    path = folder / name
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected a whole pipeline folder of diffusers")
    try:
        return dict(parse_json(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise CorruptFileError(f"{path} is damaged ({error}); fetch it again") from None


def export_clip(pipeline: Pipeline) -> ExportedTextTower:
    """transformers' CLIPTextModel and CLIPTokenizer."""
    given = config_nodes.encoder_of(pipeline.config["conditioner"])
    config = clip_config.open_clip_config(given["model"])
    depth = config["text_cfg"]["layers"] + given["layer"] + 1
    said = clip_config.to_transformers(config, depth, given["pad_token_id"])
    words = clip_config.tokenizer_files(given["pad_token_id"], config["text_cfg"]["context_length"])
    listed = ["transformers", "CLIPTextModel"], ["transformers", "CLIPTokenizer"]
    return ExportedTextTower(said, text.export_text(pipeline.text, depth), words, config["text_cfg"]["width"], listed)


def import_clip(folder: Path, tokenizer: Path) -> ImportedTextTower:
    """Our conditioner of a CLIPTextModel and its tokenizer."""
    given = read_config(folder)
    config, state = (
        clip_config.of_transformers(given.get("text_config", given)),
        text.import_text(weights_file.read_weights(folder)),
    )
    special = read_config(tokenizer, "special_tokens_map.json").get("pad_token", "<|endoftext|>")
    pad = clip_config.END if (special["content"] if isinstance(special, dict) else special) == "<|endoftext|>" else 0
    name, layer = clip_config.known_open_clip_name(config) or (clip_config.write_config(config), -1)
    return ImportedTextTower(config_nodes.clip(name, layer, pad, config["text_cfg"]["context_length"]), text=state)


def inpainting_of(folder: Path, tokenizer: Path) -> ImportedTextTower:
    """As import_clip, for a model that is told mask and masked image as well."""
    heard = import_clip(folder, tokenizer)
    return replace(heard, node=config_nodes.inpainting(heard.node))


def export_wordpiece(pipeline: Pipeline) -> ExportedTextTower:
    """diffusers' LDMBertModel and transformers' BertTokenizer."""
    given = pipeline.config["conditioner"]
    file = Path(given["vocabulary"]).expanduser() if given["vocabulary"] else minilm() / "tokenizer.json"
    cut = json.loads(file.read_text(encoding="utf-8"))
    vocabulary = cut["model"]["vocab"]
    said = {
        **{"_class_name": "LDMBertModel", "architectures": ["LDMBertModel"], "model_type": "ldmbert", **BERT},
        **{
            "vocab_size": len(vocabulary),
            "max_position_embeddings": given["max_length"],
            "d_model": given["dim"],
            "pad_token_id": 0,
        },
        **{"encoder_layers": given["layers"], "encoder_ffn_dim": 4 * given["dim"]},
        **{"encoder_attention_heads": given["num_heads"], "head_dim": given["num_head_channels"]},
    }
    options = {"tokenizer_class": "BertTokenizer", "model_max_length": given["max_length"], "do_lower_case": True}
    words = {
        "vocab.txt": "\n".join(sorted(vocabulary, key=vocabulary.__getitem__)) + "\n",
        "tokenizer.json": json.dumps({**cut, "padding": None, "truncation": None}, ensure_ascii=False),
        "tokenizer_config.json": json.dumps(options, indent=1),
    }
    state = bert.export_ldmbert(pipeline.conditioner)
    if "to_logits.weight" not in state:  # which nothing reads, and diffusers' model has all the same
        state |= {
            "to_logits.weight": state["model.embed_tokens.weight"] * 0,
            "to_logits.bias": state["model.embed_tokens.weight"][:, 0] * 0,
        }
    return ExportedTextTower(
        said, state, words, given["dim"], (["latent_diffusion", "LDMBertModel"], ["transformers", "BertTokenizer"])
    )


def import_wordpiece(folder: Path, tokenizer: Path) -> ImportedTextTower:
    """Our conditioner of an LDMBertModel and its tokenizer, whose list is BERT's own or in a tokenizer.json. Raises UserError else."""
    given = read_config(folder)
    require_values(given, BERT, "bert/config.json")
    dim, tokens = given["d_model"], given.get("vocab_size", UNCASED)
    require_values(given, {"encoder_ffn_dim": 4 * dim}, "bert/config.json")
    own = tokenizer / "tokenizer.json"
    if tokens != UNCASED and not own.is_file():
        raise UserError(
            f"{own}: no such file; expected one for a list of {tokens} words, which is not BERT's own of {UNCASED}"
        )
    node = {
        "_target_": "ldm.conditioner.transformer.WordPiece",
        **{
            "dim": dim,
            "layers": given["encoder_layers"],
            "num_heads": given["encoder_attention_heads"],
            "num_head_channels": given["head_dim"],
        },
        **{
            "max_length": given.get("max_position_embeddings", 77),
            "keep_logits_head": True,
            "vocabulary": None if tokens == UNCASED else str(own),
        },
    }
    return ImportedTextTower(node, conditioner_state=bert.import_ldmbert(weights_file.read_weights(folder)))


@dataclass(frozen=True)
class PipelineKind:
    """A pipeline class of diffusers. stage, told: the folders of first stage and text tower.  write, read: the tower's.  more: what
    model_index.json also lists."""

    name: str
    stage: str
    text_folder: str
    write: Callable[[Pipeline], ExportedTextTower]
    read: Callable[[Path, Path], ImportedTextTower]
    more: Mapping[str, Any] = field(default_factory=dict)


NONE = [None, None]
SAFETY = {"feature_extractor": NONE, "image_encoder": NONE, "safety_checker": NONE, "requires_safety_checker": False}
CLIP, MASKED = "ldm.conditioner.clip.CLIP", "ldm.conditioner.spatial.MaskedImage"
KINDS = {  # by the classes of our conditioners, or of the encoders in them
    (CLIP,): PipelineKind("StableDiffusionPipeline", "vae", "text_encoder", export_clip, import_clip, SAFETY),
    (CLIP, MASKED): PipelineKind(
        "StableDiffusionInpaintPipeline", "vae", "text_encoder", export_clip, inpainting_of, SAFETY
    ),
    ("ldm.conditioner.transformer.WordPiece",): PipelineKind(
        "LDMTextToImagePipeline", "vqvae", "bert", export_wordpiece, import_wordpiece
    ),
}


def kind_of(conditioner: Mapping[str, Any]) -> PipelineKind:
    """The pipeline class for a conditioner's node. Raises UserError for one that none has a place for."""
    targets = sorted(str((part.get("encoder") or part).get("_target_")) for part in config_nodes.parts_of(conditioner))
    if tuple(targets) not in KINDS:
        told = ", ".join(targets)
        raise UserError(
            f"conditioner={told}: to=diffusers expects a CLIP text tower, alone or with a masked image, or WordPiece"
        )
    return KINDS[tuple(targets)]
